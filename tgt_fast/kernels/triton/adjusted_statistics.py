"""The statistics of adjusted rows in Triton: of what the soft term sees, before it goes by the label."""

import triton
import triton.language as tl

from tgt_fast.kernels.triton.adjusted_row import measured_side, row_unit, side_tile, standard_of
from tgt_fast.kernels.triton.distill_row import (
    COUNTS,
    classes_of,
    finite_maximum,
    fp64_sum,
    open_rows,
    problems_of,
)
from tgt_fast.kernels.triton.distill_statistics import write_statistics
from tgt_fast.kernels.triton.numbers import INFINITY, as_real, real


@triton.jit(do_not_specialize=[*COUNTS, "digits"])
def distill_adjusted_stats_kernel(
    student, teacher, student_bias, teacher_bias, student_temperature, teacher_temperature,
    target, weight, divisor_at, stats,
    rows, classes, student_stride, teacher_stride, ignore_index, unlabeled_index, digits,
    ts_, ts_low, tt_, tt_low, divisor_, divisor_low,
    STANDARDIZED: tl.constexpr, IS_FP64: tl.constexpr, GRAIN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    classes *= GRAIN
    student_stride *= GRAIN
    teacher_stride *= GRAIN
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    live = row < rows
    label, a_weight, coefficient, counts, active = open_rows(
        row, live, target, weight, divisor_at, real(divisor_, divisor_low, True), classes,
        ignore_index, unlabeled_index, True,
    )  # fmt: skip
    s_most, s_first, s_bad, s_count, s_mean, s_squares = measured_side(
        student, student_bias, row, live, student_stride, classes, label, False, True, STANDARDIZED, IS_FP64, ROWS,
        BLOCK,
    )  # fmt: skip
    t_most, t_first, t_bad, t_count, t_mean, t_squares = measured_side(
        teacher, teacher_bias, row, live, teacher_stride, classes, label, False, True, STANDARDIZED, IS_FP64, ROWS,
        BLOCK,
    )  # fmt: skip
    ts = real(ts_, ts_low, True)
    tt = real(tt_, tt_low, True)
    if student_temperature is not None:
        ts = tl.load(student_temperature + row, mask=live, other=1.0)
        tt = tl.load(teacher_temperature + row, mask=live, other=1.0)
    if STANDARDIZED:
        s_scale, s_bend = standard_of(s_count, s_squares)
        t_scale, t_bend = standard_of(t_count, t_squares)
        ts *= s_scale
        tt *= t_scale
    unit = row_unit(tl.minimum(ts, tt), digits, IS_FP64)
    s_peak = finite_maximum(s_most)
    t_peak = finite_maximum(t_most)
    inverse_ts = as_real(1.0 / ts, IS_FP64)
    inverse_tt = as_real(1.0 / tt, IS_FP64)
    problems = tl.zeros([ROWS, BLOCK], tl.int32)
    nothing = as_real(tl.zeros([ROWS, BLOCK], tl.float32), IS_FP64)
    q_sums = nothing
    p_sums = nothing
    qb_sums = nothing
    pa_sums = nothing
    kl_sums = nothing
    last = (classes - 1) // BLOCK * BLOCK
    for start in tl.range(0, classes, BLOCK):
        col = last - start + lane
        s = side_tile(student, student_bias, row, live, student_stride, col, classes, IS_FP64)
        t = side_tile(teacher, teacher_bias, row, live, teacher_stride, col, classes, IS_FP64)
        problems = tl.maximum(problems, problems_of(s, t, "forward_kl"))
        a, b, p, q = classes_of(s, t, s_peak, t_peak, inverse_ts, inverse_tt, unit, "forward_kl", IS_FP64)
        q_sums += q
        p_sums += p
        qb_sums += q * b
        pa_sums += p * a
        kl_sums += p * (a - b)
    write_statistics(
        stats, rows, row, live, active, fp64_sum(q_sums), fp64_sum(p_sums), fp64_sum(qb_sums), fp64_sum(pa_sums),
        fp64_sum(kl_sums), unit.to(tl.float64), (s_peak.to(tl.float64) - s_mean) / ts,
        (t_peak.to(tl.float64) - t_mean) / tt, s_first == t_first, tl.max(problems, 1, keep_dims=True),
        s_bad | (s_most == -INFINITY), t_bad | (t_most == -INFINITY),
    )  # fmt: skip
