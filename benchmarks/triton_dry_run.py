"""Triton's kernels in the forms that benchmarks and tests on a GPU use, compiled for sm_90 and launched, without a GPU.

    python benchmarks/triton_dry_run.py                       # all sets, with the Triton that is installed
    python benchmarks/triton_dry_run.py --only bench
    python benchmarks/triton_dry_run.py --one-of 8 --save     # of tests and of combinations of options one of 8
    python benchmarks/triton_dry_run.py --seconds 900 --save  # of each set what there is time for
    python benchmarks/triton_dry_run.py --go-on --save        # the rest of them

The sets: what the bench times, at full shapes; the tests on a GPU with all of their parameters; the combinations of
options that Triton 3.5 and 3.6 were once unable to compile, as far as Triton's own code, where they failed; all
combinations of options. A driver takes the launches and starts nothing (python_tests/dry_gpu.py). Forms are taken in an
order that is always the same and has no pattern, so that what there is time for is a fair sample. ``--save`` writes the
findings to benchmarks/results/triton-dry-run.json, where each version of Triton has its place: how many ``forms`` ran
``of`` how many there are, and the digest of the ``kernels`` for whose sources this holds (``--sources`` prints that of
those in the package). A result for other sources is old, which fails nothing; one of more forms than were run since is
kept as the ``earlier`` one. Exits with 1 when a form fails.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import datetime
import functools
import hashlib
import importlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch

import tgt_fast
from tgt_fast.bench import explore
from tgt_fast.bench.case import Case
from tgt_fast.bench.ops import OPS

ROOT: Final = Path(__file__).resolve().parent.parent
SETS: Final = ("bench", "tests", "fragile", "options")
RESULT: Final = ROOT / "benchmarks" / "results" / "triton-dry-run.json"
FORMS_OF_A_PROCESS: Final = 40
Form = Callable[[], Any]


@dataclasses.dataclass
class Found:
    """What the forms of a set that ran have shown."""

    forms: int = 0
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    launches: Counter[str] = dataclasses.field(default_factory=Counter)


def on_meta() -> Any:
    """Within it what is made on or sent to a GPU lies on "meta"."""
    return _beside_the_tests("gpu_stand_ins").Elsewhere("meta")


class _NoGenerator:
    """On "meta" nothing is drawn."""

    def __init__(self, device: Any = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        return None


def bench_forms() -> dict[str, Form]:
    """The calls that are timed, at their full shapes, where Triton has kernels for them."""
    made: dict[str, Form] = {}
    for noun, cases in OPS.items():
        for case in (*cases(torch.device("cuda"), True), *cases(torch.device("cuda"), False)):
            if noun == "explore":  # through a network, which computes on a CPU what it is given
                spec = explore.Spec(int(case.numbers["batch"]), False)
                made[f"bench {noun}: {case.title}"] = functools.partial(_timed, explore.case(spec, torch.device("cpu")))
            elif noun != "step" and case.kernels_of != "topk" and "sample" not in case.op:
                made[f"bench {noun}: {case.title}"] = functools.partial(_timed, case)
    return made


def _timed(case: Case) -> None:
    with on_meta(), mock.patch.object(torch, "Generator", _NoGenerator):
        work = case.build()
    work.ours("triton")()


def forms_of(name: str, one_of: int) -> dict[str, Form]:
    """The calls of a set, by name."""
    if name == "bench":
        return bench_forms()
    if name == "tests":
        return dict(list(test_forms().items())[::one_of])
    forms = _beside_the_tests("dry_forms")
    made: dict[str, Form] = forms.fragile_forwards() if name == "fragile" else forms.every_forward(one_of)
    return made


def test_forms() -> dict[str, Form]:
    """The tests on a GPU with all of their parameters, and the calls that look at a new device first."""
    made: dict[str, Form] = dict(_beside_the_tests("dry_gpu_tests").forms(full=True))
    for name, call in _beside_the_tests("gpu_calls").triton_calls().items():
        # A token that nothing has chosen cannot be taken from a table on a CPU.
        made[name] = functools.partial(call, torch.device("meta" if "hard" in name else "cpu"))
    return made


def _beside_the_tests(name: str) -> Any:
    folder = str(ROOT / "python_tests")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


@functools.cache
def _forms(name: str, one_of: int) -> dict[str, Form]:
    return forms_of(name, one_of)


def order(names: Iterable[str]) -> list[str]:
    """The same each time and without regard to what the names mean, so that its beginning is a fair sample."""
    return sorted(names, key=lambda name: (zlib.crc32(name.encode()), name))


@functools.cache
def _dry_gpu(name: str) -> Counter[str]:
    """The launches on a dry GPU that this process has from now on: a kernel keeps the launcher of its first launch."""
    gpu, stack = _beside_the_tests("dry_gpu"), ExitStack()
    launches: Counter[str] = stack.enter_context(gpu.tensors_on_a_dry_gpu())
    if name == "tests":
        stack.enter_context(_beside_the_tests("dry_gpu_tests").nothing_compared())
    elif name == "fragile":
        stack.enter_context(gpu.no_machine_code())
    atexit.register(stack.close)
    return launches


def run_form(name: str, one_of: int, form: str) -> tuple[str, Counter[str]]:
    """(what went wrong, launches of every kernel) of one form of a set, in a process of that set's."""
    launches = _dry_gpu(name)
    launches.clear()
    try:
        for _ in range(2 if name == "bench" else 1):
            _forms(name, one_of)[form]()
    except Exception as error:  # whatever it is, the others are to be seen too
        return f"{type(error).__name__}: {error}", launches
    return "" if launches.total() else "it launched nothing", launches


def run_set(name: str, one_of: int, jobs: int, seconds: float, found: Found, keep: Callable[[Found], None]) -> None:
    """Adds to ``found`` the forms of a set that it lacks, from processes of their own. No form begins after its time.

    What Triton has compiled stays in a process's memory (about 65 MB a form), so a process takes few forms, and finds
    on disk what those before it compiled. ``keep`` is called with what there is by then.
    """
    forms = order(_forms(name, one_of))
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        in_time = True
        while in_time and found.forms < len(forms):
            some = deque(forms[found.forms : found.forms + FORMS_OF_A_PROCESS * jobs])
            # Not forked: the tests' modules have used torch's threads by now, which a fork's child would wait for.
            with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
                ahead: deque[tuple[str, Any]] = deque()
                while True:
                    while len(ahead) < jobs and some and (in_time := time.monotonic() < end):
                        form = some.popleft()
                        ahead.append((form, pool.submit(run_form, name, one_of, form)))
                    if not ahead:
                        break
                    form, ended = ahead.popleft()
                    why, launched = ended.result()
                    found.launches.update(launched)
                    found.failed |= {form: why} if why else {}
                    found.forms += 1
            print(f"{name}: {found.forms} of {len(forms)}, {len(found.failed)} failed", flush=True)
            keep(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", action="append", choices=SETS, help="only this set; may be repeated")
    parser.add_argument("--one-of", type=int, default=1, help="of the tests and of the combinations of options")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for a set: no form of it begins later")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    parser.add_argument("--save", action="store_true", help=f"write to benchmarks/results/{RESULT.name}")
    parser.add_argument(
        "--go-on", action="store_true", help="with the forms that the saved result for these kernels lacks"
    )
    parser.add_argument("--sources", action="store_true", help="print the digest of the kernels' sources, run nothing")
    given = parser.parse_args()
    if given.go_on and given.one_of != 1:
        parser.error("--go-on takes whole sets, without --one-of")
    if given.sources:
        print(kernels_digest())
        return 0
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
    triton = importlib.metadata.version("triton")
    print(f"Triton {triton}, torch {torch.__version__}, Python {platform.python_version()}, sm_90")
    all_failed = 0
    for name in given.only or SETS:
        about: dict[str, Any] = {"of": len(_forms(name, 1)), "kernels": kernels_digest()}

        def keep(found: Found, name: str = name, about: dict[str, Any] = about) -> None:
            if given.save:
                save(triton, name, vars(found) | about)

        found = saved(triton, name) if given.go_on else Found()
        run_set(name, given.one_of, given.jobs, given.seconds, found, keep)
        all_failed += len(found.failed)
        print(f"{name}: {found.forms} forms of {about['of']}, {len(found.failed)} failed")
        for form, why in found.failed.items():
            print(f"  {form}: {why}")
    return 1 if all_failed else 0


def saved(triton: str, name: str) -> Found:
    """What is written down of a set, if it holds for today's kernels."""
    runs = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result = runs.get(triton, {}).get("sets", {}).get(name, {})
    if result.get("kernels") != kernels_digest():
        return Found()
    return Found(result["forms"], result["failed"], Counter(result["launches"]))


def save(triton: str, name: str, result: dict[str, Any]) -> None:
    runs = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    sets = runs.setdefault(triton, {"architecture": "sm_90"}).setdefault("sets", {})
    before = sets.get(name, {})
    earlier = before.pop("earlier", None) if before.get("kernels") == result["kernels"] else before
    sets[name] = result | {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
    if earlier and earlier["forms"] > result["forms"]:
        earlier.pop("earlier", None)
        sets[name]["earlier"] = earlier
    RESULT.write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n")


def kernels_digest() -> str:
    """Of the sources that were launched: a result holds for those."""
    folder = Path(tgt_fast.__file__).parent / "kernels" / "triton"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    started = time.monotonic()
    code = main()
    print(f"{time.monotonic() - started:.0f} s")
    raise SystemExit(code)
