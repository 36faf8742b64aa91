"""Argument checks that several ops share: each names the op and the offending values.

PyTorch's own kernels and ours read where a tensor points. A tensor whose storage was freed points nowhere, and to read
it is a segmentation fault; one that is sparse, quantised or nested holds other things than its numbers.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, Final, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from tgt_fast.errors import ArgumentError, BackendError, DeviceError, DTypeError
from tgt_fast.kernels.plain import PLAIN

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


_STRIDED: Final = torch.strided
_traced = torch.compiler.is_dynamo_compiling  # the cheaper question: what other tracers hand on is not PLAIN
_WITHOUT_DISPATCH: Final = torch._C._disabled_torch_dispatch_impl


def readable(op: str, name: str, tensor: object) -> Tensor:
    """``tensor`` if it is a dense tensor that has memory, or one that is traced; else DTypeError or ArgumentError."""
    if type(tensor) in PLAIN and not tensor.is_quantized and has_memory(tensor):  # type: ignore[attr-defined, arg-type]
        return tensor  # type: ignore[return-value]
    if not isinstance(tensor, Tensor):
        raise DTypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    _check_dense(op, name, tensor)
    # Fake, functional and wrapping tensors need none: what they are made of is looked at where it is used.
    if type(tensor).__torch_dispatch__ is _WITHOUT_DISPATCH and not has_memory(tensor):
        _refuse(op, name, tensor)
    return tensor


def has_memory(tensor: Tensor) -> bool:
    """True if all elements lie inside a storage that has an address; False where that cannot be told, too.

    This runs for each argument of each call, so it asks for what costs least: a sparse tensor has no storage to ask.
    """
    if _traced():
        return tensor.layout is _STRIDED and not tensor.is_nested
    try:
        storage = tensor.untyped_storage()
        needed = tensor.nbytes if tensor.is_contiguous() and not tensor.storage_offset() else _end(tensor)
        return storage.nbytes() >= needed and (storage.data_ptr() != 0 or needed == 0) and not tensor.is_nested
    except RuntimeError:  # wrappers of function transforms, and zeros that nothing was allocated for
        return False


def all_readable(op: str, /, **tensors: Any) -> None:
    """The same of several, of which those that are no tensors are passed over."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            readable(op, name, tensor)


def upstream(op: str, gradient: Tensor) -> Tensor:
    """A gradient that autograd hands in, with memory: zeros that stand for themselves are made."""
    if type(gradient) in PLAIN and has_memory(gradient):
        return gradient
    if not _traced() and gradient._is_zerotensor():
        return gradient.clone()
    return readable(op, "the gradient of the result", gradient)


def _end(tensor: Tensor) -> Any:
    """The number of bytes of the storage that the elements reach into."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.storage_offset() + last + 1) * tensor.element_size()


def _refuse(op: str, name: str, tensor: Tensor) -> None:
    """The error for a tensor without memory, unless it is one that needs none."""
    if tensor.is_meta:
        return
    if tensor._is_zerotensor():
        raise ArgumentError(f"{op}: {name} stands for zeros without having memory; pass {name}.clone()")
    if torch._C._are_functorch_transforms_active():
        return
    if tensor.device.type not in ("cpu", "cuda"):
        return  # whose tensors need not have an address
    try:
        size = tensor.untyped_storage().nbytes()
    except NotImplementedError:
        raise BackendError(
            f"{op}: {name} is a batch inside vmap, as of torch.autograd.functional.jacobian(vectorize=True) or "
            "torch.autograd.grad(is_grads_batched=True), which compiled code does not see; pass backend='reference', "
            "or vectorize=False"
        ) from None
    raise ArgumentError(
        f"{op}: the memory of {name} was freed: its storage holds {size} bytes of the {_end(tensor)} that shape "
        f"{tuple(tensor.shape)} needs, as between uses under FSDP or offloading; call {op} where {name} is gathered, "
        "or pass a copy that was made there"
    )


def _check_dense(op: str, name: str, tensor: Tensor) -> None:
    """DTypeError unless a tensor behaves as a dense one."""
    kind = type(tensor).__name__
    if isinstance(tensor, (UninitializedBuffer, UninitializedParameter)):
        raise ArgumentError(f"{op}: {name} is of a lazy module that has not run yet; run it once before")
    if kind == "DTensor":
        raise DTypeError(
            f"{op}: {name} is a DTensor, which no backend takes; call the loss inside the wrapped forward, where "
            f"parameters are gathered, or pass {name}.full_tensor(grad_placements=[Partial('avg')]) with Partial of "
            "torch.distributed.tensor; full_tensor() or to_local() alone gives gradients of another scale"
        )
    if tensor.is_nested:
        _no(op, name, "nested", "torch.nested.to_padded_tensor and sample_weight=0 (or an ignored target) there")
    if tensor.is_quantized:
        _no(op, name, f"quantised ({tensor.dtype})", f"{name}.dequantize()")
    if tensor.layout is not _STRIDED:
        layout = str(tensor.layout).removeprefix("torch.").lstrip("_")
        _no(op, name, layout, f"{name}.to_dense()")
    if kind == "MaskedTensor":
        _no(
            op, name, "masked", f"{name}.to_tensor(value), and sample_weight=0 (or an ignored target) for rows left out"
        )
    if hasattr(tensor, "dequantize") and "Quantized" in kind:  # of torchao and the like
        _no(op, name, f"quantised ({kind})", f"{name}.dequantize()")


def _no(op: str, name: str, kind: str, remedy: str) -> NoReturn:
    raise DTypeError(f"{op}: {name} must be a dense tensor, got a {kind} one; pass {remedy}")
