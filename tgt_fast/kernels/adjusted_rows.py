"""A loss with adjustments on a kernel that does not take them: on logits that PyTorch adjusts, a chunk of rows a time.

The kernel makes the terms and their gradients, and PyTorch what is left: a pass or two over the logits before and after
it, and numbers a row. Nothing waits for a device, so what a row holds is never asked: every row is served.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.kernels import adjusted_labels
from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.adjusted_sides import Side, adjusted_side
from tgt_fast.kernels.calls import DistillCall, Gradients, Outputs, accumulate_dtype, is_soft, labels_of, soft_target
from tgt_fast.kernels.options import ROW_COEFFICIENT
from tgt_fast.kernels.reference import distill as reference

_ELEMENTS: Final = {"cpu": 1 << 18, "cuda": 1 << 24}  # of a chunk's logits


def serves(call: DistillCall) -> bool:
    """True if a call's adjustments are among those here."""
    return call.adjust is not None and not call.adjust.skew and isinstance(call.teacher, Tensor)


def chunks(call: DistillCall) -> list[slice]:
    """The rows of a call, as many at once as PyTorch's intermediate results are to have memory for."""
    rows, classes = call.student.shape
    step = max(1, _ELEMENTS.get(call.student.device.type, 1 << 20) // max(1, classes))
    return [slice(start, start + step) for start in range(0, rows, step)]


def rows_of(call: DistillCall, at: slice) -> DistillCall:
    """A call for some of the rows."""
    assert isinstance(call.teacher, Tensor)
    assert call.adjust is not None
    return call._replace(
        student=call.student[at], teacher=call.teacher[at], target=None if call.target is None else call.target[at],
        sample_weight=None if call.sample_weight is None else call.sample_weight[at], adjust=call.adjust.of_rows(at),
    )  # fmt: skip


def forward(kernel: Any, call: DistillCall, out: Outputs) -> None:
    """Row losses, their reduction and the wanted gradients."""
    weight = call.sample_weight
    if weight is not None:  # one that is out of range drops the row: on a device it cannot be an error
        weight = torch.where((weight > 0) & weight.isfinite(), weight, 0.0)
    counted, _, weight, divisor = reference._counts(call.student, call.target, weight, call.divisor, call.options)
    if call.options.reduction == "mean":
        weight = torch.where(divisor != 0, weight / torch.where(divisor != 0, divisor, 1.0), 0.0)
    coefficient = torch.where(counted, weight, 0.0)
    rows = out.loss if call.options.reduction == "none" else out.loss.new_empty(len(call.student))
    _run(kernel, call, coefficient, rows, out.stats, (out.d_student, out.d_teacher))
    if rows is not out.loss:
        out.loss.copy_(rows.sum(dtype=torch.float64))
    if out.row_state is not None:
        out.row_state.zero_()[:, ROW_COEFFICIENT] = coefficient


def backward(kernel: Any, call: DistillCall, row_state: Tensor, d_loss: Tensor, grads: Gradients) -> None:
    """The gradients from logits and the rows' weights in the reduced loss."""
    coefficient = row_state[:, ROW_COEFFICIENT] * d_loss.detach().double()
    dtype = accumulate_dtype(call.student, call.teacher)
    rows = torch.empty(len(call.student), dtype=dtype, device=row_state.device)
    _run(kernel, call, coefficient.abs(), rows, None, grads)
    # A kernel takes weights from 0; gradients are linear in them.
    sign = torch.where(coefficient < 0, -1.0, 1.0)
    for grad in grads:
        if grad is not None:
            kernel.scale_(grad, sign)


def _run(
    kernel: Any, call: DistillCall, coefficient: Tensor, rows: Tensor, stats: Tensor | None, grads: Gradients
) -> None:
    """Losses times coefficients, statistics and gradients, where there is room for them."""
    _, labeled, *_ = reference._counts(call.student, call.target, None, 1.0, call.options)
    for at in chunks(call):
        d_student, d_teacher = (None if grad is None else grad[at] for grad in grads)
        chunk = rows_of(call, at)._replace(
            options=call.options._replace(reduction="none"), sample_weight=coefficient[at], divisor=None,
            want_row_state=False, want_stats=False, inplace=False,
        )  # fmt: skip
        found = None if stats is None else stats.new_empty(6, len(chunk.student))
        _Chunk(kernel, chunk, labeled[at]).run(Outputs(rows[at], found, d_student, d_teacher))
        if stats is not None and found is not None:
            stats[:, at] = found


class _Chunk:
    """Some rows, whose weights are those in the reduced loss, 0 where a row does not count."""

    def __init__(self, kernel: Any, call: DistillCall, labeled: Tensor) -> None:
        assert call.adjust is not None
        assert isinstance(call.teacher, Tensor)
        assert call.sample_weight is not None
        self._kernel, self._call, self._labeled = kernel, call, labeled
        self._adjust: Adjustments = call.adjust
        self._teacher: Tensor = call.teacher
        self._weight: Tensor = call.sample_weight
        self._dtype = accumulate_dtype(call.student, call.teacher)
        labels = labels_of(call.target)
        self._index = torch.zeros_like(labeled, dtype=torch.int64)
        if labels is not None:
            self._index = torch.where(labeled, labels, 0)

    def run(self, out: Outputs) -> None:
        """Fills what there is room for. The student's gradient may lie where its logits do."""
        options, a = self._call.options, self._adjust
        soft, hard = options.soft_weight != 0, options.hard_weight != 0 and self._call.target is not None
        scores = a.standardize or a.student_temperature is not None
        apart = soft and (scores or a.by_label)
        apart = apart or (hard and a.label_margin is not None) or (scores and out.stats is not None)
        if not apart:
            student, teacher = (
                x if bias is None else x.to(self._dtype) + bias.to(self._dtype)
                for x, bias in ((self._call.student, a.student_bias), (self._teacher, a.teacher_bias))
            )
            self._launch(student, teacher, self._weight, out, target=self._call.target)
            return
        self._in_parts(out, soft, hard)

    def _in_parts(self, out: Outputs, soft: bool, hard: bool) -> None:
        """The hard term of its own logits, and the soft one of its own."""
        student = self._own(self._call.student, self._adjust.student_bias)
        of_hard = torch.zeros_like(out.loss)
        d_hard = None
        if hard:
            d_hard = torch.empty_like(student) if soft and out.d_student is not None else out.d_student
            self._hard_term(student, Outputs(of_hard, None, d_hard, None if soft else out.d_teacher))
        if not soft and out.stats is None:
            out.loss.copy_(of_hard)
            return
        sides, factor = self._sides(student)
        if out.stats is not None:
            self._statistics(sides, out.stats)
        if not soft:
            out.loss.copy_(of_hard)
            if not hard:
                for grad in (out.d_student, out.d_teacher):
                    if grad is not None:
                        grad.zero_()
            return
        made = [None if grad is None else torch.empty_like(student) for grad in (out.d_student, out.d_teacher)]
        self._soft_term(sides, out.loss, (made[0], made[1]))
        if factor is not None:
            out.loss.mul_(factor)
        out.loss.add_(of_hard)
        for side, grad, of_label, room in zip(sides, made, (d_hard, None), (out.d_student, out.d_teacher), strict=True):
            if grad is None or room is None:
                continue
            side.back_(grad)
            room.copy_(grad if of_label is None else grad.add_(of_label))

    def _own(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        """Logits in memory of our own, as the arithmetic is, with their bias; 0 in rows that do not count."""
        made = torch.where((self._weight != 0)[:, None], logits.to(self._dtype), 0.0)
        return made if bias is None else made.add_(bias.to(self._dtype))

    def _launch(
        self, student: Tensor, teacher: Tensor, weight: Tensor, out: Outputs, *, target: Tensor | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        """The kernel, for losses times weights."""
        room = out.d_student
        if room is not None and room.dtype != student.dtype:  # kernels write a student's gradient as its logits are
            out = out._replace(d_student=torch.empty_like(student))
        call = self._call._replace(
            options=self._call.options._replace(**options), student=student, teacher=teacher, target=target,
            sample_weight=weight, want_d_student=out.d_student is not None, want_d_teacher=out.d_teacher is not None,
            want_stats=out.stats is not None, adjust=None,
        )  # fmt: skip
        if is_soft(target):
            soft_target().forward(self._kernel, call, out)
        else:
            self._kernel.forward(call, out)
        if room is not None and out.d_student is not None and room is not out.d_student:
            room.copy_(out.d_student)

    def _hard_term(self, student: Tensor, out: Outputs) -> None:
        """Of the label's logit lowered by its margin, which is put back."""
        margin, at = self._adjust.label_margin, self._index[:, None]
        if margin is not None:
            its = student.gather(1, at)
            lower = torch.where(self._labeled, margin.to(self._dtype).gather(0, self._index), 0.0)
            student.scatter_(1, at, its - lower[:, None])
        self._launch(student, student, self._weight, out, target=self._call.target, soft_weight=0.0)
        if margin is not None:
            student.scatter_(1, at, its)

    def _sides(self, student: Tensor) -> tuple[tuple[Side, Side], Tensor | None]:
        """Both sides of the soft term, and what the rows' losses are yet to be multiplied by."""
        a, centred = self._adjust, self._call.options.divergence != "mse"
        teacher = self._own(self._teacher, a.teacher_bias)
        factor = None
        if a.student_temperature is not None and centred:
            # Half of its square: the other half goes into the kernel's weights, and none is out of range.
            factor = a.student_temperature.to(torch.float64)
        ours, theirs = (
            adjusted_side(logits, temperature, factor, standardize=a.standardize, centred=centred)
            for logits, temperature in ((student, a.student_temperature), (teacher, a.teacher_temperature))
        )
        return (ours, theirs), factor

    def _tempers(self) -> dict[str, Any]:
        """Temperatures of the kernel's calls where the rows have their own."""
        by_row = self._adjust.student_temperature is not None
        return {"temperature": 1.0, "teacher_temperature": 1.0} if by_row else {}

    def _statistics(self, sides: tuple[Side, Side], stats: Tensor) -> None:
        nothing = stats.new_empty(stats.shape[1])
        ours, theirs = (side.logits for side in sides)
        self._launch(ours, theirs, self._weight, Outputs(nothing, stats), hard_weight=0.0, **self._tempers())
        for i, side in enumerate(sides):
            if side.shift is not None:  # of the log-sum-exps, the last two
                stats[4 + i].add_(torch.where(self._weight != 0, side.shift, 0.0))

    def _soft_term(self, sides: tuple[Side, Side], loss: Tensor, grads: Gradients) -> None:
        options: dict[str, Any] = {"hard_weight": 0.0, **self._tempers()}
        weight, temperature = self._weight, self._adjust.student_temperature
        if temperature is not None and self._call.options.divergence != "mse":
            weight = weight * temperature.to(torch.float64)

        def launch(student: Tensor, teacher: Tensor, weight: Tensor, loss: Tensor, grads: Gradients) -> None:
            self._launch(student, teacher, weight, Outputs(loss, None, *grads), **options)

        logits = (sides[0].logits, sides[1].logits)
        if not self._adjust.by_label:
            launch(*logits, weight, loss, grads)
            return
        o = self._call.options._replace(**options)
        rows = adjusted_labels.Rows(
            logits, (o.temperature, o.teacher_temperature), weight, o.soft_weight * o.temperature**2, self._labeled,
            self._index,
        )  # fmt: skip
        if self._adjust.decoupled is not None:
            adjusted_labels.decoupled(rows, self._adjust.decoupled, launch, loss, grads)
        elif self._adjust.correct_teacher is not None:
            adjusted_labels.corrected(rows, self._adjust.correct_teacher, launch, loss, grads)
