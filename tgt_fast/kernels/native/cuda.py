"""The CUDA side of the compiled core: whether it can run on a tensor's device, and on which stream.

Nothing here touches a GPU before a tensor that lies on one asks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgt_fast.kernels.native import core


class Engine(NamedTuple):
    """The module that runs the kernels of a tensor's device."""

    core: Any  # the module with the cuda_* functions
    current: Callable[[Tensor], AbstractContextManager[int]]  # makes the device current and gives its stream's handle


@contextmanager
def _current(tensor: Tensor) -> Iterator[int]:
    with torch.cuda.device(tensor.device):
        core().cuda_set_device(tensor.device.index)  # its CUDA runtime is not torch's
        yield torch.cuda.current_stream(tensor.device).cuda_stream


def engine(tensor: Tensor) -> Engine | None:
    """The engine of ``tensor``'s device; None for a CPU."""
    return Engine(core(), _current) if tensor.is_cuda else None


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """True if code for ``architectures``, a CMake list such as ``"80-real;90"``, runs on a chip of ``capability``.

    Machine code (``-real``) serves later minors of its major; PTX (``-virtual``) serves everything later; no suffix is
    both. Code with an ``a`` or ``f`` behind its number serves that number alone.

    >>> covers("80-real;90", (8, 6)), covers("80-real;90", (12, 0)), covers("80-real;90-real", (12, 0))
    (True, True, False)
    """
    for entry in architectures.split(";"):
        number, _, kind = entry.partition("-")
        if not number:
            continue
        specific = not number.isdigit()
        digits = number.rstrip("af")
        built = (int(digits[:-1]), int(digits[-1]))
        if specific:
            if built == capability:
                return True
            continue
        if kind != "virtual" and built[0] == capability[0] and built[1] <= capability[1]:
            return True
        if kind != "real" and built <= capability:
            return True
    return False


@functools.cache
def _driver_problem() -> str:
    return str(core().cuda_device_problem())


@functools.cache
def refusal(device: torch.device) -> str | None:
    """Why the core has no kernels for this device; None when it has."""
    info = core().build_info()
    if not info["cuda"]:
        return (
            f"this core was built for the CPU alone, the tensors are on {device}; "
            "reinstall tgt-fast with nvcc on the PATH, or TGT_CUDA=ON to be told why not"
        )
    problem = _driver_problem()
    if problem:
        return f"built for CUDA {info['cuda']}, but its runtime finds no device: {problem}; check the driver"
    major, minor = capability = torch.cuda.get_device_capability(device)
    if not covers(info["cuda_architectures"], capability):
        return (
            f"built for CUDA {info['cuda']} and architectures {info['cuda_architectures']}, but {device} is of compute "
            f"capability {major}.{minor}; reinstall with CUDAARCHS={major}{minor}"
        )
    return None


def status() -> str:
    """Why no CUDA device can run the core's kernels in this process; empty when one can."""
    info = core().build_info()
    if not info["cuda"]:
        return "built without CUDA"
    if _driver_problem():
        return _driver_problem()
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"
