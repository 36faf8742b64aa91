"""The adjusted soft-label loss in Triton: all that a call is asked for in one kernel. Nothing waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast.kernels.adjust import LEAST_SKEW, Adjustments
from tgt_fast.kernels.calls import DistillCall, Gradients, Outputs, accumulate_dtype, dense, is_soft, prepared
from tgt_fast.kernels.options import ROW_COEFFICIENT, ROW_STATE
from tgt_fast.kernels.triton import kernels, launch, planning_device, running_on, two_floats
from tgt_fast.kernels.triton.distill_calls import divisor_of, grain_of, reduce, sides_of, stride_of
from tgt_fast.kernels.triton.tuning import Plan, adjusted_plan, adjusted_registers


def serves(call: DistillCall) -> bool:
    """True if a call's adjustments are among those that the kernel takes."""
    adjust = call.adjust
    if adjust is None or not isinstance(call.teacher, Tensor) or is_soft(call.target):
        return False
    return adjust.skew == 0 or adjust.skew >= LEAST_SKEW


class _Call:
    """A call as the kernels take it."""

    def __init__(self, call: DistillCall, plan: Plan | None) -> None:
        assert call.adjust is not None
        options, adjust = call.options, call.adjust
        self.student, self.teacher = sides_of(call)
        self.rows, self.classes = self.student.shape
        self.is_fp64 = accumulate_dtype(self.student, self.teacher) == torch.float64
        device = planning_device(self.student)
        self.plan = plan or adjusted_plan(self.rows, self.classes, self.is_fp64, device)
        self.target = None if call.target is None else dense(call.target)
        self.biases = (_vector(adjust.student_bias), _vector(adjust.teacher_bias))
        self.margin = _numbers(adjust.label_margin)
        self.temperatures = (_numbers(adjust.student_temperature), _numbers(adjust.teacher_temperature))
        self.counts = (options.ignore_index, options.unlabeled_index, (16 * self.classes - 1).bit_length())
        self.tempers = (*two_floats(options.temperature), *two_floats(options.teacher_temperature))
        self.standardize = adjust.standardize
        self.hard = self.target is not None and options.hard_weight != 0
        self.soft = options.soft_weight != 0
        self.form, first, second = _form(adjust, options.beta) if self.soft else ("plain", 0.0, 0.0)
        self.divergence = options.divergence if self.soft else "none"
        if self.form == "skewed":
            self.form = "mirrored" if self.divergence == "reverse_kl" else self.form
            self.divergence = "jsd"  # which it is as: of log-probabilities in nats, after the normalisers
        self.numbers = (
            *self.tempers, *two_floats(options.soft_weight), *two_floats(options.hard_weight),
            *two_floats(options.label_smoothing), *two_floats(first), *two_floats(second),
        )  # fmt: skip
        self.smoothed = self.hard and options.label_smoothing > 0

    def run(
        self, weight: Tensor | None, divisor_at: Tensor | None, divisor: float, row_loss: Tensor | None,
        grads: Gradients, coefficients: Tensor | None,
    ) -> None:  # fmt: skip
        """The kernel. Without room for losses the weights are those in the reduced loss."""
        teacher = self.teacher if self.soft else None  # else it may hold anything
        sizes = (self.classes, *map(stride_of, (self.student, teacher, *grads)))
        grain = grain_of(*sizes)
        launch(
            kernels().adjusted.distill_adjusted_kernel, -(-self.rows // self.plan.rows), self.student, teacher,
            *self.biases, self.margin if self.hard else None, *self.temperatures, self.target, weight, divisor_at,
            row_loss, *grads, coefficients, self.rows, *(size // grain for size in sizes), ROW_STATE, *self.counts,
            *self.numbers, *two_floats(divisor), DIVERGENCE=self.divergence, FORM=self.form,
            STANDARDIZED=self.standardize and self.soft, HARD=self.hard, SMOOTHED=self.smoothed, IS_FP64=self.is_fp64,
            GRAIN=grain, ROWS=self.plan.rows, BLOCK=self.plan.block, warps=self.plan.warps,
            registers=adjusted_registers(self.divergence, self.is_fp64),
        )  # fmt: skip

    def statistics(self, weight: Tensor | None, divisor_at: Tensor | None, divisor: float, stats: Tensor) -> None:
        sizes = (self.classes, self.student.stride(0), self.teacher.stride(0))
        grain = grain_of(*sizes)
        launch(
            kernels().adjusted_statistics.distill_adjusted_stats_kernel, -(-self.rows // self.plan.rows), self.student,
            self.teacher, *self.biases, *self.temperatures, self.target, weight, divisor_at, stats, self.rows,
            *(size // grain for size in sizes), *self.counts, *self.tempers, *two_floats(divisor),
            STANDARDIZED=self.standardize, IS_FP64=self.is_fp64, GRAIN=grain, ROWS=self.plan.rows,
            BLOCK=self.plan.block, warps=self.plan.warps, registers=adjusted_registers(self.divergence, self.is_fp64),
        )  # fmt: skip


def forward(call: DistillCall, out: Outputs, *, plan: Plan | None = None) -> None:
    """Row losses, their reduction and the wanted gradients."""
    loaded = kernels()
    if call.student.shape[0] == 0:
        out.loss.zero_()
        return
    made = _Call(call, plan)
    target, weight, row_loss = prepared(call, out)
    coefficients = None
    if out.row_state is not None:
        coefficients = out.row_state.zero_()[:, ROW_COEFFICIENT]
    with running_on(made.student):
        divisor_at, divisor = divisor_of(loaded, made.student, target, weight, call.divisor, call.options)
        if out.stats is not None:  # before the logits are overwritten in place
            made.statistics(weight, divisor_at, divisor, out.stats)
        made.run(weight, divisor_at, divisor, row_loss, (out.d_student, out.d_teacher), coefficients)
        if call.options.reduction != "none":
            reduce(loaded, row_loss, divisor_at, divisor, out.loss)


def backward(
    call: DistillCall, row_state: Tensor, d_loss: Tensor, grads: Gradients, *, plan: Plan | None = None
) -> None:
    """The gradients from logits and the rows' weights in the reduced loss: they are linear in those."""
    if call.student.shape[0] == 0:
        return
    made = _Call(call, plan)
    with running_on(made.student):
        weight = (row_state[:, ROW_COEFFICIENT] * d_loss.detach().double()).contiguous()
        made.run(weight, None, 1.0, None, grads, None)


def _form(adjust: Adjustments, beta: float) -> tuple[str, float, float]:
    """What the divergence is, and its two numbers."""
    if adjust.decoupled is not None:
        return "decoupled", *adjust.decoupled
    if adjust.correct_teacher is not None:
        return "corrected", adjust.correct_teacher, 0.0
    return ("skewed", adjust.skew, 0.0) if adjust.skew else ("plain", beta, 0.0)


def _vector(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().contiguous()


def _numbers(values: Any) -> Tensor | None:
    return None if values is None else values.detach().to(torch.float64).contiguous()
