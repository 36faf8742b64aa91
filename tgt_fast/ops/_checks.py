"""Argument checks that several ops share, first of what tensors are, then of what they hold: each names the op and the
offending values.

PyTorch's own kernels and ours read where a tensor points. A tensor whose storage was freed points nowhere, and to read
it is a segmentation fault; one that is sparse, quantised or nested holds other things than its numbers.
"""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import Any, Final, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from tgt_fast.errors import ArgumentError, BackendError, DeviceError, DTypeError
from tgt_fast.kernels.calls import is_soft, labels_of
from tgt_fast.kernels.options import DistillOptions, TopK
from tgt_fast.kernels.plain import PLAIN
from tgt_fast.kernels.row_checks import bad_id, bad_share, bad_target, bad_weight, find_bad_id

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGE: Final = 1e30  # of numbers whose products shall stay finite in double precision
# Log-probabilities rounded to 8 bits of mantissa may add up to a little more than 1, and none of them is above 0.
_MASS: Final = 1.1
_ABOVE: Final = 0.01
_BELOW: Final = 0.1  # what the same rounding takes from the largest, in nats
_REMEDY: Final = "topk_teacher(logits, k, temperature) makes a record from logits"


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


# What needs the data of the rows: labels, weights, and the ids and log-probabilities of a record


def check_row_values(
    op: str, classes: int, target: Tensor | None, sample_weight: Tensor | None, options: DistillOptions
) -> None:
    if sample_weight is not None and not sample_weight.is_floating_point():
        sample_weight = sample_weight.to(torch.float64)  # not every kind of integer can be compared
    if sample_weight is not None and not bool(((sample_weight >= 0) & sample_weight.isfinite()).all()):
        row = int((~((sample_weight >= 0) & sample_weight.isfinite())).nonzero()[0])
        raise ArgumentError(bad_weight(row, float(sample_weight[row]), op))
    if target is not None and is_soft(target):
        fine = (target >= 0).all(-1)
        if sample_weight is not None:
            fine |= sample_weight == 0
        if not bool(fine.all()):
            row = int((~fine).nonzero()[0])
            raise ArgumentError(bad_share(row, target[row], op))
    elif target is not None:
        fine = (target >= 0) & (target < classes)
        fine |= (target == options.ignore_index) | (target == options.unlabeled_index)
        if sample_weight is not None:
            fine |= sample_weight == 0
        if not bool(fine.all()):
            row = int((~fine).nonzero()[0])
            raise ArgumentError(bad_target(row, int(target[row]), classes, options, op))


def check_ids(
    op: str, topk: TopK, classes: int, target: Tensor | None, sample_weight: Tensor | None, options: DistillOptions
) -> None:
    """That the rows that count list classes that exist, each once."""
    if options.soft_weight == 0:
        return
    found = find_bad_id(topk.ids, topk.log_probs, classes, counted_rows(target, sample_weight, options))
    if found is not None:
        raise ArgumentError(bad_id(op, topk.ids, *found, classes))


def check_entries(
    op: str, topk: TopK, target: Tensor | None, sample_weight: Tensor | None, options: DistillOptions
) -> None:
    """On a CPU: that the rows that count hold log-probabilities."""
    if options.soft_weight > 0 and on_plain_cpu(topk.log_probs):
        check_log_probs(op, topk.log_probs, counted_rows(target, sample_weight, options))


def counted_rows(target: Tensor | None, sample_weight: Tensor | None, options: DistillOptions) -> Tensor | None:
    """The rows that enter the loss, bool [N]; None: all."""
    target = labels_of(target)
    counted = None if target is None else target != options.ignore_index
    if sample_weight is not None:
        weighed = sample_weight != 0
        counted = weighed if counted is None else counted & weighed
    return counted


def check_log_probs(op: str, log_probs: Tensor, counted: Tensor | None) -> None:
    """That the entries of each row can be log-probabilities.

    [N, k], [N] bool (the rows that are looked at)

    Raises:
        ArgumentError: they cannot, with row and value, and what they seem to be.
    """
    values = log_probs.detach()
    values = values if values.dtype == torch.float64 else values.to(torch.float32)
    top = values.amax(-1)
    bad = ((values.exp().sum(-1) > _MASS) | (top > _ABOVE)) & (top < math.inf)  # NaN and +inf make a loss of NaN
    if not bool(bad.any()):
        return
    bad = bad if counted is None else bad & counted
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0])
    given = values[bad]
    given = given[given > -math.inf]
    if bool(((given >= 0) & (given <= 1)).all()):
        found = "they seem to be probabilities: pass their log()"
    else:
        found = f"are they logits? Pass log_softmax(logits / temperature) of all classes at the listed ids; {_REMEDY}"
    first = ", ".join(f"{value:g}" for value in values[row, :4].tolist()) + (", ..." if values.shape[1] > 4 else "")
    raise ArgumentError(
        f"{op}: log_probs[{row}] = [{first}] are no log-probabilities, which are at most 0 and whose exp() adds up to "
        f"at most 1; {found}"
    )


def warn_of_small_log_probs(
    op: str, log_probs: Tensor, classes: int, counted: Tensor | None, *, stacklevel: int
) -> None:
    """Say so where every row's likeliest class has less than its share, which cannot be of the likeliest of all.

    Logits that are all negative look like that, and 1 minus their mass, the tail, is then nearly everything.
    """
    top = log_probs.detach().amax(-1)
    looked = top > -math.inf
    looked = looked if counted is None else looked & counted
    small = top < -math.log(classes) - _BELOW
    if bool(looked.any()) and bool((small | ~looked).all()):
        warnings.warn(
            f"{op}: the likeliest listed class of every row has a log-probability of {float(top[looked].max()):g} or "
            f"less, below log(1 / {classes}), that of {classes} equal classes: are log_probs logits? {_REMEDY}",
            stacklevel=stacklevel + 1,
        )
