"""That the part of each grid which runs by default (covering.py) finds what the whole product finds.

    python seeded_faults.py WORK             # all of faults.json that the committed table lacks; WORK: a folder to keep
    python seeded_faults.py WORK --all
    python seeded_faults.py WORK --only csrc/cuda/latent.cu

Each fault is seeded alone, in a copy of the sources; what they are compiled to is built anew, the core without a
vector's instructions and hardly optimised; and the tests that look there run until one fails. The part that runs by
default is a part of the product: what it finds, the product finds. So the product runs where the part finds nothing.
Last, all tests that failed must pass without a fault. The table is benchmarks/results/seeded-faults.json, and for
people benchmarks/seeded-faults.md. Exits with 1 where the part misses what the product finds, or both miss a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TABLE = ROOT / "benchmarks" / "results" / "seeded-faults.json"
PAGE = ROOT / "benchmarks" / "seeded-faults.md"
PARTS = ("tgt_fast", "csrc", "cmake", "python_tests", "pyproject.toml", "README.md")
FLAGS = (
    "-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fvisibility=hidden",
    "-w", '-DTGT_COMPILER="a test"', '-DTGT_SOURCES="a fault"',
)  # fmt: skip
OF_AN_ISA = re.compile(r"_rows\.cpp|/kernels\.cpp")  # the sources that CMakeLists.txt compiles once an instruction set
NOT_IN_THE_CORE = ("cuda.cpp",)
SECONDS = 1500
ONLY = {
    None: "not emulated and not triton and not cuda",
    "native": "not emulated and not triton and not cuda and not reference",
    # Some tests are of one backend and do not have its name in theirs.
    "emulated": "not native and not triton and not reference",
    "triton": "not native and not emulated and not reference",
}


@dataclass(frozen=True)
class Fault:
    """A text of the sources, which stands there once, in the place of which somebody might write another."""

    kind: str
    file: str
    old: str
    new: str
    tests: str  # names of the test files that look at what is computed there

    @property
    def backend(self) -> str | None:
        """The one whose tests see it; None where it is not in a backend's own sources."""
        places = (("csrc/cuda/", "emulated"), ("csrc/", "native"), ("tgt_fast/kernels/triton/", "triton"))
        return next((name for folder, name in places if self.file.startswith(folder)), None)


FAULTS = [Fault(**each) for each in json.loads((HERE / "faults.json").read_text())]


class Copy:
    """The sources in a folder, where faults may be seeded, and what is built of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.tree = self.folder / "tree"
        self.objects = self.folder / "objects"
        shutil.rmtree(self.tree, ignore_errors=True)
        self.tree.mkdir(parents=True)
        self.objects.mkdir(exist_ok=True)
        for part in PARTS:
            source = ROOT / part
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "_core*.so", ".pytest_cache")
                shutil.copytree(source, self.tree / part, ignore=ignored)
            elif source.exists():
                shutil.copy2(source, self.tree / part)
        # The tests must not take the package that is installed for the one under test.
        info = self.tree / "tgt_fast-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tgt-fast\nVersion: 0\n")
        (info / "RECORD").write_text("tgt_fast/__init__.py,,\n")

    @contextmanager
    def with_fault(self, fault: Fault) -> Iterator[None]:
        path = self.tree / fault.file
        text = path.read_text()
        if text.count(fault.old) != 1:
            raise SystemExit(f"{fault.file} has moved: {text.count(fault.old)} times {fault.old!r}")
        path.write_text(text.replace(fault.old, fault.new))
        try:
            yield
        finally:
            path.write_text(text)

    def build(self) -> None:
        """The core, for the least instruction set; only what has changed since the last time."""
        import pybind11

        csrc = self.tree / "csrc"
        sources = sorted(
            [*csrc.glob("cpu/*.cpp"), *(p for p in csrc.glob("bind/*.cpp") if p.name not in NOT_IN_THE_CORE)]
        )
        includes = [f"-I{csrc}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

        def compiled(source: Path) -> Path:
            command = [_compiler(), *FLAGS, *includes]
            if OF_AN_ISA.search(source.as_posix()):
                command.append("-DTGT_ISA=baseline")
            made = subprocess.run([*command, "-E", "-P", str(source)], capture_output=True, check=True).stdout
            to = self.objects / f"{hashlib.sha256(made).hexdigest()[:24]}.o"
            if not to.exists():
                subprocess.run([*command, "-c", str(source), "-o", f"{to}.new"], check=True)
                os.replace(f"{to}.new", to)
            return to

        with ThreadPoolExecutor(2) as pool:
            objects = [str(path) for path in pool.map(compiled, sources)]
        core = self.tree / "tgt_fast" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
        subprocess.run([_compiler(), "-shared", "-o", f"{core}.new", *objects, "-lpthread", "-ldl"], check=True)
        os.replace(f"{core}.new", core)

    def test(self, arguments: Sequence[str], *, full: bool) -> tuple[str | None, float]:
        """The name of the first test that fails, and how long it took."""
        options = ["-x", "-q", "-rf", "--no-header", "--tb=line", "-o", f"cache_dir={self.folder / 'cache'}"]
        log = self.folder / "log"
        began = time.monotonic()
        child = os.fork()  # with PyTorch imported, and nothing of ours
        if child == 0:
            self._test_here([*options, *arguments], full, log)
        status = self._wait(child)
        seconds = time.monotonic() - began
        said = log.read_text(errors="replace")
        if status is None:
            return f"nothing in {SECONDS} s", seconds
        if status == 0:
            return None, seconds
        found = re.search(r"^FAILED python_tests/(\S+::[^\n]*?)(?: - .*)?$", said, re.MULTILINE)
        if status == 1 and found:
            return found[1], seconds
        if status < 0:
            return f"signal {-status}", seconds
        raise SystemExit(f"pytest {' '.join(arguments)} ended with {status}:\n{said[-4000:]}")

    def _test_here(self, arguments: Sequence[str], full: bool, log: Path) -> None:
        """Runs the tests in this process, and ends it."""
        status = 99
        try:
            os.setpgid(0, 0)
            to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(to, 1)
            os.dup2(to, 2)
            os.environ |= {"PYTHONPATH": str(self.tree), "TGT_FAST_FULL_GRID": str(int(full)), "CI": "true"}
            os.chdir(self.tree)
            sys.path[:] = [str(self.tree), *(path for path in sys.path if path and Path(path) != HERE)]
            status = int(pytest.main(list(arguments)))
        finally:
            sys.stdout.flush()
            os._exit(status)

    def _wait(self, child: int) -> int | None:
        """Its status, the negative of a signal, or None where it has to be ended."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)  # what a test of a fault has started may have no end
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.1)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return None


def load_what_tests_need() -> None:
    """All that the tests import but our own: each child has it then."""
    ask = "import tgt_fast, hypothesis, pytest, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in done.stdout.split():
        if not name.startswith(("tgt_fast", "triton", "_", "tests")):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def _compiler() -> str:
    return os.environ.get("CXX") or shutil.which("c++") or "g++"


def entry(fault: Fault) -> dict[str, Any]:
    """The name of a fault in the table."""
    return {"kind": fault.kind, "file": fault.file, "old": fault.old, "new": fault.new}


def told(fault: Fault, found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return next((row for row in found if entry(fault).items() <= row.items()), None)


def seed(copy: Copy, fault: Fault) -> dict[str, Any]:
    arguments = [f"python_tests/test_{name}.py" for name in fault.tests.split()]
    # What hypothesis finds depends on chance, and on how long it makes its findings smaller.
    arguments += ["-k", ONLY[fault.backend], "-m", "not hypothesis"]
    with copy.with_fault(fault):
        if fault.backend == "native":
            copy.build()
        small, seconds = copy.test(arguments, full=False)
        full: str | None = None
        if small is None:
            full, more = copy.test(arguments, full=True)
            seconds += more
    return {**entry(fault), "small": small, "full": full, "seconds": round(seconds, 1)}


def page(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# Faults that the tests find", "",
        "Made by `python python_tests/seeded_faults.py`: each fault of `python_tests/faults.json` is seeded alone, and",
        "the tests run until one fails. The part of each grid that runs by default finds it, or the product, or none.",
        "",
        "| fault | file | the part | the product | first to fail |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        small, full = row["small"], row["small"] or row["full"]
        first = (full or "").partition("[")[0].replace("|", "\\|")
        lines.append(
            f"| {row['kind']} | `{row['file']}` | {'found' if small else '**missed**'} | "
            f"{'found' if full else '**missed**'} | `{first}` |"
        )
    found = sum(row["small"] is not None for row in rows)
    missed = sum(row["small"] is None and row["full"] is not None for row in rows)
    so_far = f"{len(rows)} of {len(FAULTS)} faults seeded: {found} found by the part, {missed} by the product alone."
    lines += ["", so_far, ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--all", action="store_true", help="also what the table has")
    parser.add_argument("--only", action="append", help="faults of files whose names hold this")
    parser.add_argument("--core", type=Path, help="a built core of the sources, where no fault is seeded in them")
    args = parser.parse_args()
    before = json.loads(TABLE.read_text()) if TABLE.exists() else []
    wanted = [f for f in FAULTS if args.only is None or any(part in f.file for part in args.only)]
    wanted = [f for f in wanted if args.all or (told(f, before) or {"small": None})["small"] is None]
    load_what_tests_need()
    copy = Copy(args.work)
    if args.core is None:
        copy.build()
    else:
        shutil.copy2(args.core, copy.tree / "tgt_fast")
    made: list[dict[str, Any]] = []
    for fault in wanted:
        row = seed(copy, fault)
        made.append(row)
        print(f"{row['seconds']:7} {row['file']}: {row['kind']}: {row['small']} / {row['full']}", flush=True)
        _write(made)
    if any(fault.backend == "native" for fault in wanted):
        copy.build()
    names = sorted({row[grid] for row in made for grid in ("small", "full") if "::" in (row[grid] or "")})
    if names:
        broken, _ = copy.test([f"python_tests/{name}" for name in names], full=True)
        if broken is not None:
            raise SystemExit(f"{broken} fails without a fault, too")
    rows = _write(made)
    bad = [row for row in rows if row["small"] is None]
    print(f"{len(rows)} of {len(FAULTS)} faults, {len(bad)} that the default part misses")
    return 1 if bad else 0


def _write(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table in the order of the faults, without those that are gone. Several of us may write it."""
    with (Path(tempfile.gettempdir()) / "seeded-faults.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = json.loads(TABLE.read_text()) if TABLE.exists() else []
        rows = [row for row in (told(f, made) or told(f, before) for f in FAULTS) if row is not None]
        TABLE.write_text(json.dumps(rows, indent=1) + "\n")
        PAGE.write_text(page(rows))
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
