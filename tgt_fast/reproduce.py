"""``tgt-fast reproduce RESULT.json``: run again what a result file was made by, and compare number by number."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tgt_fast.errors import ArgumentError

OP: Final = "reproduce"
STATED: Final = ("commit", "hardware", "versions", "seeds", "command")  # what a result file says of itself
FOLDER_VARIABLE: Final = "TGT_FAST_RESULTS"  # where the scripts of benchmarks/ put their result files

# By kind: a number may differ by so much of the recorded one, or by so much at all; whichever is more.
MARGINS: Final[dict[str, tuple[float, float]]] = {
    "time": (1.0, 0.0),  # up to twice as long, or half
    "memory": (0.25, 1 << 20),
    "error": (9.0, 1e-12),  # against a float64 reference: rounding, so within its order of magnitude
    "quality": (0.02, 1e-3),  # accuracies, losses, divergences of training
    "count": (0.0, 0.0),
}
_TIME = re.compile(r"second|millisecond|^ms$|^over_|^of_copy$|copy|^ratio$|^overhead$|rate$|^rounds$|speedup")
_MEMORY = re.compile(r"bytes$|^peak|memory|gib$|mib$")
_PASSING = frozenset({"commit", "date", "hardware", "versions", "command", "load", "core", "margins", "driver", "cuda",
                      "machine", "reason", "spread", "total_seconds"})  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """A value that is not what was recorded: where, what was and is, and the kind whose margin it leaves."""

    where: str
    recorded: Any
    found: Any
    kind: str

    def __str__(self) -> str:
        return f"{self.where}: recorded {_short(self.recorded)}, now {_short(self.found)} ({self.kind})"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Its arguments."""
    parser = commands.add_parser(
        "reproduce",
        help="run again what a result file was made by, and compare",
        description="Run the command that a result file states, if it is one of tgt-fast's or of the scripts in "
        "./benchmarks, and compare what it writes with the file. Exit status 1: a number is outside its margin, "
        "or the file does not say how it was made.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("result", type=Path, metavar="RESULT.json", help="of benchmarks/results, or by --json")
    parser.add_argument(
        "--margin", action="append", default=[], metavar="KIND=SHARE",
        help=f"how far numbers of a kind may lie apart, as a share of the recorded one; kinds: {', '.join(MARGINS)}",
    )  # fmt: skip
    parser.add_argument("--keep", type=Path, default=argparse.SUPPRESS, metavar="FILE", help="keep the new result here")


def run(given: argparse.Namespace) -> int:
    """The command; its exit status."""
    recorded = read(given.result)
    margins = margins_of(recorded, given.margin)
    missing = [name for name in STATED if name not in recorded]
    if "command" in missing:
        raise ArgumentError(f"{OP}: {given.result} does not say how it was made; it lacks {', '.join(missing)}")
    for name in missing:
        print(f"{given.result} does not state: {name}")
    print(f"recorded at commit {recorded.get('commit', '?')} on {recorded.get('hardware', '?')}")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / given.result.name
        words, environment = invocation(str(recorded["command"]), made)
        print("running:", recorded["command"], flush=True)
        status = subprocess.run(words, env={**os.environ, **environment}, check=False).returncode
        if not made.exists():
            raise ArgumentError(f"{OP}: the command ended with status {status} and wrote no result")
        new = read(made)
        if hasattr(given, "keep"):
            given.keep.write_bytes(made.read_bytes())
    for name, was, found in changed(recorded.get("versions"), new.get("versions")):
        print(f"another version of {name}: {was} then, {found} now")
    if new.get("hardware") != recorded.get("hardware"):
        print(f"other hardware now: {new.get('hardware', '?')}")
    found_differences, compared = compare(recorded, new, margins)
    for difference in found_differences:
        print(difference)
    print(f"{compared} numbers compared, {len(found_differences)} differences")
    return int(bool(found_differences) or status != 0)


def read(file: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ArgumentError: it cannot be read, or holds no object of JSON.
    """
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{OP}: cannot read {file}: {error}") from None
    if not isinstance(result, dict):
        raise ArgumentError(
            f"{OP}: {file} does not say how it was made; it holds a {type(result).__name__} without {', '.join(STATED)}"
        )
    return result


def margins_of(result: Mapping[str, Any], asked: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The shares and absolute numbers by kind: the usual ones, those that the file states, those asked for."""
    margins = dict(MARGINS)
    stated = result.get("margins", {})
    pairs = [(str(kind), share) for kind, share in stated.items()] if isinstance(stated, dict) else [("", stated)]
    pairs += [(kind, share) for kind, _, share in (text.partition("=") for text in asked)]
    for kind, share in pairs:
        try:
            number = float(share)
        except (TypeError, ValueError):
            number = math.nan
        if kind not in MARGINS or not 0 <= number < math.inf:
            raise ArgumentError(f"{OP}: a margin is KIND=SHARE, of {', '.join(MARGINS)}; got {kind}={share}")
        margins[kind] = (number, margins[kind][1])
    return margins


def invocation(command: str, made: Path) -> tuple[list[str], dict[str, str]]:
    """The words and the environment that run a stated command, so that it writes its result to ``made``.

    Raises:
        ArgumentError: it is none of tgt-fast's that measure, and no script in ./benchmarks.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    if words[:2] in (["tgt-fast", "bench"], ["tgt-fast", "demo"]):
        if not any(word.startswith(("--j", "--o", "--pl")) and not word.startswith("--ops") for word in words):
            place = ["--out", str(made.with_name("report"))] if words[1] == "demo" else []
            return [sys.executable, "-m", "tgt_fast", *words[1:], "--json", str(made), *place], {}
    elif len(words) >= 3 and words[0] == "python" and re.fullmatch(r"benchmarks/[a-z_]+\.py", words[1]):
        script = Path(words[1])
        if "--save" in words and all(re.fullmatch(r"--[a-z-]+|[0-9.]+|[a-z,]+", word) for word in words[2:]):
            if not script.is_file():
                raise ArgumentError(f"{OP}: there is no {script} here; run it in a checkout of the repository")
            return [sys.executable, *words[1:]], {FOLDER_VARIABLE: str(made.parent)}
    raise ArgumentError(
        f"{OP}: runs tgt-fast bench, tgt-fast demo and python benchmarks/NAME.py --save; got {command!r}"
    )


def compare(
    recorded: Mapping[str, Any], new: Mapping[str, Any], margins: Mapping[str, tuple[float, float]]
) -> tuple[list[Difference], int]:
    """The differences outside the margins, and how many values were compared."""
    before, after = dict(_leaves(recorded, "", "")), dict(_leaves(new, "", ""))
    differences = []
    for where, (kind, value) in before.items():
        found = after.get(where, (kind, "nothing"))[1]
        if not _within(value, found, margins.get(kind, (0.0, 0.0))):
            differences.append(Difference(where, value, found, kind))
    differences += [Difference(where, "nothing", after[where][1], after[where][0]) for where in after.keys() - before]
    return differences, len(before)


def changed(before: Any, after: Any) -> Iterator[tuple[str, str, str]]:
    """Names of packages whose versions differ, with both."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            was, found = before.get(name, "none"), after.get(name, "none")
            if was != found:
                yield name, str(was), str(found)


def _leaves(value: Any, where: str, kind: str) -> Iterator[tuple[str, tuple[str, Any]]]:
    """(path, (kind, value)) of everything that a run determines."""
    if isinstance(value, dict):
        for name, part in value.items():
            if name not in _PASSING:
                yield from _leaves(part, f"{where}.{name}" if where else name, kind or _kind(name))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _leaves(part, f"{where}[{number}]", kind)
    elif isinstance(value, float) or (isinstance(value, int) and kind):
        yield where, (kind or "quality", value)
    else:
        yield where, ("count" if isinstance(value, int) and not isinstance(value, bool) else "text", value)


def _kind(name: str) -> str:
    """Of a number under this name, and of all that lies under it; "" where the name does not tell."""
    if name in ("errors", "error"):
        return "error"
    if _TIME.search(name):
        return "time"
    return "memory" if _MEMORY.search(name) else ""


def _within(recorded: Any, found: Any, margin: tuple[float, float]) -> bool:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (recorded, found))
    if not numbers:
        return bool(recorded == found)
    if recorded == found or (math.isnan(recorded) and math.isnan(found)):
        return True
    share, least = margin
    if recorded * found < 0:
        share = 0.0
    return bool(abs(recorded - found) <= max(share * min(abs(recorded), abs(found)), least))


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)
