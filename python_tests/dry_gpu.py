"""Triton's real launch path without a GPU: a driver that compiles for sm_90, loads and starts nothing.

``tensors_on_a_dry_gpu()`` makes the Triton backend take CPU tensors, and tensors on "meta" for shapes that no memory
holds, to be on a GPU. Arguments are specialised and kernels compiled as there, down to machine code; what the driver
would refuse (a grid, shared memory, registers) is refused. Outputs keep whatever was in their memory.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tgt_fast.kernels import triton as backend

CAPABILITY = (9, 0)
SHARED = 227 << 10  # bytes a block may have
REGISTERS = 65536  # of a multiprocessor
_MOST_PROGRAMS = 2**31 - 1


class OnAGpu:
    """Answers to a backend's refusal, as of a tensor on a GPU."""

    def __init__(self, tensor: Tensor) -> None:
        self.device, self.layout = torch.device("cuda"), tensor.layout
        self.dtype, self.shape = tensor.dtype, tensor.shape


class _Utils:
    """Loads machine code as far as it can be without a chip: what it takes of one is looked at."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": REGISTERS}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """(module, function, registers a thread, bytes spilled, threads a block may have)."""
        if not binary:
            return object(), name, 0, 0, 1024
        registers, spilled = resources(binary)
        of_a_warp = 256 * -(-registers * 32 // 256)
        return object(), name, registers, spilled, min(1024, 32 * (REGISTERS // of_a_warp))

    def unload_module(self, module: Any) -> None:
        pass


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack) of machine code."""
    triton = importlib.import_module("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, report
    return int(found[1]), int(found[2])


def driver(launches: Counter[str]) -> Any:
    """A driver for Triton, which counts the launches of every kernel."""
    base = importlib.import_module("triton.backends.driver").DriverBase
    target = importlib.import_module("triton.backends.compiler").GPUTarget(
        "cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32
    )

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self._name, self._parameters = source.fn.__name__, len(source.fn.arg_names)

        def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            arguments = rest[4:]  # before them: the metadata, twice, and hooks
            if not 1 <= x * y * z <= _MOST_PROGRAMS:
                raise ValueError(f"{self._name}: {x} x {y} x {z} programs")
            if len(arguments) != self._parameters:
                raise TypeError(f"{self._name}: {len(arguments)} arguments of {self._parameters}")
            launches[self._name] += 1

    class Driver(base):  # type: ignore[misc]
        utils = _Utils()
        launcher_cls = Launcher

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return str(importlib.import_module("triton.backends.nvidia.driver").ty_to_cpp(ty))

        def get_current_target(self) -> Any:
            return target

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_device_capability(self, device: int = 0) -> tuple[int, int]:
            return CAPABILITY

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    return Driver()


@contextmanager
def tensors_on_a_dry_gpu() -> Iterator[Counter[str]]:
    """Within it the Triton backend serves tensors as a GPU's. Yields how often each kernel was launched."""
    ask = backend.refusal
    launches: Counter[str] = Counter()

    def refusal(op: str, tensors: Sequence[Tensor]) -> str | None:
        gpus: Any = [OnAGpu(tensor) for tensor in tensors]
        with mock.patch.object(backend, "not_plain", return_value=None):
            return ask(op, gpus)

    config = importlib.import_module("triton.runtime").driver
    before = config._active
    config.set_active(driver(launches))
    try:
        with (
            mock.patch.object(backend, "refusal", refusal),
            mock.patch.object(backend, "_on_device", return_value=nullcontext()),
            mock.patch.object(torch.cuda, "get_device_capability", return_value=CAPABILITY),
            mock.patch.object(torch.cuda, "get_device_name", return_value="dry"),
        ):
            yield launches
    finally:
        config._active = before


@contextmanager
def no_machine_code() -> Iterator[None]:
    """Within it kernels are compiled as far as Triton's own code for a GPU, which takes a third of the time."""
    knobs = importlib.import_module("triton").knobs.runtime

    def cut(*given: Any) -> Any:
        if not given:  # asked for what tells its work from that of others
            return "no machine code", "no machine code"

        def nothing(source: Any, metadata: dict[str, Any]) -> bytes:
            metadata |= {"name": "", "shared": 0, "tmem_size": 0}
            for kind in ("global", "profile"):
                metadata |= {f"{kind}_scratch_size": 0, f"{kind}_scratch_align": 1}
            return b""

        stages = given[1]
        del stages["llir"], stages["ptx"]
        stages["cubin"] = nothing
        return None

    with mock.patch.object(knobs, "add_stages_inspection_hook", cut):
        yield
