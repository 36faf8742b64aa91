"""benchmarks/cuda_report.py: what it reads from the tools' output, and when it fails."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "cuda_report.py"

COMPILER = """\
ptxas info    : Compiling entry function 'hot' for 'sm_90'
ptxas info    : Function properties for hot
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 32 bytes smem
ptxas info    : Compiling entry function '_Z3fooIdEvv' for 'sm_90'
    32 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
"""
LIBRARY = """\
Fatbin elf code:
================
arch = sm_{arch}
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function hot:
  REG:80 STACK:{stack} SHARED:1024 LOCAL:0 CONSTANT[0]:804 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("cuda_report", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cuda_report", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("stack", "spill", "bad"), [(0, 0, False), (8, 0, True), (8, 4, True)])
def test_the_compilers_report(report: ModuleType, stack: int, spill: int, bad: bool) -> None:
    hot, _ = report.parse(COMPILER.format(stack=stack, spill=spill))
    assert (hot.name, hot.architecture, hot.registers, hot.shared_bytes) == ("hot", "sm_90", 80, 32)
    assert (hot.stack_bytes, hot.spill_bytes) == (stack, 2 * spill)
    assert hot.bad == bad


def test_float64_may_spill(report: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        report, "demangle", lambda names: ["kernel<double>" if "Id" in name else name for name in names]
    )
    _, cold = report.parse(COMPILER.format(stack=0, spill=0))
    assert cold.stack_bytes == 32
    assert not cold.hot
    assert not cold.bad


def test_a_librarys_kernels_carry_their_architecture(report: ModuleType) -> None:
    text = LIBRARY.format(arch="80", stack=0) + LIBRARY.format(arch="120", stack=16)
    first, second = report.parse_usage(text)
    assert (first.architecture, first.registers, first.bad) == ("sm_80", 80, False)
    assert (second.architecture, second.stack_bytes, second.bad) == ("sm_120", 16, True)


def test_an_enumerator_in_a_name_is_a_number(report: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "void tgt::cuda::device::(anonymous namespace)::kernel<float, (tgt::cuda::device::Draw)1, (bool)0>(int)\n"
    monkeypatch.setattr(report, "find_tool", lambda name: name)
    monkeypatch.setattr(report.subprocess, "run", lambda *_, **__: report.subprocess.CompletedProcess([], 0, said))
    assert report.demangle(["_Z"]) == ["kernel<float, 1, 0>"]


def test_a_library_without_device_code_is_no_success(report: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "of_library", lambda library, jobs: [])
    monkeypatch.setattr(sys, "argv", ["cuda_report.py", "some.so"])
    assert report.main() == 3


def test_the_flags_are_those_of_the_build(report: ModuleType) -> None:
    assert {"--fmad=false", "-DTGT_ISA=device"} <= set(report.flags())
    assert "cmake/cuda_flags.txt" in (SCRIPT.parents[1] / "CMakeLists.txt").read_text()


@pytest.fixture
def kept(report: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkout of its own, with a compiler that says its version, and a built library without bad kernels."""
    for folder in ("csrc/common", "csrc/cuda", "cmake", "results"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("csrc/common/a.h", "csrc/cuda/b.cu", "cmake/cuda_flags.txt", "cmake/cuda_architectures.cmake"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report.compiled, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "find_tool", lambda name: name)
    monkeypatch.setattr(report, "version", lambda nvcc: "release 1")
    kernels = [
        report.Kernel("sm_90", "hot", 80, 0, 0, 0, True),
        report.Kernel("sm_90", "cold<double", 9, 0, 8, 0, False),
    ]
    monkeypatch.setattr(report, "of_library", lambda library, jobs: kernels)
    return tmp_path


def run(report: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["cuda_report.py", *arguments])
    return int(report.main())


def test_what_is_unchanged_since_the_report_is_known(
    report: ModuleType, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(report, monkeypatch, "--known") == 1
    assert run(report, monkeypatch, "some.so", "--save") == 0
    assert run(report, monkeypatch, "--known") == 0
    for name in ("csrc/common/a.h", "csrc/cuda/b.cu", "cmake/cuda_flags.txt"):
        (kept / name).write_text("2")
        assert run(report, monkeypatch, "--known") == 1, name
        (kept / name).write_text("1")
    (kept / "csrc" / "cuda" / "new.cu").write_text("")
    assert run(report, monkeypatch, "--known") == 1
    (kept / "csrc" / "cuda" / "new.cu").unlink()
    assert run(report, monkeypatch, "--known") == 0
    monkeypatch.setattr(report, "version", lambda nvcc: "release 2")
    assert run(report, monkeypatch, "--known") == 1


def test_a_report_of_bad_kernels_is_none(report: ModuleType, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [report.Kernel("sm_90", "hot", 80, 0, 16, 0, True)]
    monkeypatch.setattr(report, "of_library", lambda library, jobs: bad)
    assert run(report, monkeypatch, "some.so", "--save") == 1
    assert run(report, monkeypatch, "--known") == 1
