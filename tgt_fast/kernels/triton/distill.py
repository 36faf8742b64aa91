"""The soft-label loss on logits, in Triton. Nothing waits for the device."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from tgt_fast.kernels.distill_calls import accumulate_dtype, dense, prepare, upstream
from tgt_fast.kernels.options import DistillOptions, Forward
from tgt_fast.kernels.triton import Kernels, kernels, launch, planning_device, running_on, two_floats
from tgt_fast.kernels.triton.tuning import Plan, elementwise_plan, plan_of, streaming_of

_REDUCE_BLOCK = 2048
_ROW_STATE = 11  # columns, see distill_row.py


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
            "SAME": ts == 1 and self.divergence not in ("mse", "none"),  # exp((s - max) / Ts) is exp(s - max)
        }

    def unit(self, classes: int) -> float:
        """The nats that log-probabilities are counted by: sums over a row stay in range, whatever its logits."""
        return 2.0 ** min((16 * classes - 1).bit_length() + self._rise, 120)


@functools.lru_cache(maxsize=256)
def _numbers(options: DistillOptions, hard: bool) -> _Numbers:
    return _Numbers(options, hard)


def _stride(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def _programs(rows: int, classes: int, plan: Plan) -> tuple[int, int]:
    """(programs, tiles a row) of a kernel with a tile a program."""
    tiles = -(-classes // plan.block)
    return -(-rows // plan.rows) * tiles, tiles


def empty_state(student: Tensor, teacher: Tensor) -> Tensor:
    """Room for what :func:`backward` needs of the rows."""
    return student.new_empty(_ROW_STATE, student.shape[0], dtype=accumulate_dtype(student, teacher))


def forward(
    student: Tensor,  # [N, C] dense rows
    teacher: Tensor,  # [N, C] dense rows
    target: Tensor | None,  # [N] int64
    sample_weight: Tensor | None,  # [N]
    normalizer: float | Tensor | None,
    options: DistillOptions,
    *,
    wanted: tuple[bool, bool] = (False, False),  # gradients to (student, teacher)
    keep_rows: bool = False,
    inplace: bool = False,
    want_stats: bool = False,
    plan: Plan | None = None,
) -> Forward:
    """Row losses, their reduction and the wanted gradients."""
    loaded = kernels()
    student, teacher = student.detach(), teacher.detach()
    rows, classes = student.shape
    accumulate = accumulate_dtype(student, teacher)
    wide = accumulate == torch.float64
    d_student = None
    if wanted[0]:
        d_student = student if inplace else student.new_empty(rows, classes)
    d_teacher = teacher.new_empty(rows, classes) if wanted[1] else None
    state = empty_state(student, teacher) if keep_rows else None
    stats = student.new_empty(6, rows, dtype=accumulate) if want_stats else None
    if rows == 0:
        shape = (0,) if options.reduction == "none" else ()
        zero = student.new_zeros(shape, dtype=accumulate)
        return Forward(zero, d_student, d_teacher, state, stats)
    loss, row_loss, target, weight = prepare(student, accumulate, target, sample_weight, options)
    numbers = _numbers(options, target is not None)
    plan = plan or plan_of(rows, classes, wide, planning_device(student))
    with running_on(student):
        divisor_at, divisor = _divisor(loaded, student, target, weight, normalizer, options)
        if stats is not None:  # before the logits are overwritten in place
            _statistics(
                loaded, student, teacher, target, weight, divisor_at, divisor, stats, numbers, options, wide, plan
            )
        partner = teacher if numbers.divergence != "none" else None  # else the teacher may hold anything
        module = loaded.distill
        kernel, constants, registers = module.distill_fwd_kernel, dict(numbers.constants), None
        if plan.kernel == "stream":
            kernel = module.distill_fwd_stream_kernel
            constants["STAGES"], registers = streaming_of(numbers.divergence)
        launch(
            kernel, -(-rows // plan.rows), student, partner, target, weight, divisor_at, row_loss,
            d_student, d_teacher, state, rows, classes, _stride(student), _stride(partner), _stride(d_student),
            _stride(d_teacher), options.ignore_index, options.unlabeled_index, *numbers.inverses, numbers.unit(classes),
            *numbers.beta, *numbers.temperature, *numbers.factors, *two_floats(divisor), **constants, WIDE=wide,
            ROWS=plan.rows, BLOCK=plan.block, warps=plan.warps, registers=registers,
        )  # fmt: skip
        if options.reduction != "none":
            launch(
                module.distill_reduce_kernel, 1, row_loss, divisor_at, *two_floats(divisor), loss, rows,
                BLOCK=_REDUCE_BLOCK, warps=8,
            )  # fmt: skip
    return Forward(loss, d_student, d_teacher, state, stats)


def _divisor(
    loaded: Kernels, student: Tensor, target: Tensor | None, sample_weight: Tensor | None,
    normalizer: float | Tensor | None, options: DistillOptions,
) -> tuple[Tensor | None, float]:  # fmt: skip
    """The divisor of the mean: a float64 number on the device, else the number beside it."""
    if options.reduction != "mean":
        return None, 1.0
    if isinstance(normalizer, Tensor):
        return normalizer.detach().to(torch.float64), 1.0
    if normalizer is not None:
        divisor = float(normalizer)
        if divisor == 0 or 1e-30 <= divisor <= 1e30:
            return None, divisor
        return student.new_full((), divisor, dtype=torch.float64), 1.0  # two float32 could not hold it
    rows, classes = student.shape
    if target is None and sample_weight is None:
        return None, float(rows)
    counted = student.new_empty((), dtype=torch.float64)
    launch(
        loaded.distill.distill_count_kernel, 1, target, sample_weight, counted, rows, classes, options.ignore_index,
        options.unlabeled_index, BLOCK=_REDUCE_BLOCK, warps=8,
    )  # fmt: skip
    return counted, 1.0


def _statistics(
    loaded: Kernels, student: Tensor, teacher: Tensor, target: Tensor | None, sample_weight: Tensor | None,
    divisor_at: Tensor | None, divisor: float, stats: Tensor, numbers: _Numbers, options: DistillOptions, wide: bool,
    plan: Plan,
) -> None:  # fmt: skip
    tile = elementwise_plan(plan)
    launch(
        loaded.distill.distill_stats_kernel, len(student), student, teacher, target, sample_weight, divisor_at,
        *two_floats(divisor), stats, *student.shape, _stride(student), _stride(teacher), options.ignore_index,
        options.unlabeled_index, *numbers.inverses, numbers.unit(student.shape[1]), WIDE=wide, BLOCK=tile.block,
        warps=tile.warps,
    )  # fmt: skip


def backward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    state: Tensor,  # [K, N] from forward
    d_loss: Tensor,  # 0-d, or [N]
    options: DistillOptions,
    *,
    wanted: tuple[bool, bool],
    inplace: bool = False,
    plan: Plan | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients from logits and saved row statistics, with the upstream gradient applied before rounding."""
    loaded = kernels()
    student, teacher = student.detach(), teacher.detach()
    rows, classes = student.shape
    d_student = None
    if wanted[0]:
        d_student = student if inplace else student.new_empty(rows, classes)
    d_teacher = teacher.new_empty(rows, classes) if wanted[1] else None
    if rows == 0:
        return d_student, d_teacher
    target, d_loss = dense(target), upstream(d_loss, state.dtype)
    wide = state.dtype == torch.float64
    numbers = _numbers(options, target is not None)
    partner = teacher if numbers.divergence != "none" else None
    tile = elementwise_plan(plan or plan_of(rows, classes, wide, planning_device(student)))
    with running_on(student):
        launch(
            loaded.finish.distill_bwd_kernel, -(-rows // tile.rows), student, partner, target, state, d_loss,
            d_student, d_teacher, rows, classes, _stride(student), _stride(partner), _stride(d_student),
            _stride(d_teacher), *numbers.inverses, numbers.unit(classes), *numbers.beta, *numbers.factors,
            UPSTREAM_PER_ROW=d_loss.dim() > 0, **numbers.constants, WIDE=wide, ROWS=tile.rows, BLOCK=tile.block,
            WHOLE=classes <= tile.block, warps=tile.warps,
        )  # fmt: skip
    return d_student, d_teacher


def scale_(grad: Tensor, d_loss: Tensor) -> None:
    """grad *= d_loss, a factor for all rows or one a row; reads nothing but the factor when that is 1."""
    if grad.numel() == 0:
        return
    loaded = kernels()
    d_loss = upstream(d_loss, accumulate_dtype(grad, grad))
    rows, classes = grad.shape
    tile = elementwise_plan(plan_of(rows, classes, grad.dtype == torch.float64, planning_device(grad)))
    programs, tiles = _programs(rows, classes, tile)
    arguments: tuple[Any, ...] = (grad.detach(), d_loss, rows, classes, grad.stride(0), tiles)
    with running_on(grad):
        launch(
            loaded.finish.distill_scale_kernel, programs, *arguments, PER_ROW=d_loss.dim() > 0, ROWS=tile.rows,
            BLOCK=tile.block, warps=tile.warps,
        )  # fmt: skip
