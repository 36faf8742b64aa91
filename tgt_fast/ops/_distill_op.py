"""The soft-label loss as autograd and PyTorch's dispatcher know it, whatever kernel computes it."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.kernels import select
from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.calls import Direct, DistillCall, Gradients, Outputs, gradients, outputs
from tgt_fast.kernels.options import DistillOptions, TopK
from tgt_fast.ops import library
from tgt_fast.ops._checks import all_readable, upstream
from tgt_fast.ops._distill_arguments import OP, as_rows, check_values, settled
from tgt_fast.ops.library import or_nothing

# Of a call: a record's log-probabilities stand in the teacher's place. A divisor is a tensor or a number.
CALL: Final = (
    "Tensor student, Tensor teacher, Tensor? target, Tensor? sample_weight, Tensor? topk_ids, Tensor? tail_log_prob, "
    f"str? tail_mode, {library.DIVISOR}, {library.schema_of(DistillOptions)}, "
    f"{library.schema_of(Adjustments, 'adjust_')}"
)
_OPTIONS: Final = 9  # where they begin
_ADJUST: Final = _OPTIONS + len(DistillOptions._fields)
_COUNT: Final = _ADJUST + len(Adjustments._fields)


def dense_rows(logits: Tensor) -> Tensor:
    """(..., C) as (N, C) with dense rows: a view where the strides allow, else one copy."""
    rows = (logits if logits.dim() == 2 else as_rows(logits)).resolve_neg()
    return rows if rows.stride(1) == 1 or rows.numel() == 0 or rows.shape[1] == 1 else rows.contiguous()


def tensors_of(student: Tensor, teacher: Tensor | TopK) -> list[Tensor]:
    """The tensors that a backend is asked about."""
    if isinstance(teacher, Tensor):
        return [student, teacher]
    return [student, *(x for x in (teacher.log_probs, teacher.ids, teacher.tail_log_prob) if x is not None)]


# Autograd


def with_graph(
    kernel: Any, options: DistillOptions, student: Tensor, teacher: Tensor | TopK, target: Tensor | None,
    sample_weight: Tensor | None, divisor: float | Tensor | None, want_stats: bool, inplace: bool = False,
    adjust: Adjustments | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Loss and statistics, differentiable in the logits that require it; ``kernel``: of the form of ``Direct``.

    A float16 gradient is made in backward, so that the upstream gradient (the loss scale) is applied before rounding.
    """
    d_student, half = student.requires_grad, student.requires_grad and student.dtype == torch.float16
    leaf = None
    if isinstance(teacher, Tensor) and teacher.requires_grad:
        leaf, half = teacher, half or teacher.dtype == torch.float16
    call = DistillCall(
        options, student, teacher, target, sample_weight, divisor, d_student and not half,
        leaf is not None and not half, True, want_stats, inplace and d_student, adjust,
    )  # fmt: skip
    made: tuple[Tensor, Tensor | None] = library.apply(Distill, student, leaf, call, kernel, half)
    return made


class Distill(torch.autograd.Function):
    """Makes the gradients in forward, for an upstream gradient of 1, and hands them out once, scaled, in backward.

    A later backward over the same graph makes the gradients anew from the logits.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, leaf: Tensor | None, call: DistillCall, kernel: Any, deferred: bool) -> Any:
        ctx.set_materialize_grads(False)
        ctx.kernel, ctx.options, ctx.inplace, ctx.adjust = kernel, call.options, call.inplace, call.adjust
        ctx.ready, ctx.spent = None, False
        out: Outputs = kernel.forward(call)
        if not deferred:
            ctx.ready = (out.d_student, out.d_teacher)
        if call.inplace and not deferred:
            # The student's logits hold its gradient now: there is nothing left to compute a second one from.
            torch.autograd.graph.increment_version(student)
        elif isinstance(call.teacher, Tensor):
            ctx.tail_mode = None
            library.save(ctx, student, call.target, out.row_state, call.teacher)
        else:
            ids, log_probs, tail_log_prob, ctx.tail_mode = call.teacher
            library.save(ctx, student, call.target, out.row_state, log_probs, ids, tail_log_prob)
        if out.stats is not None:
            ctx.mark_non_differentiable(out.stats)
        return out.loss, out.stats

    @staticmethod
    @one_thread_in_forks
    def backward(ctx: Any, d_loss: Tensor | None, *unused: Any) -> Any:  # type: ignore[override]
        if d_loss is None:
            return (None,) * 5
        if ctx.inplace and ctx.spent:
            raise RuntimeError(
                f"{OP}: inplace=True overwrote the student's logits with their gradient, so backward runs once; "
                "pass inplace=False"
            )
        if ctx.inplace and torch.is_grad_enabled():
            raise RuntimeError(f"{OP}: inplace=True has no second derivative (create_graph=True); pass inplace=False")
        ctx.spent = True
        d_loss = upstream(OP, d_loss)
        if ctx.ready is not None:
            grads, ctx.ready = ctx.ready, None
            for grad in grads:
                if grad is not None:
                    ctx.kernel.scale_(grad, d_loss)
        else:
            grads = _again(ctx, d_loss)
        if torch.is_grad_enabled():
            refusal = f"{OP}: the compiled backends have no second derivative; pass backend='reference'"
            student, _, _, teacher, *_ = library.saved(ctx)
            grads = library.once(refusal, grads, (student, teacher))
        return (*grads, None, None, None)


def _again(ctx: Any, d_loss: Tensor) -> Gradients:
    """The gradients from what was saved."""
    student, target, row_state, *given = library.saved(ctx)
    names = {"teacher_logits": given[0]}
    teacher: Tensor | TopK = given[0]
    if ctx.tail_mode is not None:
        names = {f"the record's tensor {i}": tensor for i, tensor in enumerate(given)}
        log_probs, ids, tail_log_prob = given
        teacher = TopK(ids, log_probs, tail_log_prob, ctx.tail_mode)
    all_readable(f"{OP}, backward", student_logits=student, target=target, **names)
    d_student, d_teacher = ctx.needs_input_grad[:2]
    call = DistillCall(
        ctx.options, student, teacher, target, want_d_student=d_student, want_d_teacher=d_teacher, inplace=ctx.inplace,
        adjust=ctx.adjust,
    )  # fmt: skip
    grads: Gradients = ctx.kernel.backward(call, row_state, d_loss)
    if ctx.inplace:
        torch.autograd.graph.increment_version(student)
    return grads


# Registration


def packed_call(call: DistillCall) -> tuple[Any, ...]:
    """A call's inputs in the order of the schemas."""
    topk: tuple[Any, ...] = (None, None, None)
    teacher = call.teacher
    if isinstance(teacher, TopK):
        ids, teacher, *rest = teacher
        topk = (ids, *rest)
    return (
        call.student, teacher, call.target, call.sample_weight, *topk, *library.split(call.divisor), *call.options,
        *(Adjustments() if call.adjust is None else call.adjust),
    )  # fmt: skip


def unpacked(arguments: tuple[Any, ...]) -> tuple[DistillCall, tuple[Any, ...]]:
    """And back, where an op runs, with what follows in the schema."""
    student, teacher, target, weight, ids, tail, tail_mode, divisor, number = arguments[:9]
    if ids is not None:
        teacher = TopK(ids, teacher, tail, tail_mode)
    options = DistillOptions(*arguments[_OPTIONS:_ADJUST])
    adjust = Adjustments.of_arguments(*arguments[_ADJUST:_COUNT])
    divisor = number if divisor is None else divisor
    return DistillCall(options, student, teacher, target, weight, divisor, adjust=adjust), arguments[_COUNT:]


def ready(call: DistillCall, backend: str, *, looked_at: bool = False) -> tuple[DistillCall, str]:
    """A call with all its numbers and dense rows, and the backend that runs it; ``looked_at``: backward's."""
    options, target = settled(
        OP, call.options, call.student.shape[1], call.target, call.sample_weight, looked_at=looked_at,
        adjust=call.adjust,
    )  # fmt: skip
    student, teacher = dense_rows(call.student), call.teacher
    if isinstance(teacher, Tensor):
        teacher = dense_rows(teacher)
    call = call._replace(options=options, target=target, student=student, teacher=teacher)
    return call, select.choose(form_of(teacher), backend, tensors_of(student, teacher))


def form_of(teacher: Any) -> str:
    """The kernel of an op that serves a form of teacher."""
    return "distill" if isinstance(teacher, Tensor) else select.TOPK


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    call, (want_stats, backend, *wanted) = unpacked(arguments)
    call, chosen = ready(call._replace(want_stats=want_stats), backend)
    check_values(call, chosen if call.adjust is None else "reference")
    return returned(call, Direct(select.kernel(form_of(call.teacher), chosen)).forward(_wanting(call, wanted)))


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call, (want_stats, _, *wanted) = unpacked(arguments)
    call = _wanting(call._replace(want_stats=want_stats), wanted)
    return returned(call, outputs(call))


def _wanting(call: DistillCall, wanted: list[bool]) -> DistillCall:
    d_student, d_teacher, row_state = wanted or (False, False, False)
    return call._replace(want_d_student=d_student, want_d_teacher=d_teacher, want_row_state=row_state)


def returned(call: DistillCall, out: Outputs) -> tuple[Tensor, ...]:
    teacher = call.teacher if isinstance(call.teacher, Tensor) else call.teacher.log_probs
    return (
        out.loss, or_nothing(out.stats, out.loss), or_nothing(out.d_student, call.student),
        or_nothing(out.d_teacher, teacher), or_nothing(out.row_state, out.loss),
    )  # fmt: skip


def _backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, (row_state, d_loss, backend, d_student, d_teacher) = unpacked(arguments)
    call, chosen = ready(call._replace(want_d_student=d_student, want_d_teacher=d_teacher), backend, looked_at=True)
    made = Direct(select.kernel(form_of(call.teacher), chosen)).backward(call, row_state.contiguous(), d_loss)
    return returned_gradients(call, made)


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, (_, _, _, d_student, d_teacher) = unpacked(arguments)
    call = call._replace(want_d_student=d_student, want_d_teacher=d_teacher)
    return returned_gradients(call, gradients(call))


def returned_gradients(call: DistillCall, made: Gradients) -> tuple[Tensor, Tensor]:
    return or_nothing(made[0], call.student), or_nothing(made[1], call.student)


def _scale_(grad: Tensor, factor: Tensor, backend: str) -> None:
    rows = dense_rows(grad)
    select.kernel("distill", select.choose("distill", backend, (rows, rows))).scale_(rows, factor)
    if rows.data_ptr() != grad.data_ptr():
        grad.copy_(rows)


def _scale_fake(grad: Tensor, factor: Tensor, backend: str) -> None:
    return None


def _loss(*arguments: Any) -> tuple[Tensor, ...]:
    return _forward(*arguments)[:2]


def _loss_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return _forward_fake(*arguments)[:2]


def _loss_autograd(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, (want_stats, backend) = unpacked(arguments)
    loss, stats = with_graph(Dispatched(backend), *call[:6], want_stats, adjust=call.adjust)
    return loss, or_nothing(stats, loss.detach())


class Dispatched:
    """The same as ``Direct``, each call an op that a tracer can see."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def forward(self, call: DistillCall) -> Outputs:
        wanted = (call.want_d_student, call.want_d_teacher, call.want_row_state)
        loss, *made = library.dispatched(distill_forward, *packed_call(call), call.want_stats, self.backend, *wanted)
        return Outputs(
            loss, *(x if want else None for x, want in zip(made, (call.want_stats, *wanted), strict=True))
        )  # fmt: skip

    def backward(self, call: DistillCall, row_state: Tensor, d_loss: Tensor) -> Gradients:
        wanted = call.want_d_student, call.want_d_teacher
        d_student, d_teacher = library.dispatched(
            distill_backward, *packed_call(call), row_state, d_loss, self.backend, *wanted
        )
        return d_student if wanted[0] else None, d_teacher if wanted[1] else None

    def scale_(self, grad: Tensor, d_loss: Tensor) -> None:
        library.dispatched(distill_scale_, grad, d_loss, self.backend)


distillation_loss = library.define(
    f"distillation_loss({CALL}, bool want_stats, str backend) -> (Tensor, Tensor)",
    _loss,
    _loss_fake,
    _loss_autograd,
    differentiable=2,
)
distill_forward = library.define(
    f"distill_forward({CALL}, bool want_stats, str backend, bool want_d_student, bool want_d_teacher, "
    "bool want_row_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
distill_backward = library.define(
    f"distill_backward({CALL}, Tensor row_state, Tensor d_loss, str backend, bool want_d_student, "
    "bool want_d_teacher) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
distill_scale_ = library.define(
    "distill_scale_(Tensor(a!) grad, Tensor factor, str backend) -> ()", _scale_, _scale_fake
)
