"""The host side of tests on a GPU that need more than Triton's kernels, on stand-ins for one.

That they collect, that what they call exists and takes their arguments, and that their expectations hold where nothing
but a GPU's own work is replaced. test_triton_launch.py has the tests that launch Triton's kernels; those of the native
kernels run on an emulated device as they are.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import dry_gpu_tests
import pytest
import test_bench
import test_compile
import test_registration
import torch
from emulated_gpu import tensors_on_an_emulated_gpu
from gpu_stand_ins import a_gpu_that_is_the_host

from tgt_fast import testing
from tgt_fast.bench import command, contrast, device, distill, latent, linear, timing, tokens, topk
from tgt_fast.bench import run as running
from tgt_fast.kernels import select

HERE = Path(__file__).parent
# Streams, threads, a second device, memory and sizes beyond what a host has are what it is about, and the core launches
# on real pointers. Its kernels and layouts run on an emulated device in test_cuda_kernels.py and test_gpu_calls.py.
NEED_A_DEVICE = {"test_cuda.py"}


@pytest.fixture
def host() -> Iterator[str]:
    """A device of tests that ask for a GPU's."""
    with a_gpu_that_is_the_host():
        yield "cuda"


@pytest.mark.once("torch.compile")
def test_opcheck_of_the_native_kernels(native: str, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls of each op: test_registration.py has the others, on the CPU."""
    every = testing.op_samples

    def few(*given: Any, **options: Any) -> list[test_registration.Sample]:
        # The core's listwise loss is for CPUs: what is left out for a GPU is asked of the host here.
        samples = [sample for sample in every(*given, **options) if "listwise" not in str(sample[0])]
        ends = ({str(sample[0]): sample for sample in order} for order in (samples, samples[::-1]))
        return [sample for end in ends for sample in end.values()]

    monkeypatch.setattr(testing, "op_samples", few)
    with tensors_on_an_emulated_gpu(emulated):
        test_registration.test_opcheck_on_a_gpu("cpu", native)


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it what is compiled is traced and run; the code that a GPU runs could not be."""
    plain = torch.compile

    def traced(function: Any, *, fullgraph: bool, dynamic: bool | None = None, **other: Any) -> Any:
        assert set(other) <= {"backend", "options"}
        return plain(function, fullgraph=fullgraph, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.once("torch.compile")
@pytest.mark.usefixtures("no_code")
def test_a_compiled_training_step() -> None:
    test_compile.test_a_training_step_on_a_gpu("cpu", "random")  # the other mode's: test_compile.py


@pytest.mark.once("torch.compile")
@pytest.mark.usefixtures("no_code")
def test_a_compiled_exploration() -> None:
    test_compile.test_a_compiled_exploration_on_a_gpu_replays_with_fresh_noise("cpu")


@pytest.mark.usefixtures("host")
def test_a_captured_sampler() -> None:
    test_compile.test_a_captured_sampler_draws_fresh_noise_at_each_replay("cpu")


@pytest.mark.once("host side of tests on a GPU")
@pytest.mark.usefixtures("host")
def test_the_bench_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases for a GPU, of a size for the host."""
    for noun in (contrast, linear, topk, tokens):
        monkeypatch.setattr(noun, "_CUDA_QUICK", noun._CPU_QUICK)  # type: ignore[attr-defined]
    monkeypatch.setattr(distill, "_CUDA_QUICK", test_bench.TINY)
    monkeypatch.setattr(latent, "_CUDA_BYTES", 1 << 16)
    found = types.SimpleNamespace(is_available=lambda: True, current_device=lambda: 0)
    monkeypatch.setattr(device, "torch", types.SimpleNamespace(cuda=found, device=torch.device))
    monkeypatch.setattr(command, "copy_rate", lambda device: 1e10)
    monkeypatch.setattr(running.gc, "collect", lambda: 0)
    monkeypatch.setattr(timing, "_UNTOLD_CACHE", 1 << 10)
    monkeypatch.setattr(timing, "_LEAST_FLUSHED", 1 << 10)
    monkeypatch.setitem(select.ORDER, "cuda", ("native", "reference"))  # Triton's have a dry run of their own
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # there is not work for more
    test_bench.test_the_command_on_a_gpu(tmp_path)
    torch.set_num_threads(threads)


def marked(path: Path) -> set[str]:
    """The tests of a file that are on a GPU in all of their forms."""
    tree = ast.parse(path.read_text())
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    whole = "pytestmark" in assigned and "mark.gpu" in ast.unparse(assigned["pytestmark"])
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if whole or any(ast.unparse(mark) == "pytest.mark.gpu" for mark in node.decorator_list)
    }  # fmt: skip


def test_no_test_on_a_gpu_is_forgotten() -> None:
    """Each has its host side run here or by dry_gpu_tests.py."""
    here = (HERE / "test_gpu_tests_host.py").read_text()
    dry: list[Callable[..., Any]] = dry_gpu_tests.tests(full=True)
    launched = {test.__name__ for test in dry}
    files = [path for path in HERE.glob("test_*.py") if path.name not in NEED_A_DEVICE]
    every = {name for path in files for name in marked(path)}
    assert len(every) > 12
    assert {name for name in every - launched if f".{name}(" not in here} == set()
