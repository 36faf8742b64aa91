"""Measures of a student, and of its closeness to its teacher: plain floats, measured in eval mode."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tgt_fast._bars import batches
from tgt_fast.errors import ArgumentError, DeviceError, ShapeError
from tgt_fast.explore.processes import of_all_processes
from tgt_fast.explore.student import student_logits
from tgt_fast.ops import _checks
from tgt_fast.ops.counts import counting_group
from tgt_fast.teacher.batches import Columns, check_loader, split_batches
from tgt_fast.teacher.modes import eval_mode
from tgt_fast.teacher.returned import LogitsOf, check_logits_of
from tgt_fast.train.data import module_device, to_device
from tgt_fast.train.processes import evaluating_group


def class_thirds(class_counts: Sequence[int] | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Head, middle and tail: the classes in three groups by their number of training examples.

    Classes are sorted from the most frequent to the rarest (ties in order of class index) and cut into three
    groups of
    as equal a number of classes as possible, the larger groups first: ten classes give 4, 3 and 3.

    Args:
        class_counts: the number of training examples of each class, (C,), C >= 3.

    Returns:
        Three int64 tensors of class indices.

    Raises:
        ArgumentError: fewer than three classes, or a negative count.

    >>> [third.tolist() for third in class_thirds([5, 50, 20, 1])]
    [[1, 2], [0], [3]]
    """
    if isinstance(class_counts, Tensor):
        counts = _checks.integers("class_thirds", "class_counts", class_counts).cpu()
    else:
        try:
            counts = torch.tensor([int(count) for count in class_counts], device="cpu")
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ArgumentError(f"class_counts must be counts, got {class_counts!r} ({error})") from None
    if counts.dim() != 1 or counts.numel() < 3 or bool((counts < 0).any()):
        raise ArgumentError(
            f"class_counts: expected at least 3 non-negative counts in one dimension, got {class_counts}"
        )
    head, middle, tail = torch.argsort(counts, descending=True, stable=True).tensor_split(3)
    return head, middle, tail


def accuracy(logits: Tensor, target: Tensor, *, classes: Tensor | None = None) -> float:
    """mean(argmax(logits) == target), over the examples whose target is a class (>= 0).

    Args:
        logits: (..., C).
        target: (...) int64. Negative entries (ignored, unlabeled) do not count.
        classes: count only examples of these classes, such as one of :func:`class_thirds`.

    Returns:
        A fraction between 0 and 1; NaN when nothing counts.

    >>> accuracy(torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 0, -1]))
    0.5

    Raises:
        ShapeError: the shapes do not fit.
    """
    _check_rows("accuracy", logits, target)
    counted = target >= 0
    if classes is not None:
        counted &= torch.isin(target, _checks.integers("accuracy", "classes", classes).to(target.device))
    return _ratio((logits.argmax(-1) == target)[counted].sum().item(), counted.sum().item())


def class_accuracy(logits: Tensor, target: Tensor) -> list[float]:
    """:func:`accuracy` on each class's own examples: C floats, NaN for a class without any.

    Raises:
        ShapeError: the shapes do not fit.
        ArgumentError: a target is not below C.
    """
    _check_rows("class_accuracy", logits, target)
    correct, total = _class_hits("class_accuracy", logits, target)
    return [_ratio(hits, count) for hits, count in zip(correct.tolist(), total.tolist(), strict=True)]


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> float:
    """mean(argmax(student) == argmax(teacher)) over the rows of (..., C) logits; NaN when there are none.

    Raises:
        ShapeError: the shapes differ.
    """
    _check_same("agreement", student_logits, teacher_logits)
    same = student_logits.argmax(-1) == teacher_logits.argmax(-1)
    return _ratio(same.sum().item(), same.numel())


def mean_kl(student_logits: Tensor, teacher_logits: Tensor) -> float:
    """mean over rows of KL(teacher || student) = sum_c p_c (log p_c - log q_c), in nats, at temperature 1.

    Computed in float64. A class that the teacher's logits exclude (-inf) adds nothing.

    Args:
        student_logits, teacher_logits: (..., C).

    Returns:
        A float >= 0; +inf where the student excludes a class that the teacher does not; NaN when there are no
        rows.

    Raises:
        ShapeError: the shapes differ.
    """
    _check_same("mean_kl", student_logits, teacher_logits)
    rows = _row_kl(student_logits, teacher_logits)
    return _ratio(rows.sum().item(), rows.numel())


@torch.no_grad()
def evaluate(
    student: nn.Module,
    teacher: Any | None,
    loader: Iterable[Any],
    *,
    class_counts: Sequence[int] | Tensor | None = None,
    columns: Sequence[Any] | None = None,
    group: Any = None,
    progress: bool | None = None,
    logits_of: LogitsOf = None,
) -> dict[str, float]:
    """Measure a student on a loader, in eval mode; its train/eval flags are afterwards as they were.

    Args:
        student: inputs -> logits (B, ..., C), or what holds them; see ``logits_of``.
        teacher: a ``Teacher``, whose ``student_view`` prepares the student's input, or None.
        loader: gives ``(x, y)``, ``(ids, x, y)`` or, for a comparison with the teacher alone, ``x``.
        class_counts: the training examples of each class; adds the accuracies on :func:`class_thirds`.
        columns: ``(ids, x, y)``, where they are in other batches, as for :func:`fit`.
        group: "world", or a process group of ``torch.distributed``, whose processes all call, each with its part of
            the data: the result is that of all of it, the same in each. What a ``DistributedSampler`` repeats as
            padding is not counted twice. None: this process alone, or, where :func:`fit` evaluates a student of
            several processes, those.
        progress: show a bar; None: on a terminal, where it takes longer than a second, unless a run that shows none
            evaluates.
        logits_of: where the logits are in what the student returns, as for :class:`tgt_fast.TGTObjective`.

    Returns:
        ``accuracy`` (a fraction; NaN without labels); with ``class_counts`` also ``head``, ``middle`` and
        ``tail`` (NaN where no example is of that third); with a teacher also ``agreement`` and ``mean_kl``.

    Raises:
        ArgumentError: the loader gave no batch or batches that can be read in more than one way, or ``class_counts``
            does not fit.
        ShapeError: student, teacher and labels do not fit together.
        DTypeError: there are no logits in what the student returned.
    """
    if not isinstance(student, nn.Module):
        raise ArgumentError(f"evaluate: the student must be a torch.nn.Module, got {type(student).__name__}")
    if teacher is not None and not (hasattr(teacher, "student_view") and hasattr(teacher, "label")):
        raise ArgumentError(f"evaluate: the teacher must be a tgt_fast.Teacher or None, got {type(teacher).__name__}")
    check_logits_of("evaluate", logits_of)
    device = module_device(student)
    parts = Columns("evaluate", columns)
    check_loader("evaluate", loader)
    progress = None if progress is None else _checks.flag("evaluate", "progress", progress)
    together = counting_group("evaluate", evaluating_group() if group is None else group, name="group")

    def measured() -> _Sums:
        sums = _Sums()
        with eval_mode(student):
            made = split_batches(loader, parts, padding=together is None)
            for (_, x, y), kept in batches(made, loader, "evaluate", progress):
                x, y = to_device((x, y), device)
                view = x if teacher is None else teacher.student_view(x)
                logits = student_logits("evaluate", student, view, logits_of, getattr(teacher, "class_dim", -1))
                sums.add(logits, y, None if teacher is None else teacher.label(x), kept)
        return sums.on_the_host()

    sums = _Sums()
    for of_process in of_all_processes("evaluate", together, measured):
        sums.merge(of_process)
    if not sums.batches:
        raise ArgumentError("evaluate: the loader gave no batch")
    hits, totals = sums.hits, sums.totals
    result = {
        "accuracy": math.nan if hits is None or totals is None else _ratio(hits.sum().item(), totals.sum().item())
    }
    if class_counts is not None:
        thirds = class_thirds(class_counts)
        for name, classes in zip(("head", "middle", "tail"), thirds, strict=True):
            result[name] = math.nan
            if hits is not None and totals is not None:
                if len(class_counts) != hits.numel():
                    raise ArgumentError(
                        f"evaluate: {len(class_counts)} class_counts for a student of {hits.numel()} classes"
                    )
                result[name] = _ratio(hits[classes].sum().item(), totals[classes].sum().item())
    if teacher is not None:
        result["agreement"] = _ratio(float(sums.agreed), sums.rows)
        result["mean_kl"] = _ratio(float(sums.kl), sums.rows)
    return result


@dataclass
class _Sums:
    """Over the examples of an evaluation; on the device until the end."""

    hits: Tensor | None = None  # [C]
    totals: Tensor | None = None  # [C]
    rows: int = 0
    agreed: Tensor | float = 0.0
    kl: Tensor | float = 0.0
    batches: int = 0

    def add(self, logits: Tensor, y: Tensor | None, labels: Tensor | None, kept: int | None) -> None:
        """A batch, of which the first ``kept`` examples count."""
        self.batches += 1
        if y is not None:
            _check_rows("evaluate", logits, y)
            hits, totals = _class_hits("evaluate", logits[:kept], y[:kept])
            self.hits = hits if self.hits is None else self.hits + hits
            self.totals = totals if self.totals is None else self.totals + totals
        if labels is not None:
            _check_same("evaluate", logits, labels)
            logits, labels = logits[:kept], labels[:kept]
            self.rows += labels[..., 0].numel()
            self.agreed = self.agreed + (logits.argmax(-1) == labels.argmax(-1)).sum()
            self.kl = self.kl + _row_kl(logits, labels).sum()

    def on_the_host(self) -> _Sums:
        return replace(self, agreed=float(self.agreed), kl=float(self.kl))

    def merge(self, other: _Sums) -> None:
        """Those of another process."""
        for name in ("hits", "totals"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if theirs is not None:
                setattr(self, name, theirs if mine is None else mine + theirs)
        self.rows += other.rows
        self.agreed, self.kl = self.agreed + other.agreed, self.kl + other.kl
        self.batches += other.batches


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _class_hits(name: str, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The examples of each class that were right, and all of them: two int64 tensors [C] on the CPU."""
    classes = logits.shape[-1]
    counted = target >= 0
    right = counted & (logits.argmax(-1) == target)
    most = int(target.max()) if target.numel() else -1
    if most >= classes:
        raise ArgumentError(f"{name}: a target is class {most}, but the logits have {classes} classes")
    total = torch.bincount(target[counted], minlength=classes).cpu()
    return torch.bincount(target[right], minlength=classes).cpu(), total


def _row_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q = torch.log_softmax(student.double(), -1)
    log_p = torch.log_softmax(teacher.double(), -1)
    terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))  # 0 * log 0 = 0
    return terms.sum(-1).clamp_min(0)


def _check_rows(name: str, logits: Tensor, target: Tensor) -> None:
    _checks.floating(name, "logits", logits)
    _checks.integers(name, "target", target)
    _checks.same_device(name, "target", target, "logits", logits)
    _check_classes(name, logits)
    if logits.shape[:-1] != target.shape:
        shape, hint = tuple(logits.shape), ""
        if target.shape == logits.shape:
            hint = "; they must be class indices, such as target.argmax(-1)"
        elif len(shape) > 2 and tuple(target.shape) == (shape[0], *shape[2:]):
            hint = "; classes are the last dimension here: logits.movedim(1, -1)"
        raise ShapeError(f"{name}: targets {tuple(target.shape)} do not fit the rows of logits {shape}{hint}")


def _check_classes(name: str, logits: Tensor) -> None:
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ShapeError(f"{name}: logits must be (..., C) with C >= 1, got {tuple(logits.shape)}")
    if logits.is_meta:
        raise DeviceError(f"{name}: logits on the device meta have no values")


def _check_same(name: str, student: Tensor, teacher: Tensor) -> None:
    for what, logits in (("student logits", student), ("teacher logits", teacher)):
        _checks.floating(name, what, logits)
        _check_classes(name, logits)
    _checks.same_device(name, "teacher logits", teacher, "student logits", student)
    if student.shape != teacher.shape:
        raise ShapeError(
            f"{name}: student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} differ"
        )
