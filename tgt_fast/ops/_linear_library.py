"""The loss from hidden states in PyTorch's dispatcher: the op that users call, and those that its autograd calls."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from tgt_fast.kernels import late, linear_chunks, select
from tgt_fast.kernels.options import (
    DIFFERENTIABLE,
    DistillOptions,
    LateHeads,
    LinearForward,
    LinearOptions,
    LinearTensors,
)
from tgt_fast.kernels.reference.linear import result_dtype
from tgt_fast.ops import _checks, library
from tgt_fast.ops._distill_library import distill_scale_
from tgt_fast.ops._linear_arguments import LARGE, OP, check_values
from tgt_fast.ops._linear_autograd import Call, Linear
from tgt_fast.ops._packing import DIVISOR, OPTIONS, or_nothing, packed, settled, unpacked

_TENSORS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor teacher, Tensor? teacher_weight, "
    "Tensor? teacher_bias, Tensor? target, Tensor? sample_weight, Tensor? vocab_map, Tensor? vocab_mask, "
    "Tensor? record_ids, Tensor? record_tail, Tensor? class_ids, Tensor? own_class"
)
_HEADS = (
    "float student_scale, float? student_softcap, float teacher_scale, float? teacher_softcap, int? vocab_size, "
    "int? memory_budget, str? tail, int? record_classes, Tensor? scales"
)
_WANTED = (
    "bool want_d_student_hidden, bool want_d_student_weight, bool want_d_student_bias, bool want_d_teacher, "
    "bool want_d_teacher_weight, bool want_d_teacher_bias"
)
_MANY = len(LinearTensors._fields)
_EIGHT = 8  # LinearOptions


def packed_heads(heads: LinearOptions) -> tuple[Any, ...]:
    """The heads' options in the order of the schemas, which is that of the fields; behind them late numbers."""
    student: Any = heads.student_scale
    teacher: Any = heads.teacher_scale
    numbers = heads.numbers if isinstance(heads, LateHeads) else None
    if numbers is None:
        (student, teacher), numbers = late.packed(student, teacher)
    return (
        student, heads.student_softcap, teacher, heads.teacher_softcap, heads.vocab_size, heads.memory_budget,
        heads.tail, heads.record_classes, numbers,
    )  # fmt: skip


def _unpacked(values: tuple[Any, ...]) -> tuple[LinearOptions, DistillOptions, tuple[Any, ...]]:
    scales = values[_EIGHT]
    heads = LinearOptions(*values[:_EIGHT]) if scales is None else LateHeads(*values[: _EIGHT + 1])
    return heads, *unpacked(values[_EIGHT + 1 :])


def _settled(
    t: LinearTensors, heads: LinearOptions, options: DistillOptions, *, looked_at: bool = False
) -> tuple[LinearTensors, LinearOptions, DistillOptions]:
    """With all numbers, where the op runs."""
    if isinstance(heads, LateHeads) and heads.numbers is not None:
        student, teacher = (
            _checks.number(OP, name, value, 0, LARGE, open_low=True)
            for name, value in zip(("student_scale", "teacher_scale"), heads.numbers.tolist(), strict=True)
        )
        known = {field.name: getattr(heads, field.name) for field in fields(LinearOptions)}
        heads = LinearOptions(**{**known, "student_scale": student, "teacher_scale": teacher})
    options, target = settled(OP, options, t.student_weight.shape[0], t.target, t.sample_weight, looked_at=looked_at)
    return t._replace(target=target), heads, options


class Direct:
    """The driver on the row kernel of a backend, as autograd wants it."""

    def __init__(self, backend: str, recorded: bool) -> None:
        kernel = select.kernel("distill", backend)
        self._kernel = linear_chunks.RecordKernel(select.kernel("sparse", backend), kernel) if recorded else kernel

    def forward(self, *arguments: Any, **keywords: Any) -> LinearForward:
        with torch.no_grad(), library.without_autocast():
            return linear_chunks.forward(self._kernel, *arguments, **keywords)

    def backward(self, *arguments: Any, **keywords: Any) -> tuple[Tensor | None, ...]:
        with torch.no_grad(), library.without_autocast():
            return linear_chunks.backward(self._kernel, *arguments, **keywords)

    def scale_(self, grad: Tensor, d_loss: Tensor) -> None:
        self._kernel.scale_(grad, d_loss)


def chosen(backend: str, t: LinearTensors) -> str:
    """The name of the backend whose row kernel runs: for a record, the one that has a kernel for records."""
    present = [x for x in (*t[:DIFFERENTIABLE], t.record_ids, t.record_tail) if x is not None]
    return select.choose("linear" if t.record_ids is None else "sparse", backend, present)


def _direct(backend: str, t: LinearTensors) -> Direct:
    return Direct(chosen(backend, t), t.record_ids is not None)


# The kernels


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    t, (normalizer, divisor, *packed_options) = LinearTensors(*arguments[:_MANY]), arguments[_MANY:]
    heads, options, (want_stats, backend, *wanted) = _unpacked(tuple(packed_options))
    t, heads, options = _settled(t, heads, options)
    check_values(t, heads, options)
    out = _direct(backend, t).forward(
        t, divisor if normalizer is None else normalizer, heads, options,
        wanted=tuple(wanted), want_stats=want_stats,
    )  # fmt: skip
    return (out.loss, or_nothing(out.stats, out.loss), *_filled(t, out.grads))


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    t = LinearTensors(*arguments[:_MANY])
    _, options, (want_stats, _, *wanted) = _unpacked(arguments[_MANY + 2 :])
    rows = t.student_hidden.shape[0]
    loss = t.student_hidden.new_empty(rows if options.reduction == "none" else (), dtype=result_dtype(t))
    return (
        loss,
        loss.new_empty((6, rows) if want_stats else 0),
        *_empty_gradients(t, wanted),
    )


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    t, (normalizer, divisor, d_loss, *packed_options) = LinearTensors(*arguments[:_MANY]), arguments[_MANY:]
    heads, options, (backend, *wanted) = _unpacked(tuple(packed_options))
    t, heads, options = _settled(t, heads, options, looked_at=True)
    divide_by = divisor if normalizer is None else normalizer
    grads = _direct(backend, t).backward(t, divide_by, d_loss, heads, options, wanted=tuple(wanted))
    return _filled(t, grads)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    t = LinearTensors(*arguments[:_MANY])
    _, _, (_, *wanted) = _unpacked(arguments[_MANY + 3 :])
    return _empty_gradients(t, wanted)


def _filled(t: LinearTensors, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(
        or_nothing(grad, t.student_hidden if x is None else x)
        for x, grad in zip(t[:DIFFERENTIABLE], grads, strict=True)
    )


def _empty_gradients(t: LinearTensors, wanted: list[bool]) -> tuple[Tensor, ...]:
    return tuple(
        t.student_hidden.new_empty(0) if x is None else x.new_empty(tuple(x.shape) if w else 0)
        for x, w in zip(t[:DIFFERENTIABLE], wanted, strict=True)
    )


# The op


def _loss(*arguments: Any) -> tuple[Tensor, Tensor]:
    loss, stats, *_ = _forward(*arguments, *(False,) * DIFFERENTIABLE)
    return loss, stats


def _loss_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    loss, stats, *_ = _forward_fake(*arguments, *(False,) * DIFFERENTIABLE)
    return loss, stats


def _loss_autograd(*arguments: Any) -> tuple[Tensor, Tensor]:
    t, (normalizer, divisor, *packed_options) = LinearTensors(*arguments[:_MANY]), arguments[_MANY:]
    if t.record_ids is not None:  # a record is data
        t = t._replace(teacher=t.teacher.detach())
    heads, options, (want_stats, backend) = _unpacked(tuple(packed_options))
    call = Call(heads, options, _Dispatched(backend), want_stats)
    loss, stats = library.apply(Linear, divisor if normalizer is None else normalizer, call, *t)
    return loss, or_nothing(stats, loss.detach())


class _Dispatched:
    """The same as ``Direct``, each call an op that a tracer can see."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def forward(
        self, t: LinearTensors, normalizer: float | Tensor | None, heads: LinearOptions, options: DistillOptions, *,
        wanted: tuple[bool, ...], want_stats: bool,
    ) -> LinearForward:  # fmt: skip
        on_device, divisor = library.split(normalizer)
        with torch._C._AutoDispatchBelowAutograd():
            loss, stats, *grads = _linear_distill_forward(
                *t, on_device, divisor, *packed_heads(heads), *packed(options), want_stats, self.backend, *wanted
            )
        made = tuple(grad if w else None for grad, w in zip(grads, wanted, strict=True))
        return LinearForward(loss, made, stats if want_stats else None)

    def backward(
        self, t: LinearTensors, normalizer: float | Tensor | None, d_loss: Tensor, heads: LinearOptions,
        options: DistillOptions, *, wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        on_device, divisor = library.split(normalizer)
        with torch._C._AutoDispatchBelowAutograd():
            grads = _linear_distill_backward(
                *t, on_device, divisor, d_loss, *packed_heads(heads), *packed(options), self.backend, *wanted
            )
        return tuple(grad if w else None for grad, w in zip(grads, wanted, strict=True))

    def scale_(self, grad: Tensor, d_loss: Tensor) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            distill_scale_(grad, d_loss, self.backend)


_GRADIENTS = ", ".join(["Tensor"] * DIFFERENTIABLE)
linear_distillation_loss = library.define(
    f"linear_distillation_loss({_TENSORS}, {DIVISOR}, {_HEADS}, {OPTIONS}, bool want_stats, str backend) "
    "-> (Tensor, Tensor)",
    _loss,
    _loss_fake,
    _loss_autograd,
    differentiable=DIFFERENTIABLE,
)
_linear_distill_forward = library.define(
    f"linear_distill_forward({_TENSORS}, {DIVISOR}, {_HEADS}, {OPTIONS}, bool want_stats, str backend, {_WANTED}) "
    f"-> (Tensor, Tensor, {_GRADIENTS})",
    _forward,
    _forward_fake,
)
_linear_distill_backward = library.define(
    f"linear_distill_backward({_TENSORS}, {DIVISOR}, Tensor d_loss, {_HEADS}, {OPTIONS}, str backend, {_WANTED}) "
    f"-> ({_GRADIENTS})",
    _backward,
    _backward_fake,
)
