"""The soft-label loss on logits, in Triton. Nothing waits for the device."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from tgt_fast.kernels.calls import (
    DistillCall,
    Gradients,
    Outputs,
    accumulate_dtype,
    dense,
    prepared,
    upstream,
)
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.kernels.triton import Kernels, adjusted, kernels, launch, planning_device, running_on, two_floats
from tgt_fast.kernels.triton.distill_calls import divisor_of, grain_of, reduce, sides_of, stride_of
from tgt_fast.kernels.triton.tuning import Plan, elementwise_plan, plan_of, streaming_of


class _Numbers:
    """The options as the kernels take them: numbers as two floats each, choices as constants."""

    def __init__(self, options: DistillOptions, hard: bool) -> None:
        ts, tt = options.temperature, options.teacher_temperature
        squared = 1.0 if options.divergence == "mse" else ts * ts
        self.divergence = options.divergence if options.soft_weight != 0 else "none"
        self.inverses = (*two_floats(1 / ts), *two_floats(1 / tt))
        self._rise = math.ceil(-math.log2(min(ts, tt, 1.0)))
        self.beta = two_floats(options.beta)
        self.temperature = two_floats(ts)
        self.factors = (
            *two_floats(options.soft_weight * squared / ts), *two_floats(options.soft_weight * squared / tt),
            *two_floats(options.hard_weight), *two_floats(options.label_smoothing),
        )  # fmt: skip
        self.constants: dict[str, Any] = {
            "DIVERGENCE": self.divergence,
            "SMOOTHED": hard and options.label_smoothing > 0,
            # exp(s - max) is that power of exp((s - max) / Ts), where there is this; 0: another exponential
            "POWER": int(ts) if ts in (1, 2, 3, 4) and self.divergence not in ("mse", "none") else 0,
        }

    def unit(self, classes: int) -> float:
        """The nats that log-probabilities are counted by: sums over a row stay in range, whatever its logits."""
        return 2.0 ** min((16 * classes - 1).bit_length() + self._rise, 120)


@functools.lru_cache(maxsize=256)
def _numbers(options: DistillOptions, hard: bool) -> _Numbers:
    return _Numbers(options, hard)


def unit_of(options: DistillOptions, classes: int) -> float:
    """The nats by which the sums of a row's state are counted, of so many classes."""
    return _numbers(options, False).unit(classes)


def _programs(rows: int, classes: int, plan: Plan) -> tuple[int, int]:
    """(programs, tiles a row) of a kernel with a tile a program."""
    tiles = -(-classes // plan.block)
    return -(-rows // plan.rows) * tiles, tiles


def _columns(row_state: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The memory of the rows' state as the kernels use it: a column a number, in the dtype of the arithmetic."""
    return None if row_state is None else row_state.view(dtype)


def takes_adjustments(call: DistillCall) -> bool:
    """True if a call's adjustments are among those that have a kernel."""
    return adjusted.serves(call)


def forward(call: DistillCall, out: Outputs, *, plan: Plan | None = None) -> None:
    """Row losses, their reduction and the wanted gradients."""
    if call.adjust is not None:
        adjusted.forward(call, out, plan=plan)
        return
    loaded = kernels()
    options, (student, teacher) = call.options, sides_of(call)
    rows, classes = student.shape
    is_fp64 = out.loss.dtype == torch.float64
    if rows == 0:
        out.loss.zero_()
        return
    target, weight, row_loss = prepared(call, out)
    if out.row_state is not None:
        out.row_state.zero_()  # there is more room than the kernels write
    numbers = _numbers(options, target is not None)
    plan = plan or plan_of(rows, classes, is_fp64, planning_device(student))
    with running_on(student):
        divisor_at, divisor = divisor_of(loaded, student, target, weight, call.divisor, options)
        if out.stats is not None:  # before the logits are overwritten in place
            _statistics(
                loaded, student, teacher, target, weight, divisor_at, divisor, out.stats, numbers, options, is_fp64,
                plan,
            )  # fmt: skip
        partner = teacher if numbers.divergence != "none" else None  # else the teacher may hold anything
        module = loaded.distill
        kernel, constants, registers = module.distill_fwd_kernel, dict(numbers.constants), None
        if plan.kernel == "stream":
            kernel = module.distill_fwd_stream_kernel
            constants["STAGES"], registers = streaming_of(numbers.divergence)
        sizes = (classes, *map(stride_of, (student, partner, out.d_student, out.d_teacher)))
        grain = grain_of(*sizes)
        launch(
            kernel, -(-rows // plan.rows), student, partner, target, weight, divisor_at, row_loss, out.d_student,
            out.d_teacher, _columns(out.row_state, out.loss.dtype), rows, *(size // grain for size in sizes),
            options.ignore_index, options.unlabeled_index, *numbers.inverses, numbers.unit(classes), *numbers.beta,
            *numbers.temperature, *numbers.factors, *two_floats(divisor), **constants, IS_FP64=is_fp64, GRAIN=grain,
            ROWS=plan.rows, BLOCK=plan.block, warps=plan.warps, registers=registers,
        )  # fmt: skip
        if options.reduction != "none":
            reduce(loaded, row_loss, divisor_at, divisor, out.loss)


def _statistics(
    loaded: Kernels, student: Tensor, teacher: Tensor, target: Tensor | None, sample_weight: Tensor | None,
    divisor_at: Tensor | None, divisor: float, stats: Tensor, numbers: _Numbers, options: DistillOptions, is_fp64: bool,
    plan: Plan,
) -> None:  # fmt: skip
    tile, rows, classes = elementwise_plan(plan), *student.shape
    sizes = (classes, student.stride(0), teacher.stride(0))
    grain = grain_of(*sizes)
    launch(
        loaded.distill.distill_stats_kernel, rows, student, teacher, target, sample_weight, divisor_at,
        *two_floats(divisor), stats, rows, *(size // grain for size in sizes), options.ignore_index,
        options.unlabeled_index, *numbers.inverses, numbers.unit(classes), IS_FP64=is_fp64, GRAIN=grain,
        BLOCK=tile.block, warps=tile.warps,
    )  # fmt: skip


def backward(
    call: DistillCall, row_state: Tensor, d_loss: Tensor, grads: Gradients, *, plan: Plan | None = None
) -> None:
    """The gradients from logits and saved row statistics, with the upstream gradient applied before rounding."""
    if call.adjust is not None:
        adjusted.backward(call, row_state, d_loss, grads, plan=plan)
        return
    loaded = kernels()
    student, teacher = sides_of(call)
    rows, classes = student.shape
    if rows == 0:
        return
    dtype = accumulate_dtype(student, teacher)
    target, d_loss = dense(call.target), upstream(d_loss, dtype)
    is_fp64 = dtype == torch.float64
    numbers = _numbers(call.options, target is not None)
    partner = teacher if numbers.divergence != "none" else None
    tile = elementwise_plan(plan or plan_of(rows, classes, is_fp64, planning_device(student)))
    sizes = (classes, *map(stride_of, (student, partner, *grads)))
    grain = grain_of(*sizes)
    with running_on(student):
        launch(
            loaded.finish.distill_bwd_kernel, -(-rows // tile.rows), student, partner, target,
            _columns(row_state, dtype), d_loss, *grads, rows, *(size // grain for size in sizes), *numbers.inverses,
            numbers.unit(classes), *numbers.beta, *numbers.factors, UPSTREAM_PER_ROW=d_loss.dim() > 0,
            **numbers.constants, IS_FP64=is_fp64, GRAIN=grain, ROWS=tile.rows, BLOCK=tile.block,
            WHOLE=classes <= tile.block, warps=tile.warps,
        )  # fmt: skip


def scale_(grad: Tensor, d_loss: Tensor) -> None:
    """grad *= d_loss, a factor for all rows or one a row; reads nothing but the factor when that is 1."""
    if grad.numel() == 0:
        return
    loaded = kernels()
    d_loss = upstream(d_loss, accumulate_dtype(grad, grad))
    rows, classes = grad.shape
    tile = elementwise_plan(plan_of(rows, classes, grad.dtype == torch.float64, planning_device(grad)))
    programs, tiles = _programs(rows, classes, tile)
    grain = grain_of(classes, grad.stride(0))
    sizes = (classes // grain, grad.stride(0) // grain)
    with running_on(grad):
        launch(
            loaded.finish.distill_scale_kernel, programs, grad.detach(), d_loss, rows, *sizes, tiles,
            PER_ROW=d_loss.dim() > 0, GRAIN=grain, ROWS=tile.rows, BLOCK=tile.block, warps=tile.warps,
        )  # fmt: skip
