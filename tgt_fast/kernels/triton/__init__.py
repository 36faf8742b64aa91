"""Triton kernels, for GPUs that the compiled core does not serve. Neither Triton nor a GPU is touched at import.

With ``TRITON_INTERPRET=1`` in the environment before Triton is imported, they run on CPU tensors, in Triton's
interpreter: slow, and the same arithmetic.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgt_fast.errors import BackendError
from tgt_fast.kernels.plain import not_plain
from tgt_fast.kernels.triton.tuning import MOST_CLASSES

_OLDEST = (7, 0)  # compute capability
_REGISTERS = 65536  # of a multiprocessor: a program that asks for more cannot be launched


class Kernels(NamedTuple):
    """The modules of the kernels, and what they run in."""

    distill: ModuleType
    finish: ModuleType
    latent: ModuleType
    tokens: ModuleType
    listwise: ModuleType
    adjusted: ModuleType
    adjusted_statistics: ModuleType
    interpreted: bool


def _wants_interpreter() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def load() -> Kernels | str:
    """The kernels, or the reason why they do not load. Imports Triton."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    try:
        language = importlib.import_module("triton.language")
        names = (
            "distill_kernels", "distill_finish", "latent_kernels", "tokens_kernels", "listwise_kernels",
            "adjusted_kernels", "adjusted_statistics",
        )  # fmt: skip
        modules = [importlib.import_module(f"tgt_fast.kernels.triton.{name}") for name in names]
    except Exception as error:  # a Triton that is broken, too old or built for another machine
        return f"Triton does not load ({type(error).__name__}: {error})"
    # What Triton's own functions are was settled when Triton was imported, maybe by somebody else.
    interpreted = "Interpreted" in type(language.sum).__name__
    if interpreted != ("Interpreted" in type(modules[0].distill_fwd_kernel).__name__):
        return "TRITON_INTERPRET changed after Triton was imported; set it before, or not at all"
    if interpreted:
        reason = interpreter_trouble(*(importlib.metadata.version(name) for name in ("triton", "numpy")))
        if reason is not None:
            return reason
    distill, finish, latent, tokens, listwise, adjusted, statistics = modules
    return Kernels(distill, finish, latent, tokens, listwise, adjusted, statistics, interpreted)


def interpreter_trouble(triton: str, numpy: str) -> str | None:
    """The reason why Triton's interpreter of this version cannot run with that NumPy; None when it can."""
    of_triton, of_numpy = (tuple(int(n) for n in re.findall(r"\d+", version)[:2]) for version in (triton, numpy))
    if of_triton == (3, 6) and of_numpy >= (2, 4):  # it takes a loop's bounds from arrays of one element
        return f"the interpreter of Triton {triton} cannot run loops with NumPy {numpy}; pip install 'numpy<2.4'"
    return None


def kernels() -> Kernels:
    """The kernels. Raises BackendError with the reason when they cannot be loaded."""
    loaded = load()
    if isinstance(loaded, str):
        raise BackendError(loaded)
    return loaded


def refusal(op: str, tensors: Sequence[Tensor]) -> str | None:
    """The reason why the Triton kernels cannot run ``op`` on ``tensors``; None when they can."""
    reason = not_plain(tensors)
    if reason is not None:
        return reason
    if op == "topk":
        return "there are no Triton kernels for top-k records"
    if op == "tokens":
        return "there is no Triton kernel that draws tokens"
    if op == "soft_embedding" and any(tensor.dtype == torch.float64 for tensor in tensors):
        return "there is no Triton kernel for a soft embedding in float64"
    device = tensors[0].device
    if device.type not in ("cuda", "cpu"):
        return f"Triton's kernels serve CUDA tensors, these are on {device}"
    if device.type == "cpu" and not _wants_interpreter():
        return "Triton needs a GPU; on CPU tensors its kernels run under TRITON_INTERPRET=1 alone, slowly"
    loaded = load()
    if isinstance(loaded, str):
        return loaded
    if device.type == "cpu" and not loaded.interpreted:
        return "Triton was imported without TRITON_INTERPRET=1, so it has no interpreter for CPU tensors"
    if device.type == "cuda" and loaded.interpreted:
        return "TRITON_INTERPRET=1 is set, so Triton's kernels run on CPU tensors alone"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < _OLDEST:
        return f"Triton needs a GPU of compute capability {_OLDEST[0]}.{_OLDEST[1]} or later"
    for tensor in tensors:
        if max(tensor.shape, default=0) > MOST_CLASSES:
            return f"a dimension of {max(tensor.shape)} exceeds {MOST_CLASSES}"
    return None


def status() -> tuple[bool, str, tuple[str, ...], str]:
    """(available, reason, devices, detail) for ``tgt_fast.backends()``. Imports Triton where it would be used."""
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed; pip install triton", (), ""
    detail = f"Triton {importlib.metadata.version('triton')}"
    if not _wants_interpreter() and not torch.cuda.is_available():
        return False, f"{detail}: torch finds no GPU", (), ""
    loaded = load()
    if isinstance(loaded, str):
        return False, loaded, (), ""
    if loaded.interpreted:
        return True, "", ("cpu",), f"{detail}, interpreted: for tests, by name only"
    if not torch.cuda.is_available():
        return False, f"{detail}: torch finds no GPU", (), ""
    return True, "", ("cuda",), f"{detail}, kernels compiled at first use"


@contextmanager
def _on_device(tensor: Tensor) -> Iterator[None]:
    with torch.cuda.device(tensor.device):
        yield


@contextmanager
def _in_interpreter(tensor: Tensor) -> Iterator[None]:
    import numpy

    with numpy.errstate(all="ignore"):  # NaN and infinities are part of the contract
        yield


def running_on(tensor: Tensor) -> Any:
    """A context in which kernels run where ``tensor`` lies."""
    return _in_interpreter(tensor) if kernels().interpreted else _on_device(tensor)


def planning_device(tensor: Tensor) -> torch.device | None:
    """The device to cut a call for; None in the interpreter."""
    return None if kernels().interpreted else tensor.device


def launch(
    kernel: Any, programs: int, *arguments: Any, warps: int, registers: int | None = None, **constants: Any
) -> None:
    """Starts ``programs`` programs. Products and sums are not contracted: a kernel's variants then give equal bits."""
    if registers is not None and torch.version.hip is None:
        constants["maxnreg"] = min(registers, _REGISTERS // (32 * warps))
    kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)


def two_floats(value: float) -> tuple[float, float]:
    """A number as two float32 whose sum has 48 of its bits: Triton passes a Python float as one float32."""
    high = _nearest_float(value)
    return high, _nearest_float(value - high) if abs(high) != float("inf") else 0.0


def _nearest_float(value: float) -> float:
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return float("inf") if value > 0 else -float("inf")
