"""Argument checks that several ops share: each names the op and the offending values."""

from __future__ import annotations

import math
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, BackendError, DeviceError, DTypeError
from tgt_fast.kernels.plain import PLAIN
from tgt_fast.ops._readable import has_memory, readable

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def refuse_tracing(op: str) -> None:
    """BackendError inside ``torch.jit.trace``: it sees none of the compiled kernels, and keeps numbers for formulas."""
    if torch._C._get_tracing_state() is not None:
        raise BackendError(
            f"{op}: torch.jit.trace records what one call computes, and would give wrong numbers for other inputs; use "
            "torch.export or torch.compile, which know this op, or leave it out of what is traced"
        )


def number(
    op: str, name: str, value: object, low: float, high: float, *, open_low: bool = False, late: bool = False
) -> float:
    """``value`` as a finite float in [low, high], or (low, high] with ``open_low``; else ArgumentError.

    With ``late`` a 0-d tensor is a number, too. It is read, which waits for a device, but not while compiling: then it
    comes back as a float64 tensor on the CPU, and whoever reads it checks it (see :mod:`tgt_fast.kernels.late`).
    """
    if late and isinstance(value, Tensor):
        if real(op, name, value).dim() or value.dtype == torch.bool:
            raise ArgumentError(
                f"{op}: {name} must be a number or a 0-d tensor, got {value.dtype} {tuple(value.shape)}"
            )
        if torch.compiler.is_compiling():
            return value.detach().to("cpu", torch.float64)  # type: ignore[return-value]
        value = float(value.item())
    if type(value) is float:  # most are, and the question below takes ten times as long
        result = value
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentError(
            f"{op}: {name} must be a number, got {'a tensor' if isinstance(value, Tensor) else repr(value)}"
        )
    else:
        try:
            result = float(value)
        except OverflowError:
            result = math.inf
    inside = low < result <= high if open_low else low <= result <= high
    if not inside:  # the bounds are finite, and NaN is inside nothing
        bracket = "(" if open_low else "["
        raise ArgumentError(f"{op}: {name} must be finite and in {bracket}{low:g}, {high:g}], got {value!r}")
    return result


def integer(op: str, name: str, value: object, low: int, high: int) -> int:
    """``value`` as an int in [low, high); else ArgumentError."""
    if type(value) is int:
        result = value
    elif isinstance(value, bool) or not isinstance(value, Integral):
        raise ArgumentError(f"{op}: {name} must be an integer, got {value!r}")
    else:
        result = int(value)
    if not low <= result < high:
        raise ArgumentError(f"{op}: {name} must be in [{low}, {high}), got {result}")
    return result


def flag(op: str, name: str, value: object) -> bool:
    """``value`` if it is one, or a number that stands for one; else ArgumentError."""
    if type(value) is bool:
        return value
    if not isinstance(value, (Integral, np.bool_)) or value not in (0, 1):
        raise ArgumentError(f"{op}: {name} must be True or False, got {value!r}")
    return bool(value)


def choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> str:
    """``value`` if it is one of ``choices``; else ArgumentError."""
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{op}: {name} must be one of {choices}, got {value!r}")
    return str(value)


def floating(op: str, name: str, tensor: object) -> Tensor:
    """``tensor`` if it is a dense floating-point tensor of a dtype the ops take; else DTypeError or ArgumentError."""
    if type(tensor) in PLAIN and tensor.dtype in FLOATING and has_memory(tensor):  # type: ignore[attr-defined, arg-type]
        return tensor  # type: ignore[return-value]
    checked = readable(op, name, tensor)
    if checked.dtype not in FLOATING:
        eight = checked.dtype.is_floating_point and checked.dtype.itemsize == 1
        remedy = f"; pass {name}.to(torch.bfloat16), times its scale if it has one" if eight else ""
        raise DTypeError(f"{op}: {name} must be float64, float32, bfloat16 or float16, got {checked.dtype}{remedy}")
    return checked


def real(op: str, name: str, tensor: object) -> Tensor:
    """``tensor`` if it is a tensor of real numbers that asks for no gradient; else DTypeError or ArgumentError."""
    checked = readable(op, name, tensor)
    if checked.is_complex():
        raise DTypeError(f"{op}: {name} must hold real numbers, got {checked.dtype}")
    if checked.requires_grad:
        raise ArgumentError(f"{op}: {name} requires grad, but the result is not differentiable in it; detach it")
    return checked


def integers(op: str, name: str, tensor: object, kind: str = "integers") -> Tensor:
    """``tensor`` if it is a dense tensor of integers; else DTypeError or ArgumentError."""
    checked = readable(op, name, tensor)
    if checked.is_floating_point() or checked.is_complex() or checked.dtype == torch.bool:
        raise DTypeError(f"{op}: {name} must hold {kind}, got {checked.dtype}")
    return checked


def finite_from(op: str, name: str, tensor: Tensor, low: float) -> None:
    """On a CPU, where looking at values costs no synchronisation: ArgumentError unless all are finite and >= low."""
    if not on_plain_cpu(tensor) or not tensor.numel():
        return
    least, most = (float(bound) for bound in tensor.aminmax())
    if not (low <= least and most < math.inf):  # NaN fails, too
        raise ArgumentError(f"{op}: {name} must be finite and >= {low:g}, got values from {least:g} to {most:g}")


def same_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """DeviceError unless both tensors are on one device."""
    if not (tensor.is_cpu and other.is_cpu) and tensor.device != other.device:  # devices cost more to compare
        raise DeviceError(f"{op}: {name} is on {tensor.device}, {other_name} on {other.device}")


def on_plain_cpu(tensor: Tensor) -> bool:
    """True if values may be looked at: a CPU tensor with data, outside transforms and compilation."""
    return (
        tensor.is_cpu
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not isinstance(tensor, torch._subclasses.FakeTensor)
    )
