"""The soft-label loss on logits: arguments, autograd, choice of backend."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from tgt_fast.kernels import select
from tgt_fast.kernels.native import distill as native_distill
from tgt_fast.kernels.options import DistillOptions, DistillStats
from tgt_fast.kernels.reference import distill as reference_distill
from tgt_fast.kernels.triton import distill as triton_distill
from tgt_fast.ops import _checks
from tgt_fast.ops._distill_arguments import OP, check_inplace, check_tensors, check_values, make_options

_COMPILED: dict[str, Any] = {"native": native_distill, "triton": triton_distill}


@overload
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = ...,
    *,
    divergence: str = ...,
    beta: float = ...,
    temperature: float = ...,
    teacher_temperature: float | None = ...,
    soft_weight: float = ...,
    hard_weight: float = ...,
    label_smoothing: float = ...,
    sample_weight: Tensor | None = ...,
    ignore_index: int = ...,
    unlabeled_index: int = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    inplace: bool = ...,
    return_stats: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = ...,
    *,
    divergence: str = ...,
    beta: float = ...,
    temperature: float = ...,
    teacher_temperature: float | None = ...,
    soft_weight: float = ...,
    hard_weight: float = ...,
    label_smoothing: float = ...,
    sample_weight: Tensor | None = ...,
    ignore_index: int = ...,
    unlabeled_index: int = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    inplace: bool = ...,
    return_stats: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, DistillStats]: ...
@overload
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = ...,
    *,
    divergence: str = ...,
    beta: float = ...,
    temperature: float = ...,
    teacher_temperature: float | None = ...,
    soft_weight: float = ...,
    hard_weight: float = ...,
    label_smoothing: float = ...,
    sample_weight: Tensor | None = ...,
    ignore_index: int = ...,
    unlabeled_index: int = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    inplace: bool = ...,
    return_stats: bool = ...,
    backend: str = ...,
) -> Tensor | tuple[Tensor, DistillStats]: ...
def distillation_loss(
    student_logits: Tensor,  # [..., C]
    teacher_logits: Tensor,  # [..., C]
    target: Tensor | None = None,  # [...]
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,  # [...]
    ignore_index: int = -100,
    unlabeled_index: int = -1,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    inplace: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, DistillStats]:
    r"""Soft-label distillation loss, optionally mixed with the hard-label cross-entropy, in one pass over the logits.

    With ``p = softmax(t / Tt)``, ``q = softmax(s / Ts)`` and ``w`` the sample weights, a row's loss is::

        w * (soft_weight * Ts**2 * D(p, q) + hard_weight * cross_entropy(s, target, label_smoothing))

        D = sum(p * (log p - log q))                       forward_kl
            sum(q * (log q - log p))                       reverse_kl
            forward_kl + reverse_kl                        symmetric
            beta * KL(p, m) + (1 - beta) * KL(q, m)        jsd, m = beta * p + (1 - beta) * q
            sum(abs(p - q)) / 2                            tvd
            -sum(p * log q)                                cross_entropy
            sum((s / Ts - t / Tt)**2), without Ts**2       mse

    Args:
        student_logits: ``(..., C)``, float64, float32, bfloat16 or float16. Differentiable.
        teacher_logits: ``(..., C)``, any of these dtypes. Differentiable: its gradient is made when it requires one.
        target: ``(...)`` class indices, needed exactly when ``hard_weight > 0``. ``ignore_index`` drops the row,
            ``unlabeled_index`` drops its hard term alone.
        divergence: one of the names above.
        beta: weight of the teacher in the mixture of ``jsd``, ``0 < beta < 1``.
        temperature: ``Ts``, in [1e-30, 1e30].
        teacher_temperature: ``Tt``, in [1e-30, 1e30]; ``Ts`` by default.
        soft_weight: factor of the soft term, >= 0. A term of weight 0 is not computed.
        hard_weight: factor of the hard term, >= 0.
        label_smoothing: in [0, 1], spread over the classes whose student logit is finite.
        sample_weight: ``(...)`` non-negative weights, not differentiable; 0 drops the row.
        reduction: ``"mean"`` divides by the sum of the counted rows' weights (their number, without weights), for
            both terms alike; ``"sum"``; ``"none"`` returns a loss a row, 0 for dropped rows.
        normalizer: a number or 0-d tensor that replaces the divisor of ``"mean"``, for gradient accumulation and data
            parallel runs: pass the global count (under DDP, which averages gradients, the global count / world size).
            A normalizer of 0 gives 0.
        inplace: write the gradient over ``student_logits``, which saves one buffer of their size. They must not be used
            afterwards, and backward runs once.
        return_stats: also return a :class:`DistillStats` from the same pass.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.

    Returns:
        The loss, float32 (float64 when an input is float64): 0-d, or ``(...)`` for ``"none"``. With ``return_stats``
        the pair of it and the statistics.

    A logit of -inf is a class of probability 0. A row whose true loss is +inf (forward_kl: the student is -inf where
    the teacher is not) gives +inf and no soft gradient; a row that holds NaN, +inf or nothing but -inf gives NaN, and
    leaves the other rows alone. The result does not depend on the number of threads. Second derivatives need
    ``backend="reference"``. On a CPU the memory of a large gradient is kept, once it is freed, for the next call;
    :func:`tgt_fast.release_buffers` gives it back.

    Raises:
        ShapeError, DTypeError, DeviceError, ArgumentError: before anything runs, with the offending values.
        BackendError: the backend asked for by name cannot run this call.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015; the teacher-side gradient
    serves the exploration of Zaheer et al., "Teacher Guided Training", ICLR 2023.

    >>> import torch, tgt_fast as tgt
    >>> student = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    >>> teacher, target = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([0])
    >>> loss = tgt.distillation_loss(student, teacher, target, temperature=2.0, hard_weight=1.0)
    >>> loss.backward()
    >>> round(loss.item(), 4)
    0.6606
    """
    options = make_options(
        divergence, beta, temperature, teacher_temperature, soft_weight, hard_weight, label_smoothing,
        ignore_index, unlabeled_index, reduction,
    )  # fmt: skip
    check_tensors(student_logits, teacher_logits, target, sample_weight, normalizer, options)
    shape = student_logits.shape
    student = _rows(student_logits)
    teacher = _rows(teacher_logits)
    if target is not None:
        target = target.reshape(-1).to(torch.int64)
    if sample_weight is not None:
        sample_weight = sample_weight.reshape(-1)
    if inplace:
        check_inplace(student_logits, student)

    chosen = select.choose("distill", backend, (student, teacher))
    if chosen == "reference":
        if _checks.on_plain_cpu(student):
            check_values(student, target, sample_weight, options)
        loss, stats = reference_distill.distillation_loss(
            student, teacher, target, sample_weight, normalizer, options, want_stats=return_stats
        )
    else:
        needs_graph = torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad)
        kernel = _COMPILED[chosen]
        call = _Call(options, kernel, inplace and needs_graph and student.requires_grad, return_stats)
        if needs_graph:
            loss, *rest = _Distill.apply(student, teacher, target, sample_weight, normalizer, call)
        else:
            out = kernel.forward(student, teacher, target, sample_weight, normalizer, options, want_stats=return_stats)
            loss, rest = out.loss, list(out.stats or ())
        stats = DistillStats(*rest) if return_stats else None

    if reduction == "none":
        loss = loss.reshape(shape[:-1])
    if stats is None:
        return loss
    return loss, DistillStats(*(value.reshape(shape[:-1]) for value in stats))


class _Call:
    """What travels through autograd beside the tensors."""

    __slots__ = ("inplace", "kernel", "options", "want_stats")

    def __init__(self, options: DistillOptions, kernel: Any, inplace: bool, want_stats: bool) -> None:
        self.options = options
        self.kernel = kernel
        self.inplace = inplace
        self.want_stats = want_stats


class _Distill(torch.autograd.Function):
    """Makes the gradients in forward, for an upstream gradient of 1, and hands them out once, scaled, in backward.

    A float16 gradient is made in backward instead, so that the upstream gradient (the loss scale) is applied before
    rounding. A later backward over the same graph makes the gradients anew from the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, target: Tensor | None, sample_weight: Tensor | None,
        normalizer: float | Tensor | None, call: _Call,
    ) -> Any:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.wanted = ctx.needs_input_grad[:2]
        ctx.ready = None
        ctx.spent = False
        ctx.deferred = (ctx.wanted[0] and student.dtype == torch.float16) or (
            ctx.wanted[1] and teacher.dtype == torch.float16
        )
        out = call.kernel.forward(
            student, teacher, target, sample_weight, normalizer, call.options,
            wanted=(False, False) if ctx.deferred else ctx.wanted, keep_rows=True, inplace=call.inplace,
            want_stats=call.want_stats,
        )  # fmt: skip
        if not ctx.deferred:
            ctx.ready = (out.d_student, out.d_teacher)
        if call.inplace and not ctx.deferred:
            # The student's logits hold its gradient now: there is nothing left to compute a second one from.
            torch.autograd.graph.increment_version(student)
        else:
            _save(ctx, student, teacher, target, out.rows)
        stats = tuple(out.stats or ())
        ctx.mark_non_differentiable(*stats)
        return (out.loss, *stats)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> Any:  # type: ignore[override]
        if d_loss is None:
            return (None,) * 6
        call = ctx.call
        if call.inplace and ctx.spent:
            raise RuntimeError(
                f"{OP}: inplace=True overwrote the student's logits with their gradient, so backward runs once; "
                "pass inplace=False"
            )
        if call.inplace and torch.is_grad_enabled():
            raise RuntimeError(f"{OP}: inplace=True has no second derivative (create_graph=True); pass inplace=False")
        ctx.spent = True
        if ctx.ready is not None:
            grads, ctx.ready = ctx.ready, None
            for grad in grads:
                if grad is not None:
                    call.kernel.scale_(grad, d_loss)
        else:
            student, teacher, target, rows = _saved(ctx)
            grads = call.kernel.backward(
                student, teacher, target, rows, d_loss, call.options, wanted=ctx.wanted, inplace=call.inplace
            )
            if call.inplace:
                torch.autograd.graph.increment_version(student)
        if torch.is_grad_enabled():
            grads = tuple(None if grad is None else _Once.apply(grad, *_saved(ctx)[:2]) for grad in grads)
        return (*grads, None, None, None, None)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """save_for_backward, which refuses what was made in inference mode, such as a teacher's logits: that is held."""
    ctx.held = tuple(tensor if tensor is not None and tensor.is_inference() else None for tensor in tensors)
    ctx.save_for_backward(*(None if h is not None else t for t, h in zip(tensors, ctx.held, strict=True)))


def _saved(ctx: Any) -> tuple[Any, ...]:
    return tuple(t if h is None else h for t, h in zip(ctx.saved_tensors, ctx.held, strict=True))


class _Once(torch.autograd.Function):
    """Passes a gradient on; differentiating it again is an error that says what to do."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{OP}: the compiled backends have no second derivative; pass backend='reference'")


def _rows(logits: Tensor) -> Tensor:
    """(..., C) as (N, C) with dense rows: a view where the strides allow, else one copy."""
    rows = (logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])).resolve_neg()
    return rows if rows.stride(1) == 1 or rows.numel() == 0 or rows.shape[1] == 1 else rows.contiguous()
