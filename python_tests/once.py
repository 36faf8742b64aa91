"""Tests that run once for each state of the sources: they skip where a committed report says that they have passed.

The CUDA kernels on an emulated device, Triton's in its interpreter and whatever goes through PyTorch's compiler take
most of the time of all tests, and come out as before while nothing changes. benchmarks/results/passed-tests.json has a
line for each file of tests and each of these kinds, with a hash of all that decides: the sources of the kernels, what
of the package the file and its helpers use, they themselves, the names of the tests, and the versions of the tools.

The fixtures "emulated" and "interpreted" and the parameter "backend" tell the kind of a test, or ``@pytest.mark.once``,
which also names what else of the checkout it uses; ``@pytest.mark.always`` runs all the same. A change runs them, and
so do TGT_FAST_FULL_GRID=1 and -k, -m or names of tests. TGT_FAST_SAVE_REPORTS=1 runs those alone that are not in the
report, and writes the lines of those of which every test has passed.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType

import covering
import pytest
import torch

import tgt_fast

HERE = Path(__file__).parent
ROOT = HERE.parent
PACKAGE = Path(tgt_fast.__file__).parent
NAME = "passed-tests"
SAVE = "TGT_FAST_SAVE_REPORTS"

# Whatever a test calls: its ops register themselves, and these find their kernels by name.
ALWAYS_USED = ("__init__", "kernels", "ops")
IMPORTS = re.compile(r"^\s*(?:from tgt_fast(?:\.(\w+)[\w.]*)? import (\([^)]*\)|[^\n]*)|import tgt_fast\.(\w+))", re.M)
MENTIONS = re.compile(r"\btgt(?:_fast)?\.(\w+)")
OF_TESTS = re.compile(r"^\s*(?:from|import) (\w+(?:, \w+)*)", re.M)
SCRIPTS = re.compile(r"\"(\w+)\.py\"")
SAYS_NOTHING = {covering.FULL, SAVE, "TGT_FAST_REQUIRE_NATIVE"}


def kind(item: pytest.Item) -> str | None:
    """What lets a test run once; None: it runs always."""
    if any(item.get_closest_marker(name) is not None for name in ("gpu", "always")):
        return None
    marker = item.get_closest_marker("once")
    if marker is not None:
        return str(marker.args[0])
    callspec, fixtures = getattr(item, "callspec", None), getattr(item, "fixturenames", ())
    params = {} if callspec is None else callspec.params
    backend = next((params[name] for name in ("backend", "kernels", "name") if name in params), None)
    if backend == "emulated" or "emulated" in fixtures:
        return "emulated"
    return "triton" if backend == "triton" or "interpreted" in fixtures else None


Group = tuple[str, str, str, int]  # a file, a kind, the digest, how many tests


class Once:
    """A plugin: what need not run of the tests that are collected, and the report on those that have run."""

    def __init__(self, results: Path | None = None) -> None:
        self.file = (ROOT / "benchmarks" / "results" if results is None else results) / f"{NAME}.json"
        self.saves = os.environ.get(SAVE) == "1"
        self.ended: dict[Group, dict[str, str]] = defaultdict(dict)  # how each test did

    def known(self) -> dict[tuple[str, str], dict[str, object]]:
        rows = json.loads(self.file.read_text())["rows"] if self.file.exists() else []
        return {(row["file"], row["kind"]): row for row in rows}

    def unneeded(self, config: pytest.Config, items: Sequence[pytest.Item]) -> list[pytest.Item]:
        """The items that do not run. One of each kind in each file stays, and skips with the reason."""
        asked_for = config.option.keyword or config.option.markexpr or any("::" in each for each in config.args)
        whole_grids = os.environ.get(covering.FULL) == "1" and not self.saves
        if asked_for or whole_grids or not self.file.parent.is_dir() or torch.cuda.is_available():
            return []
        groups: dict[tuple[Path, str], list[pytest.Item]] = defaultdict(list)
        more: dict[tuple[Path, str], set[str]] = defaultdict(set)
        for item in items:
            if (what := kind(item)) is not None:
                groups[item.path, what].append(item)
                marker = item.get_closest_marker("once")
                more[item.path, what] |= set() if marker is None else set(marker.args[1:])
        known, left_out = self.known(), []
        if self.saves:
            left_out = [item for item in items if kind(item) is None]
        for (path, what), group in groups.items():
            made_of = digest(path, [item.nodeid.partition("::")[2] for item in group], more[path, what])
            if known.get((path.name, what), {}).get("made_of") == made_of:
                group[0].add_marker(pytest.mark.skip(reason=words(path.name, what, len(group))))
                left_out += group[1:]
            elif self.saves:
                for item in group:
                    item.user_properties.append((NAME, [path.name, what, made_of, len(group)]))
        return left_out

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == NAME:
                file, what, made_of, count = value  # type: ignore[misc]
                ended = self.ended[str(file), str(what), str(made_of), int(count)]
                if report.when == "call" or not report.passed:
                    ended[report.nodeid] = f"{report.outcome} {report.when}" if report.skipped else report.outcome

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.ended and not hasattr(session.config, "workerinput"):
            self.save()

    def save(self) -> None:
        """Adds what has passed as a whole; nothing stays of files that are gone."""
        rows = {key: row for key, row in self.known().items() if (HERE / key[0]).exists()}
        for (file, what, made_of, count), ended in self.ended.items():
            # A test may find that the kernels do not serve its parameters; what its tools do not serve has no other.
            if len(ended) == count and {"passed"} <= set(ended.values()) <= {"passed", "skipped call"}:
                rows[file, what] = {"file": file, "kind": what, "tests": count, "made_of": made_of}
        lines = ",\n".join(json.dumps(rows[key]) for key in sorted(rows))
        self.file.write_text(f'{{"by": {json.dumps(_tools())}, "rows": [\n{lines}\n]}}\n')


def words(file: str, what: str, count: int) -> str:
    """Why a test skips, for all that it stands for."""
    return (
        f"{what}: {count} of {file} have passed with exactly these sources ({NAME}.json); "
        f"{covering.FULL}=1 or the name of a test runs them"
    )


def digest(path: Path, names: Iterable[str], more: Iterable[str] = ()) -> str:
    """A hash of all that decides about these tests of a file, which use ``more``: files, and whole folders."""
    others = [file for name in more for file in _below(ROOT / name)]
    tests, parts = uses(path, *others)
    of_tests = _compiled().digest(HERE, tests, *_tools(), *sorted(names))
    of_others = _compiled().digest(ROOT, others, _kernels())
    made: str = _compiled().digest(ROOT, [], of_tests, of_others, *map(_of_part, sorted(parts)))
    return made


def uses(path: Path, *others: Path) -> tuple[set[Path], set[str]]:
    """The tests' modules that one needs, itself among them, and the parts of the package that they and others use."""
    tests, todo = {path}, [path, HERE / "conftest.py"]
    parts = {*ALWAYS_USED, *(part for file in others for part in _in_a_test(file)[1])}
    while todo:
        here = todo.pop()
        tests.add(here)
        modules, named = _in_a_test(here)
        parts |= named
        todo += modules - tests
    grown: set[str] = set()
    while parts - grown:
        for part in parts - grown:
            grown.add(part)
            parts |= _in_a_part(part)
    return tests, parts


@functools.cache
def _in_a_test(path: Path) -> tuple[set[Path], set[str]]:
    text = path.read_text()
    names = {name for found in OF_TESTS.findall(text) for name in found.split(", ")}
    if path.name != "conftest.py":  # which only lists names of files
        names |= set(SCRIPTS.findall(text))
    modules = {file for name in names if (file := HERE / f"{name}.py").exists()}
    return modules, _named(text) | {part for name in MENTIONS.findall(text) if (part := _home(name)) is not None}


@functools.cache
def _in_a_part(part: str) -> set[str]:
    if part == "__init__":
        return set()
    return {name for file in _files(part) for name in _named(file.read_text())}


def _named(text: str) -> set[str]:
    """The parts of the package in imports."""
    found: set[str] = set()
    for part, names, module in IMPORTS.findall(text):
        of_all = [part or module] if part or module else re.findall(r"\w+", names)
        found |= {home for name in of_all if (home := _home(name)) is not None}
    return found


def _home(name: str) -> str | None:
    """The part of the package that a name of its top is, or is in."""
    name = tgt_fast._WHERE.get(name, f"tgt_fast.{name}").split(".")[1]
    return name if any(True for _ in _files(name)) else None


def _files(part: str) -> Iterator[Path]:
    if (PACKAGE / f"{part}.py").exists():
        yield PACKAGE / f"{part}.py"
    if (PACKAGE / part).is_dir():
        yield from (PACKAGE / part).rglob("*.py")


@functools.cache
def _of_part(part: str) -> str:
    """A hash of a part of the package."""
    made: str = _compiled().digest(PACKAGE, _files(part))
    return made


@functools.cache
def _kernels() -> str:
    """A hash of all that is compiled."""
    made: str = _compiled().digest(ROOT, _below(ROOT / "csrc"))
    return made


def _below(path: Path) -> list[Path]:
    """A file, or all of a folder but what Python keeps there."""
    files = [path] if path.is_file() else path.rglob("*")
    return [file for file in files if file.is_file() and "__pycache__" not in file.parts]


@functools.cache
def _tools() -> tuple[str, ...]:
    """What runs the tests, and whatever else was asked for."""
    versions = [f"{name} {_version(name)}" for name in ("torch", "triton")]
    versions.append(f"numpy {'.'.join(_version('numpy').split('.')[:2])}")  # which computes in Triton's interpreter
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is not None:
        asked = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=False)
        versions.append(f"C++ compiler {asked.stdout.strip()}")
    python = ".".join(platform.python_version_tuple()[:2])
    options = [
        f"{key}={value}" for key, value in os.environ.items() if key.startswith("TGT_FAST_") and key not in SAYS_NOTHING
    ]
    return (f"Python {python} on {platform.machine()}", *versions, *sorted(options))


def _version(name: str) -> str:
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "missing"


@functools.cache
def _compiled() -> ModuleType:
    """How the other reports are made of sources: a module of benchmarks/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("compiled")
