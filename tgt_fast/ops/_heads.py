"""Heads as a loss finds them: under adapters of PEFT, of which a ``weight`` says nothing, or in shards."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch import Tensor, nn

from tgt_fast.kernels.plain import PLAIN
from tgt_fast.ops._checks import has_memory

_SEARCHES: Final = 16  # a process; a head whose memory moves at each step is then no longer looked for
_seen_to: ContextVar[bool] = ContextVar("_seen_to", default=False)
_looked_for: set[tuple[int, tuple[int, ...]]] = set()


@contextmanager
def adapters_seen_to() -> Iterator[None]:
    """Inside, whoever calls a loss knows the layers that its heads are of: none is looked for."""
    token = _seen_to.set(True)
    try:
        yield
    finally:
        _seen_to.reset(token)


def with_adapters(layer: nn.Module | None, weight: Tensor) -> Tensor:
    """The weight that the layer multiplies by: with what its active adapters add, if they can say it."""
    if layer is None or not is_adapted(layer) or not hasattr(layer, "get_delta_weight"):
        return weight
    for name in _active(layer):
        weight = weight + layer.get_delta_weight(name).to(weight)  # type: ignore[operator]
    return weight


def warn_of_adapters(op: str, student: Tensor, teacher: Tensor | None) -> None:
    """Say so where a head's weight is that of a layer under active adapters, which a loss from hidden states misses.

    Looked for once a head, through all objects, and only where PEFT is in use. A teacher's adapters are spoken of where
    none is trained: the base weight of a model whose adapters are is its teacher in self-distillation.
    """
    if _layer_type() is None or torch.compiler.is_compiling() or _seen_to.get():
        return
    for name, weight in (("student_weight", student), ("teacher_weight", teacher)):
        if weight is None or type(weight) not in PLAIN or not has_memory(weight):  # inside torch.func none has
            continue
        key = (weight.data_ptr(), tuple(weight.shape))
        if key in _looked_for or len(_looked_for) >= _SEARCHES:
            continue
        _looked_for.add(key)
        found = [layer for layer in _layers_on(weight) if _active(layer)]
        if name == "teacher_weight":
            found = [layer for layer in found if not any(p.requires_grad for p in layer.parameters())]
        for layer in found[:1]:
            adapters, instead = _active(layer), ""
            if hasattr(layer, "get_delta_weight"):
                parts = ["head.weight", *(f"head.get_delta_weight({adapter!r})" for adapter in adapters)]
                instead = f"pass {name}={' + '.join(parts)}, head being that layer, or "
            warnings.warn(
                f"{op}: {name} is the weight under the adapters {adapters} of a layer ({type(layer).__module__}."
                f"{type(layer).__name__}), which this loss neither sees nor trains; {instead}take distillation_loss of "
                "the model's own logits",
                stacklevel=3,
            )


def _layer_type() -> type | None:
    module = sys.modules.get("peft.tuners.tuners_utils")
    return getattr(module, "BaseTunerLayer", None)


def is_adapted(layer: Any) -> bool:
    """True if it is a layer of PEFT round another one."""
    # By the classes it is made of: isinstance() asks some objects, and they may answer by importing things.
    return _layer_type() in type(layer).__mro__


def _active(layer: Any) -> list[str]:
    """The adapters that the layer's forward adds to its base."""
    if layer.disable_adapters or layer.merged:
        return []
    known = layer._get_available_adapters()
    return [name for name in layer.active_adapters if name in known]


def _layers_on(weight: Tensor) -> list[Any]:
    """The linear layers with adapters whose base has this weight, or the memory of it."""
    found = []
    for thing in gc.get_objects():
        if not is_adapted(thing):
            continue
        base = thing.get_base_layer()
        own = getattr(base, "weight", None)
        # An embedding may share its memory with a head that has no adapters.
        if isinstance(base, nn.Embedding) or not isinstance(own, Tensor) or own.shape != weight.shape:
            continue
        if has_memory(own) and own.data_ptr() == weight.data_ptr() and own.device == weight.device:
            found.append(thing)
    return found


def whole_head(hidden: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
    """Weight and bias, whole, in the dtype of the hidden states; those that are whole come back as they are.

    A gradient goes back as data parallel training wants it: the mean over the processes, each with its shard.
    """
    if weight is None or not (_is_spread(weight) or _is_spread(bias)):
        return weight, bias
    dtype = hidden.dtype if isinstance(hidden, Tensor) and hidden.is_floating_point() else None
    absent = [part for part in (weight, bias) if _is_partitioned(part)]
    if absent:
        absent[0].all_gather(param_list=absent)
    try:
        return _whole(weight, dtype), _whole(bias, dtype)
    finally:
        if absent:
            absent[0].partition(param_list=absent, has_been_updated=False)


def _is_spread(part: Any) -> bool:
    return part is not None and (hasattr(part, "full_tensor") or _is_partitioned(part))


def _is_partitioned(part: Any) -> bool:
    """True if it is a parameter of ZeRO-3 whose numbers are not here at the moment."""
    return hasattr(part, "ds_id") and hasattr(part, "all_gather") and part.numel() != part.ds_numel


def _whole(part: Any, dtype: torch.dtype | None) -> Any:
    if hasattr(part, "full_tensor"):
        from torch.distributed.tensor import Partial

        # Narrow before it travels: the shards are those of the optimizer, in float32 as a rule.
        cast = part if dtype is None or dtype == part.dtype else part.to(dtype)
        return cast.full_tensor(grad_placements=[Partial("avg")] * part.device_mesh.ndim)
    if hasattr(part, "ds_id"):
        return _Copy.apply(part, dtype or part.dtype)
    return part


class _Copy(torch.autograd.Function):
    """Of numbers that are about to leave. The gradient goes to the parameter, whose hooks reduce and partition it."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = parameter.dtype
        return parameter.detach().to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad.to(ctx.dtype), None
