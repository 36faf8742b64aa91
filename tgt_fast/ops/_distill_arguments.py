"""Arguments of the soft-label loss: its options, its tensors, and, on a CPU, their values."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.kernels import late
from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.calls import DistillCall, is_soft
from tgt_fast.kernels.late import is_on, shown
from tgt_fast.kernels.options import DIVERGENCES, REDUCTIONS, TEMPERATURES, DistillOptions, TopK
from tgt_fast.ops import _checks
from tgt_fast.ops._checks import check_entries, check_ids, check_row_values
from tgt_fast.ops.topk import TeacherTopK, check_options

OP = "distillation_loss"


def make_options(*values: Any) -> DistillOptions:
    """The validated options of one loss, in the order of the fields; after them the op's name, if it is another."""
    if torch.compiler.is_compiling():  # a compiler looks through a cache, and warns of it
        return _checked_options(*values)
    try:
        return _cached_options(*values)
    except TypeError:  # a tensor; or an option that cannot be hashed, which cannot be right: let the checks say which
        return _checked_options(*values)


def _checked_options(
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
    op: str = OP,
) -> DistillOptions:
    _checks.choice(op, "divergence", divergence, DIVERGENCES)
    beta = _checks.number(op, "beta", beta, 0, 1, late=True)
    if divergence == "jsd" and not isinstance(beta, Tensor) and not 0 < beta < 1:
        raise ArgumentError(
            f"{op}: jsd needs 0 < beta < 1, got {beta!r}: it tends to 0 at both ends; "
            "the limits of jsd / beta and jsd / (1 - beta) are divergence='forward_kl' and 'reverse_kl'"
        )
    temperature = _checks.number(op, "temperature", temperature, *TEMPERATURES, late=True)
    if teacher_temperature is None:
        teacher_temperature = temperature
    return DistillOptions(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        teacher_temperature=_checks.number(op, "teacher_temperature", teacher_temperature, *TEMPERATURES, late=True),
        soft_weight=_checks.number(op, "soft_weight", soft_weight, 0, _checks.LARGE, late=True),
        hard_weight=_checks.number(op, "hard_weight", hard_weight, 0, _checks.LARGE, late=True),
        label_smoothing=_checks.number(op, "label_smoothing", label_smoothing, 0, 1, late=True),
        ignore_index=_checks.integer(op, "ignore_index", ignore_index, -(2**63), 2**63),
        unlabeled_index=_checks.integer(op, "unlabeled_index", unlabeled_index, -(2**63), 2**63),
        reduction=_checks.choice(op, "reduction", reduction, REDUCTIONS),
    )


# A training loop passes the same ones at every step. Typed, or True would pass as the 1.0 that was seen before.
@functools.lru_cache(maxsize=256, typed=True)
def _cached_options(*values: Any) -> DistillOptions:
    if any(isinstance(value, Tensor) for value in values):
        raise TypeError("a tensor may have another value at the next call; what is raised is not kept")
    return _checked_options(*values)


def check_tensors(
    student: Tensor, teacher: Tensor, target: Tensor | None, sample_weight: Tensor | None,
    normalizer: float | Tensor | None, options: DistillOptions,
) -> None:  # fmt: skip
    _checks.floating(OP, "student_logits", student)
    _checks.floating(OP, "teacher_logits", teacher)
    shape = student.shape
    if shape != teacher.shape:
        if student.dim() and teacher.dim() and student.shape[-1] != teacher.shape[-1]:
            raise ShapeError(
                f"{OP}: student_logits have {student.shape[-1]} classes, teacher_logits {teacher.shape[-1]}; "
                "tgt_fast.align_logits selects (vocab_size=) or maps (vocab_map=) the classes that both share; a class "
                "that one side lacks is a logit of -inf (probability 0), never of 0"
            )
        raise ShapeError(
            f"{OP}: student_logits {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)} differ"
        )
    if not shape or shape[-1] == 0:
        raise ShapeError(f"{OP}: logits must be (..., C) with C >= 1, got {tuple(shape)}")
    if shape[-1] == 1:
        check_classes(OP, "student_logits", 1, options)
    if len(shape) > 3:
        warn_of_maps(student)
    _checks.same_device(OP, "student_logits", student, "teacher_logits", teacher)
    check_rows(OP, "student_logits", student, target, sample_weight, normalizer, options)


def check_topk(
    student: Tensor, topk: TeacherTopK, target: Tensor | None, sample_weight: Tensor | None,
    normalizer: float | Tensor | None, options: DistillOptions,
) -> None:  # fmt: skip
    """The same where a record stands in the place of the teacher's logits."""
    _checks.floating(OP, "student_logits", student)
    check_options(OP, topk, options)
    if student.shape[-1:] != (topk.num_classes,):
        found = student.shape[-1] if student.dim() else "no"
        raise ShapeError(
            f"{OP}: student_logits have {found} classes, the record's ids point into {topk.num_classes}; "
            "select or map the classes that both share, or pad the student's logits with -inf"
        )
    check_classes(OP, "student_logits", topk.num_classes, options)
    if student.shape[:-1] != topk.shape:
        raise ShapeError(
            f"{OP}: student_logits {tuple(student.shape)} and the record's rows {tuple(topk.shape)} do not match"
        )
    _checks.same_device(OP, "student_logits", student, "the record", topk.log_probs)
    _checks.real(OP, "log_probs", topk.log_probs)
    check_rows(OP, "student_logits", student, target, sample_weight, normalizer, options)


_warned_of_maps = False


def warn_of_maps(student: Tensor) -> None:
    """Say once a process that classes are the last dimension, where logits look as those of a convolution do."""
    global _warned_of_maps
    if _warned_of_maps or torch.compiler.is_compiling():
        return
    shape = student.shape
    last = student.dim() == 4 and shape[1] > 1 and student.is_contiguous(memory_format=torch.channels_last)
    if shape[-1] == shape[-2] or (last and not student.is_contiguous()):
        _warned_of_maps = True
        warnings.warn(
            f"{OP}: logits {tuple(shape)} look like maps with their classes in the second dimension, but classes are "
            "the last one here; if they are, pass class_dim=1",
            stacklevel=4,
        )


def classes_last(op: str, class_dim: int, **tensors: Any) -> tuple[Any, ...]:
    """Logits, and a target with as many dimensions, with their classes in the last one; views.

    Raises:
        ArgumentError: there is no such dimension.
    """
    student = tensors["student_logits"]
    dims = student.dim() if isinstance(student, Tensor) else 0
    class_dim = _checks.integer(op, "class_dim", class_dim, -(2**31), 2**31)
    if not isinstance(student, Tensor) or not -dims <= class_dim < dims:
        raise ArgumentError(f"{op}: class_dim={class_dim}, but student_logits have {dims} dimensions")
    if isinstance(tensors["teacher_logits"], Tensor) and tensors["teacher_logits"].dim() != dims:
        raise ShapeError(
            f"{op}: student_logits {tuple(student.shape)} and teacher_logits {tuple(tensors['teacher_logits'].shape)} "
            "differ"
        )
    return tuple(x.movedim(class_dim, -1) if isinstance(x, Tensor) and x.dim() == dims else x for x in tensors.values())


def check_classes(op: str, name: str, classes: int, options: DistillOptions) -> None:
    """That there is something to learn: a distribution over one class is 1, and so constant, whatever the logit."""
    if classes != 1:
        return
    soft = is_on(options.soft_weight) and options.divergence != "mse"
    if not soft and not is_on(options.hard_weight):
        return
    term = f"{options.divergence} is the same" if soft else "the cross-entropy of the target is 0"
    raise ShapeError(
        f"{op}: {name} have one class, whose probability is 1 whatever the logit, so that {term} for every student and "
        "its gradient 0; for a regression pass divergence='mse' (and hard_weight=0), for a binary classifier with one "
        "logit z pass two, torch.cat([torch.zeros_like(z), z], -1), on both sides"
    )


def check_rows(
    op: str, name: str, student: Tensor, target: Tensor | None, sample_weight: Tensor | None,
    normalizer: float | Tensor | None, options: DistillOptions, classes: int | None = None,
) -> None:  # fmt: skip
    """Check what comes a number a row, or a class, and the divisor; ``student`` is (rows..., ``classes`` or any)."""
    if target is None and is_on(options.hard_weight):
        raise ArgumentError(f"{op}: hard_weight is {shown(options.hard_weight)} but target is missing")
    if target is None and sample_weight is None and normalizer is None:
        return
    shares = target is not None and _is_a_number_a_class(target, student, classes)
    if shares and is_on(options.label_smoothing):
        raise ArgumentError(
            f"{op}: label_smoothing is of labels, but target has shares of the classes; smooth those, "
            "(1 - a) * target + a / C, and pass label_smoothing=0"
        )
    for label, tensor in (("target", target), ("sample_weight", sample_weight)):
        if tensor is None:
            continue
        _checks.real(op, label, tensor)
        if tensor.shape != student.shape[:-1] and not (shares and label == "target"):
            raise ShapeError(f"{op}: {label} {tuple(tensor.shape)} {_misfit(label, tensor, name, student)}")
        _checks.same_device(op, label, tensor, name, student)
    if target is not None and not shares and (target.is_floating_point() or target.dtype == torch.bool):
        raise DTypeError(f"{op}: target must hold integer class indices, or shares (..., C), got {target.dtype}")
    if normalizer is not None:
        if options.reduction != "mean":
            raise ArgumentError(
                f"{op}: normalizer replaces the divisor of 'mean', but reduction is {options.reduction!r}"
            )
        if isinstance(normalizer, Tensor):
            _checks.real(op, "normalizer", normalizer)
            if normalizer.dim() != 0:
                raise ShapeError(
                    f"{op}: normalizer must be a number or a 0-d tensor, got shape {tuple(normalizer.shape)}"
                )
            _checks.same_device(op, "normalizer", normalizer, name, student)
            _checks.finite_from(op, "normalizer", normalizer, 0)
        else:
            _checks.number(op, "normalizer", normalizer, 0, _checks.LARGE)


def _misfit(label: str, tensor: Tensor, name: str, student: Tensor) -> str:
    """Why a tensor that should hold a number a row does not fit, and what to do where that can be told."""
    shape, rows = tuple(student.shape), tuple(student.shape[:-1])
    said = f"does not match the logits' rows {rows}"
    if label == "target" and tuple(tensor.shape) == (*rows, 1):
        return f"{said}; pass target.squeeze(-1)"
    if label == "target" and tensor.dim() == len(shape) and tuple(tensor.shape[:-1]) == rows:
        return f"{said}, and shares of the classes need as many as there are, got {tensor.shape[-1]}"
    if len(shape) > 2 and tuple(tensor.shape) == (shape[0], *shape[2:]):
        return f"{said}: classes are the last dimension here; pass {name}.movedim(1, -1), and the teacher's likewise"
    return said


def _is_a_number_a_class(target: Tensor, student: Tensor, classes: int | None) -> bool:
    """True if it has the shape of shares of the classes, such as one-hot rows, and not that of labels."""
    if not isinstance(target, Tensor) or target.is_complex() or target.is_nested:  # a nested one has no shape to ask
        return False
    return target.shape == (*student.shape[:-1], student.shape[-1] if classes is None else classes)


def as_rows(matrix: Tensor) -> Tensor:
    """(..., C) as (N, C), also where C is 0."""
    return matrix.unsqueeze(0) if matrix.dim() == 1 else matrix.flatten(0, -2)


def flat_target(target: Tensor, rows: int, like: Tensor) -> Tensor:
    """Labels as [N] int64, shares of the classes as [N, C] floating point with dense rows; ``rows``: dimensions."""
    if target.dim() == rows:
        return flat_labels(target)
    shares = as_rows(target.detach())
    if not shares.is_floating_point():  # one-hot rows, as torch.nn.functional.one_hot makes them
        shares = shares.to(like.dtype)
    return shares if shares.stride(-1) == 1 or shares.shape[-1] == 1 else shares.contiguous()


def flat_labels(target: Tensor) -> Tensor:
    """[N] int64."""
    if target.dim() == 1 and target.dtype == torch.int64:  # as most come
        return target
    return target.reshape(-1).to(torch.int64)


def as_mask(
    op: str, classes: int, target: Tensor, sample_weight: Tensor | None, options: DistillOptions
) -> tuple[Tensor | None, DistillOptions]:
    """A target beside ``hard_weight=0``: which rows count is all that it says, so no kernel looks for a class in it."""
    if _checks.on_plain_cpu(target):
        check_row_values(op, classes, target, sample_weight, options)
    return mask_of(target, options)


def mask_of(target: Tensor, options: DistillOptions) -> tuple[Tensor | None, DistillOptions]:
    """The same of a target that was looked at; shares of the classes drop no row."""
    if is_soft(target):
        return None, options
    plain = options._replace(ignore_index=-100, unlabeled_index=-1)
    return torch.where(target == options.ignore_index, plain.ignore_index, plain.unlabeled_index), plain


def check_inplace(student_logits: Tensor, rows: Tensor) -> None:
    overlap = rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]
    if rows.data_ptr() != student_logits.data_ptr() or overlap:
        raise ArgumentError(
            f"{OP}: inplace=True needs logits whose rows are dense in memory and apart from each other, "
            f"got strides {student_logits.stride()}"
        )
    base = student_logits._base if student_logits._is_view() else student_logits
    if base is not None and base.requires_grad and base.is_leaf and torch.is_grad_enabled():
        raise ArgumentError(f"{OP}: inplace=True would overwrite a leaf that requires grad, or a view of one")


def check_values(call: DistillCall, backend: str) -> None:
    """On a CPU, what needs the data: the compiled core looks by itself at all but a record's log-probabilities."""
    target, sample_weight, options = call.target, call.sample_weight, call.options
    if isinstance(call.teacher, TopK):
        check_entries(OP, call.teacher, target, sample_weight, options)
    if backend != "reference" or not _checks.on_plain_cpu(call.student):
        return
    classes = call.student.shape[1]
    check_row_values(OP, classes, target, sample_weight, options)
    if isinstance(call.teacher, TopK):
        check_ids(OP, call.teacher, classes, target, sample_weight, options)


# Numbers that are known only when an op runs


def packed(options: DistillOptions) -> DistillOptions:
    """The options for a schema, ``*packed(options)``: late numbers in one tensor, and ones in their place."""
    if options.numbers is not None:
        return options
    o = options
    values, numbers = late.packed(*_numbers(o))
    return DistillOptions(o.divergence, *values, o.ignore_index, o.unlabeled_index, o.reduction, numbers)  # type: ignore[call-arg]


def settled(
    op: str, options: DistillOptions, classes: int, target: Tensor | None, sample_weight: Tensor | None = None, *,
    looked_at: bool = False, adjust: Adjustments | None = None,
) -> tuple[DistillOptions, Tensor | None]:  # fmt: skip
    """The options with their numbers, where the op runs, and the target as they want it.

    Args:
        looked_at: whether the target's values have been checked before.
        adjust: what may need the labels though the hard term's weight is 0.

    Raises:
        ArgumentError: a late number out of its range.
    """
    if options.numbers is None:
        return options, target
    o = options
    options = make_options(
        o.divergence, *late.unpacked(_numbers(o), o.numbers), o.ignore_index, o.unlabeled_index, o.reduction, op
    )
    if target is not None and options.hard_weight == 0 and (adjust is None or not adjust.by_label):
        if looked_at:
            target, options = mask_of(target, options)
        else:
            target, options = as_mask(op, classes, target, sample_weight, options)
    return options, target


def _numbers(options: DistillOptions) -> tuple[Any, ...]:
    return options[1:7]
