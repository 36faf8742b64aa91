"""The loss from hidden states as autograd and PyTorch's dispatcher know it, whatever kernel computes its rows."""

from __future__ import annotations

import itertools
from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.kernels import calls as row_calls
from tgt_fast.kernels import late, linear_chunks, select
from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.linear_call import result_dtype
from tgt_fast.kernels.options import DIFFERENTIABLE, DistillOptions, LinearForward, LinearOptions, LinearTensors
from tgt_fast.ops import _checks, library
from tgt_fast.ops._checks import all_readable, upstream
from tgt_fast.ops._distill_arguments import settled
from tgt_fast.ops._distill_op import distill_scale_
from tgt_fast.ops._linear_arguments import LARGE, OP, check_values
from tgt_fast.ops.library import or_nothing

_HEADS: Final = (1, 2, 4, 5)  # weights and biases: their gradients are sums over rows
_WANTED: Final = ", ".join(f"bool want_d_{name}" for name in LinearTensors._fields[:DIFFERENTIABLE])
CALL: Final = (
    f"{library.schema_of(LinearTensors)}, {library.DIVISOR}, {library.schema_of(LinearOptions)}, "
    f"{library.schema_of(DistillOptions)}, {library.schema_of(Adjustments, 'adjust_')}"
)


# Autograd


class Call:
    """Options that travel through autograd beside the tensors."""

    __slots__ = ("beside", "heads", "kernel", "options", "want_stats")

    def __init__(
        self, heads: LinearOptions, options: DistillOptions, kernel: Any, want_stats: bool,
        adjust: Adjustments | None = None,
    ) -> None:  # fmt: skip
        self.heads = heads
        self.options = options
        self.kernel = kernel  # forward(), backward() and scale_(), as Direct
        self.want_stats = want_stats
        self.beside: dict[str, Any] = {} if adjust is None else {"adjust": adjust}  # not of every kernel


class Linear(torch.autograd.Function):
    """Makes the wanted gradients in forward, for an upstream gradient of 1; hands them out once, scaled, in backward.

    They are made in backward instead where the upstream gradient has to come first: in float16, which would underflow,
    and for a loss a row with a gradient that sums over rows. A later backward over the same graph makes them anew.
    """

    @staticmethod
    def forward(ctx: Any, divisor: float | Tensor | None, call: Call, *tensors: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.wanted = wanted = tuple(ctx.needs_input_grad[2 : 2 + DIFFERENTIABLE])
        t = LinearTensors(*tensors)  # type: ignore[arg-type]
        half = any(w and x is not None and x.dtype == torch.float16 for w, x in zip(wanted, t, strict=False))
        deferred = half or (call.options.reduction == "none" and any(wanted[i] for i in _HEADS))
        out = call.kernel.forward(
            t, divisor, call.heads, call.options, want_stats=call.want_stats,
            wanted=(False,) * DIFFERENTIABLE if deferred else wanted, **call.beside,
        )  # fmt: skip
        ctx.ready = None if deferred else out.grads
        on_device, ctx.divisor = library.split(divisor)
        library.save(ctx, *tensors, on_device)
        if out.stats is not None:
            ctx.mark_non_differentiable(out.stats)
        return out.loss, out.stats

    @staticmethod
    @one_thread_in_forks
    def backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> Any:  # type: ignore[override]
        if d_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        call = ctx.call
        d_loss = upstream(OP, d_loss)
        if ctx.ready is not None:
            grads, ctx.ready = ctx.ready, None
            for grad in grads:
                if grad is not None:
                    call.kernel.scale_(grad if grad.dim() == 2 else grad[None], d_loss)
        else:
            *tensors, on_device = library.saved(ctx)
            t = LinearTensors(*tensors)
            all_readable(f"{OP}, backward", **t._asdict())
            divisor = ctx.divisor if on_device is None else on_device
            grads = call.kernel.backward(t, divisor, d_loss, call.heads, call.options, wanted=ctx.wanted, **call.beside)
        if torch.is_grad_enabled():
            refusal = f"{OP}: no second derivative; pass backend='reference'"
            grads = library.once(refusal, grads, library.saved(ctx)[:DIFFERENTIABLE])
        return (None, None, *grads, *(None,) * (len(LinearTensors._fields) - DIFFERENTIABLE))


class Direct:
    """The driver on the row kernel of a backend, as autograd wants it."""

    def __init__(self, backend: str, t: LinearTensors) -> None:
        self._kernel = row_calls.Direct(select.kernel("distill" if t.topk_ids is None else select.TOPK, backend))

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
    present = [x for x in (*t[:DIFFERENTIABLE], t.topk_ids, t.tail_log_prob) if x is not None]
    return select.choose("linear" if t.topk_ids is None else select.TOPK, backend, present)


# Registration


def all_at_once(tensors: LinearTensors, backend: str) -> bool:
    """True if the formula itself runs: asked for by name, or for tensors that no compiled kernel takes.

    A device without kernels of its own is served in chunks, too, by the reference's row losses.
    """
    if chosen(backend, tensors) != "reference":
        return False
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors if x is not None)
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    transformed = torch._C._are_functorch_transforms_active() or forward_mode
    return not (select.requested(backend) == "auto" and plain and not transformed)


def packed_heads(heads: LinearOptions) -> LinearOptions:
    """The heads' options for a schema, ``*packed_heads(heads)``: late scales in a tensor, and ones in their place."""
    if heads.scales is not None:
        return heads
    (student, teacher), scales = late.packed(heads.student_scale, heads.teacher_scale)
    return heads._replace(student_scale=student, teacher_scale=teacher, scales=scales)


def packed_call(
    t: LinearTensors, divisor: float | Tensor | None, heads: LinearOptions, options: DistillOptions,
    adjust: Adjustments | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """A call's inputs in the order of the schemas."""
    return (*t, *library.split(divisor), *heads, *options, *(Adjustments() if adjust is None else adjust))


_Inputs = tuple[LinearTensors, "float | Tensor | None", LinearOptions, DistillOptions, "Adjustments | None"]


def unpacked(arguments: tuple[Any, ...]) -> tuple[_Inputs, list[Any]]:
    """And back, where an op runs, with what follows in the schema."""
    values = iter(arguments)

    def taken(kind: Any) -> Any:
        return kind(*itertools.islice(values, len(kind._fields)))

    t, divisor, number = taken(LinearTensors), next(values), next(values)
    heads, options = taken(LinearOptions), taken(DistillOptions)
    adjust = Adjustments.of_arguments(*taken(Adjustments))
    return (t, number if divisor is None else divisor, heads, options, adjust), list(values)


def settled_inputs(inputs: _Inputs, *, looked_at: bool = False) -> _Inputs:
    """With all numbers, where the op runs."""
    t, divisor, heads, options, adjust = inputs
    if heads.scales is not None:
        student, teacher = (
            _checks.number(OP, name, value, 0, LARGE, open_low=True)
            for name, value in zip(("student_scale", "teacher_scale"), heads.scales.tolist(), strict=True)
        )
        heads = heads._replace(student_scale=student, teacher_scale=teacher, scales=None)
    options, target = settled(
        OP, options, t.student_weight.shape[0], t.target, t.sample_weight, looked_at=looked_at, adjust=adjust
    )
    return t._replace(target=target), divisor, heads, options, adjust


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (want_stats, backend, *wanted) = unpacked(arguments)
    t, divisor, heads, options, adjust = settled_inputs(inputs)
    check_values(t, heads, options)
    out = Direct(chosen(backend, t), t).forward(
        t, divisor, heads, options, wanted=tuple(wanted) or (False,) * DIFFERENTIABLE, want_stats=want_stats,
        adjust=adjust,
    )  # fmt: skip
    return (out.loss, or_nothing(out.stats, out.loss), *_filled(t, out.grads))


def forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    (t, _, _, options, _), (want_stats, _, *wanted) = unpacked(arguments)
    rows = t.student_hidden.shape[0]
    loss = t.student_hidden.new_empty(rows if options.reduction == "none" else (), dtype=result_dtype(t))
    return (
        loss,
        loss.new_empty((6 if t.topk_ids is None else 3, rows) if want_stats else 0),
        *_empty_gradients(t, wanted or [False] * DIFFERENTIABLE),
    )


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (d_loss, backend, *wanted) = unpacked(arguments)
    t, divisor, heads, options, adjust = settled_inputs(inputs, looked_at=True)
    grads = Direct(chosen(backend, t), t).backward(
        t, divisor, d_loss, heads, options, wanted=tuple(wanted), adjust=adjust
    )
    return _filled(t, grads)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    (t, *_), (_, _, *wanted) = unpacked(arguments)
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


def _loss(*arguments: Any) -> tuple[Tensor, ...]:
    return _forward(*arguments)[:2]


def _loss_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return forward_fake(*arguments)[:2]


def _loss_autograd(*arguments: Any) -> tuple[Tensor, Tensor]:
    (t, divisor, heads, options, adjust), (want_stats, backend) = unpacked(arguments)
    call = Call(heads, options, _Dispatched(backend), want_stats, adjust)
    loss, stats = library.apply(Linear, divisor, call, *t)
    return loss, or_nothing(stats, loss.detach())


class _Dispatched:
    """The same as ``Direct``, each call an op that a tracer can see."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def forward(
        self, t: LinearTensors, divisor: float | Tensor | None, heads: LinearOptions, options: DistillOptions, *,
        wanted: tuple[bool, ...], want_stats: bool, adjust: Adjustments | None = None,
    ) -> LinearForward:  # fmt: skip
        inputs = packed_call(t, divisor, heads, options, adjust)
        loss, stats, *grads = library.dispatched(linear_distill_forward, *inputs, want_stats, self.backend, *wanted)
        made = tuple(grad if w else None for grad, w in zip(grads, wanted, strict=True))
        return LinearForward(loss, made, stats if want_stats else None)

    def backward(
        self, t: LinearTensors, divisor: float | Tensor | None, d_loss: Tensor, heads: LinearOptions,
        options: DistillOptions, *, wanted: tuple[bool, ...], adjust: Adjustments | None = None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        inputs = packed_call(t, divisor, heads, options, adjust)
        grads = library.dispatched(linear_distill_backward, *inputs, d_loss, self.backend, *wanted)
        return tuple(grad if w else None for grad, w in zip(grads, wanted, strict=True))

    def scale_(self, grad: Tensor, d_loss: Tensor) -> None:
        library.dispatched(distill_scale_, grad, d_loss, self.backend)


_GRADIENTS = ", ".join(["Tensor"] * DIFFERENTIABLE)
linear_distillation_loss = library.define(
    f"linear_distillation_loss({CALL}, bool want_stats, str backend) -> (Tensor, Tensor)",
    _loss,
    _loss_fake,
    _loss_autograd,
    differentiable=DIFFERENTIABLE,
)
linear_distill_forward = library.define(
    f"linear_distill_forward({CALL}, bool want_stats, str backend, {_WANTED}) -> (Tensor, Tensor, {_GRADIENTS})",
    _forward,
    forward_fake,
)
linear_distill_backward = library.define(
    f"linear_distill_backward({CALL}, Tensor d_loss, str backend, {_WANTED}) -> ({_GRADIENTS})",
    _backward,
    _backward_fake,
)
