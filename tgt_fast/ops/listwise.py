"""The listwise loss: arguments, autograd, choice of backend."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.kernels import select
from tgt_fast.kernels.linear_call import row_weights
from tgt_fast.kernels.listwise_calls import Direct, ListwiseCall, Outputs, outputs
from tgt_fast.kernels.options import REDUCTIONS, TEMPERATURES, DistillOptions, LinearTensors, TopK
from tgt_fast.kernels.plain import PLAIN
from tgt_fast.ops import _checks, library
from tgt_fast.ops._distill_arguments import check_rows, flat_labels
from tgt_fast.ops._distill_op import dense_rows
from tgt_fast.ops.counts import counting_group, over_processes
from tgt_fast.ops.topk import TeacherTopK, check_where_asked, rows_of

OP: Final = "listwise_distillation_loss"

# Checks


def make_options(
    teacher_temperature: Any, reduction: Any, ignore_index: Any, unlabeled_index: Any
) -> tuple[float, DistillOptions]:
    """The temperature, and what says which rows count. Raises ArgumentError."""
    options = DistillOptions(
        hard_weight=1.0,  # labels are looked at
        reduction=_checks.choice(OP, "reduction", reduction, REDUCTIONS),
        ignore_index=_checks.integer(OP, "ignore_index", ignore_index, -(2**63), 2**63),
        unlabeled_index=_checks.integer(OP, "unlabeled_index", unlabeled_index, -(2**63), 2**63),
    )
    return _checks.number(OP, "teacher_temperature", teacher_temperature, *TEMPERATURES), options


def _check_tensors(
    student: Tensor, teacher: Any, target: Tensor | None, sample_weight: Tensor | None, normalizer: Any,
    temperature: float, options: DistillOptions,
) -> None:  # fmt: skip
    _checks.floating(OP, "student", student)
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ShapeError(f"{OP}: student must be (..., C) with C >= 1, got {tuple(student.shape)}")
    if isinstance(teacher, TeacherTopK):
        if teacher.temperature != temperature:
            raise ArgumentError(
                f"{OP}: teacher_temperature is {temperature:g}, but the record was taken at {teacher.temperature:g}, "
                "and a record cannot be brought to another temperature"
            )
        if student.shape[-1] != teacher.num_classes or student.shape[:-1] != teacher.shape:
            raise ShapeError(
                f"{OP}: student {tuple(student.shape)} does not match the record's rows {tuple(teacher.shape)} and "
                f"{teacher.num_classes} classes"
            )
        _checks.real(OP, "log_probs", teacher.log_probs)
        _checks.same_device(OP, "student", student, "the record", teacher.log_probs)
    else:
        _checks.real(OP, "teacher", _checks.floating(OP, "teacher", teacher))
        if student.shape != teacher.shape:
            raise ShapeError(f"{OP}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ")
        _checks.same_device(OP, "student", student, "teacher", teacher)
    if target is not None:
        _checks.integers(OP, "target", target, "integer class indices")
    given = options if target is not None else options._replace(hard_weight=0.0)
    check_rows(OP, "student", student, target, sample_weight, normalizer, given)


def _record_of(record: TeacherTopK, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of all that the row knows, ids, and the weight of a class that is not listed."""
    rows: TopK = rows_of(record)
    log_probs = rows.log_probs.to(dtype)
    total, rest = log_probs.logsumexp(-1), rows.tail_log_prob
    others = torch.zeros_like(total, dtype=torch.float64)
    if rest is not None:
        total = torch.logaddexp(total, rest.to(dtype))
        unlisted = record.num_classes - (log_probs > -math.inf).sum(-1)
        others = (rest.to(dtype) - total).double().exp() / unlisted.clamp(min=1)
    return log_probs - total[:, None], rows.ids.contiguous(), others


# Autograd


class _Dispatched:
    """The same as ``Direct``, each call an op that a tracer can see."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def forward(self, call: ListwiseCall) -> Outputs:
        loss, d_student = library.dispatched(_forward_op, *call[:7], self.backend, call.want_d_student)
        return Outputs(loss, d_student if call.want_d_student else None)


class Listwise(torch.autograd.Function):
    """Makes the gradient in forward, for upstream gradients of 1, and hands it out once, scaled, in backward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: ListwiseCall, kernel: Any) -> Tensor:
        ctx.kernel, ctx.temperature = kernel, call.teacher_temperature
        # In float16 the gradient of a mean over many rows would underflow before a loss scale reaches it.
        out: Outputs = kernel.forward(call._replace(want_d_student=student.dtype != torch.float16))
        ctx.ready = out.d_student
        library.save(ctx, student, *call[1:6])
        return out.loss

    @staticmethod
    @one_thread_in_forks
    def backward(ctx: Any, d_loss: Tensor) -> Any:  # type: ignore[override]
        student, teacher, ids, others, label, factor = library.saved(ctx)
        d_loss = _checks.upstream(OP, d_loss)
        grad, ctx.ready = ctx.ready, None
        if grad is None:
            _checks.all_readable(f"{OP}, backward", student=student, teacher=teacher)
            factor = factor * d_loss.detach()
            call = ListwiseCall(student, teacher, ids, others, label, factor, ctx.temperature, True)
            grad = ctx.kernel.forward(call).d_student
        elif not (type(d_loss) in PLAIN and _checks.on_plain_cpu(d_loss) and bool((d_loss == 1).all())):
            grad = grad * d_loss.detach()[:, None].to(torch.promote_types(grad.dtype, torch.float32))
            grad = grad.to(student.dtype)
        if torch.is_grad_enabled():
            refusal = f"{OP}: the compiled backends have no second derivative; pass backend='reference'"
            (grad,) = library.once(refusal, (grad,), (student, d_loss))
        return grad, None, None


def _losses(call: ListwiseCall, kernel: Any) -> Tensor:
    """Row losses times their factors, differentiable in the student; ``kernel``: of the form of ``Direct``."""
    if library.graph_wanted(call.student):
        made: Tensor = library.apply(Listwise, call.student, call, kernel)
        return made
    out: Outputs = kernel.forward(call)
    return out.loss


# Registration


def _kernel_of(student: Tensor, teacher: Tensor, backend: str) -> Direct:
    return Direct(select.kernel("listwise", select.choose("listwise", backend, (student, teacher))))


def _call_of(arguments: tuple[Any, ...]) -> tuple[ListwiseCall, tuple[Any, ...]]:
    student, teacher, *rest = arguments[:7]
    return ListwiseCall(dense_rows(student), dense_rows(teacher), *rest), arguments[7:]


def _returned(call: ListwiseCall, out: Outputs) -> tuple[Tensor, Tensor]:
    return out.loss, library.or_nothing(out.d_student, call.student)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, (backend, want) = _call_of(arguments)
    call = call._replace(want_d_student=want)
    return _returned(call, _kernel_of(call.student, call.teacher, backend).forward(call))


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, (_, want) = _call_of(arguments)
    call = call._replace(want_d_student=want)
    return _returned(call, outputs(call))


def _autograd(*arguments: Any) -> Tensor:
    call, (backend,) = _call_of(arguments)
    return _losses(call, _Dispatched(backend))


_INPUTS: Final = (
    "Tensor student, Tensor teacher, Tensor? ids, Tensor? others, Tensor? label, Tensor factor, "
    "float teacher_temperature, str backend"
)
listwise_op = library.define(
    f"listwise({_INPUTS}) -> Tensor",
    lambda *arguments: _forward(*arguments, False)[0],
    lambda *arguments: _forward_fake(*arguments, False)[0],
    _autograd,
    differentiable=1,
)
_forward_op = library.define(
    f"listwise_forward({_INPUTS}, bool want_d_student) -> (Tensor, Tensor)", _forward, _forward_fake
)


# The public function


@one_thread_in_forks
def listwise_distillation_loss(
    student: Tensor,  # [..., C]
    teacher: Tensor | TeacherTopK,  # [..., C]
    target: Tensor | None = None,  # [...]
    *,
    teacher_temperature: float = 1.0,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,  # [...]
    ignore_index: int = -100,
    unlabeled_index: int = -1,
    normalizer: float | Tensor | None = None,
    count_group: Any = None,
    backend: str = "auto",
) -> Tensor:
    r"""``sum_k a[k] * (logsumexp(s[k:]) - s[k])`` over the classes in their order: Plackett-Luce distillation.

    The order is the label's class first, where there is a label, then the others by the teacher's logit, the largest
    first and equal ones by id; s are the student's logits in it, and ``a = softmax(teacher / teacher_temperature)``. It
    takes the place of cross-entropy and soft term together: with all weight on the label it is the cross-entropy, with
    equal weights the likelihood of the whole order (ListMLE). Convex in s, and the same for ``s + constant``. A label
    to which the teacher gives no probability hardly counts.

    Args:
        student: ``(..., C)`` logits, float64, float32, bfloat16 or float16. Differentiable. It is not tempered.
        teacher: ``(..., C)`` logits of any of these dtypes, which are data: no gradient passes to them. A class at -inf
            is left out, on both sides. Or a :class:`TeacherTopK` taken at ``teacher_temperature``: the listed classes
            are ranked, the others enter the log-sum-exps alone. A label that is not listed comes first with an equal
            share of the tail's probability (with ``tail="renormalize"``, none).
        target: ``(...)`` labels. ``ignore_index`` drops the row, ``unlabeled_index`` leaves the teacher's order.
        teacher_temperature: of the weights, in [1e-30, 100].
        reduction: ``"mean"`` divides by the counted rows' weights (their number, without weights); ``"sum"``;
            ``"none"`` returns a loss a row, 0 for dropped rows.
        sample_weight: ``(...)`` non-negative weights, not differentiable; 0 drops the row.
        ignore_index, unlabeled_index, normalizer, count_group: see :func:`tgt_fast.distillation_loss`.
        backend: ``"auto"``, ``"native"`` (CPU), ``"triton"`` (CUDA; not yet run on a GPU) or ``"reference"``.

    Returns:
        The loss, float32 (float64 when an input is float64): 0-d, or ``(...)`` for ``"none"``.

    A row whose student is -inf where the teacher gives weight is +inf, without a gradient; one that holds NaN, +inf or
    nothing but -inf is NaN, and leaves the others alone. Deterministic. Second derivatives need
    ``backend="reference"``. One gradient's memory is all that is kept for backward.

    Raises:
        ShapeError, DTypeError, DeviceError, ArgumentError: before anything runs, with the offending values.
        BackendError: the backend asked for by name cannot run this call.

    Source: "Plackett-Luce Distillation", arXiv 2506.12542, 2025. Evidence there: ImageNet, ResNet-152 to ResNet-50,
    77.3 % at a teacher_temperature of 1, 77.2 % at 1.5, 76.1 % at 0.5 and 75.2 % at 4; for CIFAR-100 it takes 4. Rows
    without labels and records are ours.

    >>> import torch, tgt_fast as tgt
    >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[-90.0, 90.0, -90.0]])
    >>> tgt.listwise_distillation_loss(student, teacher, torch.tensor([1])).item()  # the cross-entropy of class 1
    2.1698...
    """
    _checks.refuse_tracing(OP)
    temperature, options = make_options(teacher_temperature, reduction, ignore_index, unlabeled_index)
    _check_tensors(student, teacher, target, sample_weight, normalizer, temperature, options)
    group = counting_group(OP, count_group)
    if group is not None and options.reduction != "mean":
        raise ArgumentError(f"{OP}: count_group counts the divisor of 'mean', but reduction is {options.reduction!r}")
    rows, classes = dense_rows(student), student.shape[-1]
    label = None if target is None else flat_labels(target)
    weight = None if sample_weight is None else sample_weight.reshape(-1)
    if _checks.on_plain_cpu(student):
        _checks.check_row_values(OP, classes, label, weight, options)
    nothing = rows.detach()[:, :0]
    tensors = LinearTensors(nothing, nothing, None, nothing, None, None, target=label, sample_weight=weight)
    factor = row_weights(tensors, label, classes, None, options)
    if factor is None:
        factor = torch.ones(rows.shape[0], dtype=torch.float64, device=rows.device)
    if options.reduction == "mean":
        factor = _divided(factor, normalizer, group)
    ids = others = None
    theirs = teacher
    if isinstance(theirs, TeacherTopK):
        check_where_asked(theirs)
        if _checks.on_plain_cpu(student):
            _checks.check_entries(OP, rows_of(theirs), label, weight, options)
            _checks.check_ids(OP, rows_of(theirs), classes, label, weight, options)
        double = torch.float64 in (student.dtype, theirs.log_probs.dtype)
        dtype = torch.float64 if double else torch.float32
        theirs, ids, others = _record_of(theirs, dtype)
    if label is not None:
        label = torch.where((label >= 0) & (label < classes), label, -1)
    call = ListwiseCall(rows, dense_rows(theirs), ids, others, label, factor, temperature)
    if backend != "reference" and library.seen_by_dispatcher(call.student, call.teacher, label, factor):
        losses: Tensor = listwise_op(*call[:7], backend)
    else:
        chosen = select.choose("listwise", backend, (call.student, call.teacher))
        kernel = select.kernel("listwise", chosen)
        losses = kernel.value(call) if chosen == "reference" else _losses(call, Direct(kernel))
    wide = torch.float64 in (student.dtype, call.teacher.dtype)
    losses = losses.reshape(student.shape[:-1]) if options.reduction == "none" else losses.sum()
    return losses if wide else losses.float()


def _divided(factor: Tensor, normalizer: float | Tensor | None, group: Any) -> Tensor:
    """The share of each row in a mean; nothing of nothing is 0."""
    divisor: Any = factor.sum() if normalizer is None else normalizer
    if normalizer is None and group is not None:
        (divisor,) = over_processes(group, divisor)
    divisor = torch.as_tensor(divisor, dtype=torch.float64, device=factor.device)
    return torch.where(divisor == 0, 0.0, factor / torch.where(divisor == 0, 1.0, divisor))
