"""Readable tensors: their numbers lie in memory, by strides, which every op has to know of each argument.

PyTorch's own kernels and ours read where a tensor points. A tensor whose storage was freed points nowhere, and to read
it is a segmentation fault; one that is sparse, quantised or nested holds other things than its numbers.
"""

from __future__ import annotations

from typing import Any, Final, NoReturn

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from tgt_fast.errors import ArgumentError, BackendError, DTypeError
from tgt_fast.kernels.plain import PLAIN

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
