"""Call every public function, and the methods of every public class one after another, with wrong and odd arguments.

    python python_tests/fuzz.py --calls 20000 --seed 1
    python python_tests/fuzz.py --only TeacherCache

Each must give a result or an error of ``tgt_fast.errors``; what a user's own callable raises is the user's. The calls
are made in forked children, so that a crash or a hang is told with the call that it came from. It prints figures as
JSON and fails with what it found; a finding has a number, which ``--number`` makes again.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import fuzz_subjects
import torch
from fuzz_subjects import SUBJECTS, Call
from fuzz_values import mutated

from tgt_fast.errors import TgtError

PACKAGE = str(Path(sys.modules[TgtError.__module__].__file__ or "").parent)
SECONDS = 30  # for one subject; more is a hang
CHUNK = 200  # subjects in a child


def of_python(error: BaseException, frames: list[traceback.FrameSummary]) -> bool:
    """True if Python itself refused a call: a parameter that is missing or unknown."""
    frames = [frame for frame in frames if not frame.filename.endswith("_forks.py")]  # which passes on what it gets
    words = ("unexpected keyword argument", "required positional argument", "required keyword-only", "multiple values",
             "positional arguments but", "positional argument but", "object is not callable")  # fmt: skip
    ours = any(frame.filename.startswith(PACKAGE) for frame in frames)
    return isinstance(error, TypeError) and not ours and any(word in str(error) for word in words)


def of_a_callable(frames: list[traceback.FrameSummary]) -> bool:
    """True if it was raised in a module or a function that the user gave."""
    last_of_ours = max((i for i, frame in enumerate(frames) if frame.filename.startswith(PACKAGE)), default=0)
    beyond = [frame.filename for frame in frames[last_of_ours + 1 :]]
    users = (fuzz_subjects.__file__, os.path.join("torch", "nn", "modules"), os.path.join("torch", "optim"))
    return any(user in file for user in users for file in beyond)


def of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate" in str(error))


def allowed(error: BaseException, tb: TracebackType | None) -> bool:
    if isinstance(error, TgtError):
        return True
    frames = traceback.extract_tb(tb)[1:]  # without run()
    return of_python(error, frames) or of_a_callable(frames) or of_memory(error)


def run(name: str, number: int, folder: Path, tell: Callable[[str], None], seen: Counter[str]) -> None:
    """One subject: it is made, and some of its methods are called."""
    draw = random.Random(f"{name} {number}")
    torch.manual_seed(number)
    subject = SUBJECTS[name](draw, folder)
    made: Any = None
    for step in range(draw.randrange(1, 6) if subject.methods else 1):
        call: Call = subject.first(made) if step == 0 else draw.choice(subject.methods)(made)
        changed = mutated(call, draw)
        told = f"{name} {number}: {call.name}({changed})"
        tell(told)
        try:
            result = call.function(*call.arguments, **call.options)
            seen["results"] += 1
        except Exception as error:
            if not allowed(error, error.__traceback__):
                lines = "".join(traceback.format_exception(error)[-8:])
                raise AssertionError(f"{told}\n{lines}") from None
            seen["errors"] += 1
            if step == 0:
                return
            continue
        if step == 0:
            made = result


def child(names: list[str], numbers: range, report: Path, last: Path) -> None:
    """Write what was found, and before each call what it is."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    faulthandler.enable()
    found, seen = [], Counter[str]()
    with open(last, "w") as now, tempfile.TemporaryDirectory() as folder:

        def tell(what: str) -> None:
            now.seek(0)
            now.truncate()
            now.write(what)
            now.flush()

        for number in numbers:
            name = names[number % len(names)]
            place = Path(folder, str(number))
            place.mkdir()
            signal.alarm(SECONDS)
            try:
                run(name, number, place, tell, seen)
            except AssertionError as error:
                found.append(str(error))
            seen[name] += 1
        signal.alarm(0)
    report.write_text(json.dumps({"found": found, "seen": seen}))
    os._exit(0)


def fuzz(names: list[str], numbers: range) -> tuple[list[str], Counter[str]]:
    found, seen = [], Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        report, last = Path(folder, "report"), Path(folder, "last")
        at = numbers.start
        while at < numbers.stop:
            part = range(at, min(at + CHUNK, numbers.stop))
            report.unlink(missing_ok=True)
            pid = os.fork()
            if not pid:
                try:
                    child(names, part, report, last)
                except BaseException:
                    traceback.print_exc()
                os._exit(1)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if report.exists():
                told = json.loads(report.read_text())
                found += told["found"]
                seen.update(told["seen"])
                at = part.stop
            else:  # the rest of its part goes on after the call that ended it
                what = last.read_text()
                found.append(f"{what}\nended with {signal.Signals(-code).name if code < 0 else code}")
                at = int(what.split(":")[0].split()[1]) + 1 if what else at + 1
    return found, seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="subjects; classes get up to 5 calls each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=sorted(SUBJECTS))
    parser.add_argument("--number", type=int, help="one subject alone, with --only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.only or list(SUBJECTS)
    start = options.seed * 10_000_000
    numbers = range(start, start + options.calls)
    if options.number is not None:
        numbers = range(options.number, options.number + 1)
    found, seen = fuzz(names, numbers)
    for one in found:
        print(one, file=sys.stderr)
    print(json.dumps({**seen, "found": len(found)}))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
