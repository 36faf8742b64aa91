"""The soft-label loss on logits: arguments, autograd, choice of backend."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.kernels import select
from tgt_fast.kernels.native import distill as native_distill
from tgt_fast.kernels.options import DIVERGENCES, REDUCTIONS, DistillOptions, DistillStats
from tgt_fast.kernels.reference import distill as reference_distill
from tgt_fast.ops import _checks

_OP = "distillation_loss"
_LARGE = 1e30


@functools.lru_cache(maxsize=256)
def make_options(
    divergence: str,
    beta: float,
    temperature: float,
    teacher_temperature: float | None,
    soft_weight: float,
    hard_weight: float,
    label_smoothing: float,
    ignore_index: int,
    unlabeled_index: int,
    reduction: str,
) -> DistillOptions:
    """The validated options of one loss; cached, since a training loop passes the same ones at every step."""
    _checks.choice(_OP, "divergence", divergence, DIVERGENCES)
    if divergence == "jsd" and not 0 < _checks.number(_OP, "beta", beta, 0, 1) < 1:
        raise ArgumentError(
            f"{_OP}: jsd needs 0 < beta < 1, got {beta!r}: it tends to 0 at both ends; "
            "the limits of jsd / beta and jsd / (1 - beta) are divergence='forward_kl' and 'reverse_kl'"
        )
    for name, value in (("ignore_index", ignore_index), ("unlabeled_index", unlabeled_index)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentError(f"{_OP}: {name} must be an int, got {value!r}")
    temperature = _checks.number(_OP, "temperature", temperature, 0, _LARGE, open_low=True)
    if teacher_temperature is None:
        teacher_temperature = temperature
    return DistillOptions(
        divergence=divergence,
        beta=float(beta),
        temperature=temperature,
        teacher_temperature=_checks.number(_OP, "teacher_temperature", teacher_temperature, 0, _LARGE, open_low=True),
        soft_weight=_checks.number(_OP, "soft_weight", soft_weight, 0, _LARGE),
        hard_weight=_checks.number(_OP, "hard_weight", hard_weight, 0, _LARGE),
        label_smoothing=_checks.number(_OP, "label_smoothing", label_smoothing, 0, 1),
        ignore_index=ignore_index,
        unlabeled_index=unlabeled_index,
        reduction=_checks.choice(_OP, "reduction", reduction, REDUCTIONS),
    )


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
        temperature: ``Ts > 0``.
        teacher_temperature: ``Tt > 0``; ``Ts`` by default.
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
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        The loss, float32 (float64 when an input is float64): 0-d, or ``(...)`` for ``"none"``. With ``return_stats``
        the pair of it and the statistics.

    A logit of -inf is a class of probability 0. A row whose true loss is +inf (forward_kl: the student is -inf where
    the teacher is not) gives +inf and no soft gradient; a row that holds NaN, +inf or nothing but -inf gives NaN, and
    leaves the other rows alone. The result does not depend on the number of threads. Second derivatives need
    ``backend="reference"``.

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
    _check_tensors(student_logits, teacher_logits, target, sample_weight, normalizer, options)
    shape = student_logits.shape
    student = _rows(student_logits)
    teacher = _rows(teacher_logits)
    if target is not None:
        target = target.reshape(-1).to(torch.int64)
    if sample_weight is not None:
        sample_weight = sample_weight.reshape(-1)
    if inplace:
        _check_inplace(student_logits, student)

    if select.choose("distill", backend, (student, teacher)) == "reference":
        if _checks.on_plain_cpu(student):
            _check_values(student, target, sample_weight, options)
        loss, stats = reference_distill.distillation_loss(
            student, teacher, target, sample_weight, normalizer, options, want_stats=return_stats
        )
    else:
        needs_graph = torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad)
        call = _Call(options, native_distill, inplace and needs_graph and student.requires_grad, return_stats)
        if needs_graph:
            loss, *rest = _Distill.apply(student, teacher, target, sample_weight, normalizer, call)
        else:
            out = native_distill.forward(
                student, teacher, target, sample_weight, normalizer, options, want_stats=return_stats
            )
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
        if ctx.deferred:
            ctx.save_for_backward(student, teacher, target, out.rows)
        elif call.inplace:
            # The student's logits hold its gradient now: there is nothing left to compute a second one from.
            ctx.ready = (out.d_student, out.d_teacher)
            torch.autograd.graph.increment_version(student)
        else:
            ctx.ready = (out.d_student, out.d_teacher)
            ctx.save_for_backward(student, teacher, target, out.rows)
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
                f"{_OP}: inplace=True overwrote the student's logits with their gradient, so backward runs once; "
                "pass inplace=False"
            )
        ctx.spent = True
        if ctx.ready is not None:
            grads, ctx.ready = ctx.ready, None
            for grad in grads:
                if grad is not None:
                    call.kernel.scale_(grad, d_loss)
        else:
            student, teacher, target, rows = ctx.saved_tensors
            grads = call.kernel.backward(
                student, teacher, target, rows, d_loss, call.options, wanted=ctx.wanted, inplace=call.inplace
            )
            if call.inplace:
                torch.autograd.graph.increment_version(student)
        if torch.is_grad_enabled() and not call.inplace:
            grads = tuple(None if grad is None else _Once.apply(grad, *ctx.saved_tensors[:2]) for grad in grads)
        return (*grads, None, None, None, None)


class _Once(torch.autograd.Function):
    """Passes a gradient on; differentiating it again is an error that says what to do."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{_OP}: the compiled backends have no second derivative; pass backend='reference'")


def _rows(logits: Tensor) -> Tensor:
    """(..., C) as (N, C) with dense rows: a view where the strides allow, else one copy."""
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 or rows.numel() == 0 or rows.shape[1] == 1 else rows.contiguous()


def _check_tensors(
    student: Tensor, teacher: Tensor, target: Tensor | None, sample_weight: Tensor | None,
    normalizer: float | Tensor | None, options: DistillOptions,
) -> None:  # fmt: skip
    _checks.floating(_OP, "student_logits", student)
    _checks.floating(_OP, "teacher_logits", teacher)
    if student.shape != teacher.shape:
        if student.dim() and teacher.dim() and student.shape[-1] != teacher.shape[-1]:
            raise ShapeError(
                f"{_OP}: student_logits have {student.shape[-1]} classes, teacher_logits {teacher.shape[-1]}; "
                "select or map the classes that both share, or pad the narrower side with logits of -inf "
                "(a class of probability 0), never with 0"
            )
        raise ShapeError(
            f"{_OP}: student_logits {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)} differ"
        )
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ShapeError(f"{_OP}: logits must be (..., C) with C >= 1, got {tuple(student.shape)}")
    _checks.same_device(_OP, "student_logits", student, "teacher_logits", teacher)
    if (target is None) != (options.hard_weight == 0):
        raise ArgumentError(
            f"{_OP}: hard_weight is {options.hard_weight:g} but target is {'missing' if target is None else 'given'}; "
            "pass a target exactly when hard_weight > 0"
        )
    for name, tensor in (("target", target), ("sample_weight", sample_weight)):
        if tensor is None:
            continue
        if tensor.shape != student.shape[:-1]:
            found, wanted = tuple(tensor.shape), tuple(student.shape[:-1])
            raise ShapeError(f"{_OP}: {name} {found} does not match the logits' rows {wanted}")
        _checks.same_device(_OP, name, tensor, "student_logits", student)
    if target is not None and (target.is_floating_point() or target.dtype == torch.bool or target.is_complex()):
        raise DTypeError(f"{_OP}: target must hold integer class indices, got {target.dtype}")
    if sample_weight is not None and sample_weight.requires_grad:
        raise ArgumentError(f"{_OP}: sample_weight requires grad, but the loss is not differentiable in it; detach it")
    if normalizer is not None:
        if options.reduction != "mean":
            raise ArgumentError(
                f"{_OP}: normalizer replaces the divisor of 'mean', but reduction is {options.reduction!r}"
            )
        if isinstance(normalizer, Tensor):
            if normalizer.dim() != 0:
                raise ShapeError(
                    f"{_OP}: normalizer must be a number or a 0-d tensor, got shape {tuple(normalizer.shape)}"
                )
            _checks.same_device(_OP, "normalizer", normalizer, "student_logits", student)
        else:
            _checks.number(_OP, "normalizer", normalizer, 0, _LARGE)


def _check_inplace(student_logits: Tensor, rows: Tensor) -> None:
    if rows.data_ptr() != student_logits.data_ptr():
        raise ArgumentError(
            f"{_OP}: inplace=True needs logits whose rows are dense in memory, got strides {student_logits.stride()}"
        )
    if student_logits.requires_grad and student_logits.is_leaf and torch.is_grad_enabled():
        raise ArgumentError(f"{_OP}: inplace=True would overwrite student_logits, a leaf that requires grad")


def _check_values(
    student: Tensor, target: Tensor | None, sample_weight: Tensor | None, options: DistillOptions
) -> None:
    """What the compiled core checks while it runs, for the reference on a CPU."""
    if sample_weight is not None and not bool(((sample_weight >= 0) & sample_weight.isfinite()).all()):
        row = int((~((sample_weight >= 0) & sample_weight.isfinite())).nonzero()[0])
        raise ArgumentError(native_distill.bad_weight(row, float(sample_weight[row])))
    if target is not None:
        classes = student.shape[1]
        fine = (target >= 0) & (target < classes)
        fine |= (target == options.ignore_index) | (target == options.unlabeled_index)
        if sample_weight is not None:
            fine |= sample_weight == 0
        if not bool(fine.all()):
            row = int((~fine).nonzero()[0])
            raise ArgumentError(native_distill.bad_target(row, int(target[row]), classes, options))
