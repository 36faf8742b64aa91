"""The CUDA kernels without a GPU: their sources compiled for the host against an emulation of a device (csrc/emulator).

``tensors_on_an_emulated_gpu()`` makes the native backend run them on CPU tensors, through the code that serves CUDA
tensors. Built to look for races, it notes each access of a kernel that no barrier orders behind another thread's. What
the emulation cannot show: instructions of the chip itself, and timing.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from tgt_fast.kernels.native import cuda

CSRC = Path(__file__).parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
# A cache of compiled files, where there is one, finds those of another checkout, too: paths within it are relative.
LAUNCHER = () if (ccache := shutil.which("ccache")) is None else (ccache,)
CCACHE = {"CCACHE_BASEDIR": str(CSRC.parent), "CCACHE_NOHASHDIR": "1"}
FLAGS = (
    "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DTGT_EMULATED_GPU", "-DTGT_ISA=emulated", f"-I{CSRC}",
)  # fmt: skip


def why_not() -> str:
    """Why the emulation cannot be built here; empty when it can."""
    if COMPILER is None:
        return "no C++ compiler"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return "" if CSRC.is_dir() else f"no sources at {CSRC}"


# To look for races: csrc/emulator/races.cpp is what the compiler then calls at each access.
OF_KERNELS = ("-fsanitize=thread",)
OF_THE_MODULE = ("-DTGT_LOOK_FOR_RACES",)


def build(cache: Path, races: bool = False) -> ModuleType:
    """The module of the emulated kernels, compiled once for each state of the sources; both share what is no kernel.

    With ``races`` its function of that name says, a line each, which of their accesses no barrier orders; much slower.
    """
    import pybind11

    name = "_emulated_gpu_races" if races else "_emulated_gpu"
    sources = sorted([*CSRC.glob("cuda/*.cu"), *CSRC.glob("emulator/*.cpp"), CSRC / "bind" / "cuda.cpp"])
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    folders = (CSRC / name for name in ("bind", "common", "cuda", "emulator"))
    everything = sorted(path for folder in folders for path in folder.iterdir())
    digest = hashlib.sha256(repr((COMPILER, FLAGS, pybind11.__version__, suffix)).encode())
    for path in everything:
        digest.update(path.read_bytes())
    library = cache / digest.hexdigest()[:16] / f"{name}{suffix}"
    library.parent.mkdir(parents=True, exist_ok=True)
    with _locked(library.parent / "lock"):
        if not library.exists():
            _compile(library, sources, races)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """For one process at a time: of several that run tests side by side, the first compiles and the others wait."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system gives it back when a process dies
        yield


def _compile(library: Path, sources: list[Path], races: bool) -> None:
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

    def compile_one(source: Path) -> Path:
        to = library.parent / f"{source.name}.o"
        more: tuple[str, ...] = ()
        if races:
            more = OF_KERNELS if source.suffix == ".cu" else OF_THE_MODULE if source.name == "module.cpp" else ()
        if more:
            to = to.with_suffix(".races.o")
        if not to.exists():
            made = [*FLAGS, *more, *includes, "-x", "c++", "-c", str(source), "-o", f"{to}.new"]
            _run([*LAUNCHER, str(COMPILER), *made])
            os.replace(f"{to}.new", to)
        return to

    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compile_one, sources)]
    _run([str(COMPILER), "-shared", "-o", f"{library}.new", *objects])
    os.replace(f"{library}.new", library)  # whole or not at all


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=CSRC.parent, env={**CCACHE, **os.environ}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


@contextmanager
def tensors_on_an_emulated_gpu(module: ModuleType) -> Iterator[None]:
    """Within it the native backend takes CPU tensors to be on a device."""

    @contextmanager
    def current(tensor: Tensor) -> Iterator[int]:
        yield 0

    found: Any = cuda.Engine(module, current)
    before = cuda.engine
    cuda.engine = lambda tensor: found
    try:
        yield
    finally:
        cuda.engine = before
