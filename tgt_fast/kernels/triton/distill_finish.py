"""The end of a row, after its sums, in Triton: its loss, its state, and the gradients of a tile from a state."""

import triton
import triton.language as tl

from tgt_fast.kernels.triton.distill_peak import folded, student_peak, teacher_peak, with_peak, write_peak
from tgt_fast.kernels.triton.distill_row import (
    COUNTS,
    FINITE,
    HARD,
    HARD_SUM,
    KIND,
    SHRINK,
    SOFT,
    STUDENT_MAX,
    STUDENT_SUM,
    TEACHER_MAX,
    TEACHER_SUM,
    X,
    Y,
    finite_maximum,
    hard_value,
    load_tile,
    shrunk,
    soft_value,
    store_tile,
    student_tile,
    teacher_tile,
)
from tgt_fast.kernels.triton.numbers import INFINITY, cast, real


@triton.jit
def close_rows(
    row, live, label, coefficient, counts, active,  # from open_rows
    of_label,  # the label's logit
    s_max, t_max, student_sum, teacher_sum, hard_sum, linear, finite, x, y,
    problem,  # the largest of problems_of
    beta, unit, soft_loss, temperature, hard_weight, smoothing,
    rows, row_loss, row_state,
    DIVERGENCE: tl.constexpr, LABELS: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """Writes losses and, where wanted, states of rows.  -> x, y, the terms' coefficients, the kind of the gradients"""
    if DIVERGENCE == "mse" or DIVERGENCE == "none":
        invalid = (problem == 2) | (s_max == -INFINITY) | (t_max == -INFINITY)
    else:  # an exponential that is not a number shows in the sum
        invalid = (problem == 2) | ~(student_sum < INFINITY) | ~(teacher_sum < INFINITY)
        invalid = invalid | (s_max == -INFINITY) | (t_max == -INFINITY)
    infinite = problem == 1
    x = tl.where(infinite, 0.0, x)
    y = tl.where(infinite, 0.0, y)
    soft = soft_value(x, y, student_sum, teacher_sum, beta, unit, coefficient, temperature, soft_loss, DIVERGENCE)
    loss = tl.where(infinite, coefficient * INFINITY, soft)
    soft_coefficient = tl.where(infinite, 0.0, coefficient)
    hard_coefficient = coefficient * 0.0
    if LABELS:
        hard, missing = hard_value(shrunk(of_label, s_max), hard_sum, linear, finite, smoothing, SMOOTHED)
        loss += tl.where(label >= 0, ((coefficient * hard_weight) * hard) / SHRINK, 0.0)
        hard_coefficient = tl.where((label >= 0) & ~missing, coefficient, 0.0)
    loss = tl.where(invalid, coefficient * float("nan"), loss).to(row_loss.dtype.element_ty)
    tl.store(row_loss + row, tl.where(counts, loss, 0.0), mask=live)
    kind = tl.where(active, tl.where(invalid, float("nan"), 1.0), 0.0)
    if row_state is not None:
        write_row_state(
            row_state, rows, row, live, finite_maximum(s_max), finite_maximum(t_max), student_sum, teacher_sum,
            hard_sum, finite, x, y, soft_coefficient, hard_coefficient, kind, SMOOTHED,
        )  # fmt: skip
    return x, y, soft_coefficient, hard_coefficient, kind


@triton.jit
def write_row_state(
    row_state, rows, row, live, s_max, t_max, student_sum, teacher_sum, hard_sum, finite, x, y, soft, hard, kind,
    SMOOTHED: tl.constexpr,
):  # fmt: skip
    """Writes the rows' row_state, a column a number."""
    at = row_state + row
    column = rows.to(tl.int64)
    tl.store(at + STUDENT_MAX * column, s_max, mask=live)
    tl.store(at + TEACHER_MAX * column, t_max, mask=live)
    tl.store(at + STUDENT_SUM * column, student_sum, mask=live)
    tl.store(at + TEACHER_SUM * column, teacher_sum, mask=live)
    tl.store(at + HARD_SUM * column, hard_sum, mask=live)
    if SMOOTHED:
        tl.store(at + FINITE * column, finite, mask=live)
    else:  # a zero that other values are selected from as well makes Triton 3.5 and 3.6 emit code that is not valid
        tl.store(at + FINITE * column, 0.0, mask=live)
    tl.store(at + X * column, x, mask=live)
    tl.store(at + Y * column, y, mask=live)
    tl.store(at + SOFT * column, soft, mask=live)
    tl.store(at + HARD * column, hard, mask=live)
    tl.store(at + KIND * column, kind, mask=live)


@triton.jit
def write_tile(
    s, t, row, live, col, classes, label,
    d_student, d_teacher, d_student_stride, d_teacher_stride,
    s_max, t_max, student_sum, teacher_sum, hard_sum, finite, x, y, soft, hard, kind,
    inverse_ts, inverse_tt, beta, unit, soft_student, soft_teacher, hard_weight, smoothing,
    peaks,  # of the tiles before, from no_peaks; not read where a tile is a whole row
    DIVERGENCE: tl.constexpr, LABELS: tl.constexpr, SMOOTHED: tl.constexpr, POWER: tl.constexpr, IS_FP64: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Writes the wanted gradients of a tile. The student's may overwrite its logits: both sides are read by now."""
    of_student, student_at, of_teacher, teacher_at = peaks
    inverse_s = 1.0 / student_sum
    inverse_t = 1.0 / teacher_sum
    log_ratio = x * 0.0
    if DIVERGENCE == "jsd":
        log_ratio = tl.log(teacher_sum * inverse_s)
    usual = kind == 1.0
    if d_teacher is not None:
        grad = teacher_tile(
            s, t, s_max, t_max, inverse_ts, inverse_tt, inverse_s, inverse_t, log_ratio, x, y, beta,
            unit, soft * soft_teacher, DIVERGENCE, IS_FP64,
        )  # fmt: skip
        if DIVERGENCE != "mse" and DIVERGENCE != "none":  # which have no peak
            peak = teacher_peak(t, t_max, teacher_sum)
            if WHOLE:
                grad = with_peak(grad, peak)
            else:
                of_teacher += folded(tl.where(peak, 0.0, grad))
                teacher_at += folded(tl.where(peak, col + 1, 0))
        store_tile(d_teacher, row, live, d_teacher_stride, col, classes, tl.where(usual, grad, kind))
    if d_student is not None:
        inverse_h = inverse_s
        floor = x * 0.0
        hard = hard * hard_weight
        if LABELS:
            inverse_h = 1.0 / hard_sum
        if SMOOTHED:
            floor = smoothing / finite
        grad = student_tile(
            s, t, col, label, s_max, t_max, inverse_ts, inverse_tt, inverse_s, inverse_t, log_ratio, x, y, beta,
            unit, soft * soft_student, hard, inverse_h, floor, hard * (1 - smoothing),
            DIVERGENCE, LABELS, SMOOTHED, POWER, IS_FP64,
        )  # fmt: skip
        if DIVERGENCE != "mse":
            peak = student_peak(s, s_max, student_sum, hard_sum, hard, DIVERGENCE, LABELS)
            if WHOLE:
                grad = with_peak(grad, peak)
            else:
                of_student += folded(tl.where(peak, 0.0, grad))
                student_at += folded(tl.where(peak, col + 1, 0))
        store_tile(d_student, row, live, d_student_stride, col, classes, tl.where(usual, grad, kind))
    return of_student, student_at, of_teacher, teacher_at


@triton.jit
def no_peaks(s_max, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """For the first of several tiles."""
    nothing = folded(tl.zeros([ROWS, BLOCK], s_max.dtype))
    nowhere = folded(tl.zeros([ROWS, BLOCK], tl.int32))
    return nothing, nowhere, nothing, nowhere


@triton.jit
def write_peaks(
    peaks, row, live, kind, d_student, d_teacher, d_student_stride, d_teacher_stride, DIVERGENCE: tl.constexpr
):  # fmt: skip
    """Writes the peaks, which the tiles leave to the last."""
    of_student, student_at, of_teacher, teacher_at = peaks
    live = live & (kind == 1.0)
    if (d_teacher is not None) and (DIVERGENCE != "mse") and (DIVERGENCE != "none"):
        write_peak(d_teacher, row, live, d_teacher_stride, of_teacher, teacher_at)
    if (d_student is not None) and (DIVERGENCE != "mse"):
        write_peak(d_student, row, live, d_student_stride, of_student, student_at)


@triton.jit(do_not_specialize=COUNTS)
def distill_bwd_kernel(
    student, teacher, target, row_state, upstream, d_student, d_teacher,
    rows, classes, student_stride, teacher_stride, d_student_stride, d_teacher_stride,
    inverse_ts_, inverse_ts_low, inverse_tt_, inverse_tt_low, unit_, beta_, beta_low,
    soft_student_, soft_student_low, soft_teacher_, soft_teacher_low,
    hard_weight_, hard_weight_low, smoothing_, smoothing_low,
    UPSTREAM_PER_ROW: tl.constexpr,
    DIVERGENCE: tl.constexpr, SMOOTHED: tl.constexpr, POWER: tl.constexpr, IS_FP64: tl.constexpr,
    GRAIN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The gradients from logits and states; the upstream gradient is applied before rounding. WHOLE: rows fit a tile"""
    LABELS: tl.constexpr = target is not None
    classes *= GRAIN
    student_stride *= GRAIN
    teacher_stride *= GRAIN
    d_student_stride *= GRAIN
    d_teacher_stride *= GRAIN
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    live = row < rows
    at = row_state + row
    column = rows.to(tl.int64)
    soft = tl.load(at + SOFT * column, mask=live, other=0.0)
    hard = tl.load(at + HARD * column, mask=live, other=0.0)
    kind = tl.load(at + KIND * column, mask=live, other=0.0)
    s_max = tl.load(at + STUDENT_MAX * column, mask=live, other=0.0)
    t_max = tl.load(at + TEACHER_MAX * column, mask=live, other=0.0)
    student_sum = tl.load(at + STUDENT_SUM * column, mask=live, other=1.0)
    teacher_sum = tl.load(at + TEACHER_SUM * column, mask=live, other=1.0)
    hard_sum = tl.load(at + HARD_SUM * column, mask=live, other=1.0)
    finite = tl.load(at + FINITE * column, mask=live, other=1.0)
    x = tl.load(at + X * column, mask=live, other=0.0)
    y = tl.load(at + Y * column, mask=live, other=0.0)
    if UPSTREAM_PER_ROW:
        factor = tl.load(upstream + row, mask=live, other=0.0)
    else:
        factor = tl.load(upstream)
    label = tl.full([ROWS, 1], -1, tl.int64)
    if LABELS:
        label = tl.where(hard != 0, tl.load(target + row, mask=live, other=-1), -1)
    soft *= factor
    hard *= factor
    peaks = no_peaks(s_max, ROWS, BLOCK)
    for start in tl.range(0, classes, BLOCK):
        col = start + lane
        s = load_tile(student, row, live, student_stride, col, classes, IS_FP64)
        t = s
        if teacher is not None:
            t = load_tile(teacher, row, live, teacher_stride, col, classes, IS_FP64)
        peaks = write_tile(
            s, t, row, live, col, classes, label, d_student, d_teacher, d_student_stride, d_teacher_stride,
            s_max, t_max, student_sum, teacher_sum, hard_sum, finite, x, y, soft, hard, kind,
            real(inverse_ts_, inverse_ts_low, IS_FP64), real(inverse_tt_, inverse_tt_low, IS_FP64),
            real(beta_, beta_low, IS_FP64), real(unit_, 0.0, IS_FP64), real(soft_student_, soft_student_low, IS_FP64),
            real(soft_teacher_, soft_teacher_low, IS_FP64), real(hard_weight_, hard_weight_low, IS_FP64),
            real(smoothing_, smoothing_low, IS_FP64), peaks, DIVERGENCE, LABELS, SMOOTHED, POWER, IS_FP64, WHOLE,
        )  # fmt: skip
    if not WHOLE:
        write_peaks(peaks, row, live, kind, d_student, d_teacher, d_student_stride, d_teacher_stride, DIVERGENCE)


@triton.jit(do_not_specialize=["rows", "classes", "stride", "tiles"])
def distill_scale_kernel(
    grad, factor, rows, classes, stride, tiles,
    PER_ROW: tl.constexpr, GRAIN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad *= factor, a tile a program. Reads nothing but the factor where that is 1."""
    classes *= GRAIN
    stride *= GRAIN
    program = tl.program_id(0)
    row = (program // tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (program % tiles) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (col < classes)
    at = grad + row.to(tl.int64) * stride + col
    if PER_ROW:
        scale = tl.load(factor + row, mask=row < rows, other=1.0)
        changes = inside & (scale != 1)
        value = tl.load(at, mask=changes, other=0.0)
        tl.store(at, cast(value.to(factor.dtype.element_ty) * scale, grad.dtype.element_ty), mask=changes)
    else:
        scale = tl.load(factor)
        if scale != 1:
            value = tl.load(at, mask=inside, other=0.0)
            tl.store(at, cast(value.to(factor.dtype.element_ty) * scale, grad.dtype.element_ty), mask=inside)
