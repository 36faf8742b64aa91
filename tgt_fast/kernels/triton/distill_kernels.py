"""The kernels of the soft-label loss in Triton.

    distill_fwd_kernel          rows whose classes fit a tile: each logit is read from memory once
    distill_fwd_stream_kernel   a program a row, tile by tile: the row pair is read again for the gradients
    distill_count_kernel        the divisor of the mean
    distill_reduce_kernel       the reduced loss
    distill_stats_kernel        entropies, KL, agreement and log-sum-exps of the rows

Nothing is added atomically and every sum has one order, so the same inputs give the same bits. Classes and strides come
divided by GRAIN, which is 8 where all of them can be: then rows are read 16 bytes at a time.
"""

import triton
import triton.language as tl

from tgt_fast.kernels.triton.distill_finish import close_rows, no_peaks, write_peaks, write_tile
from tgt_fast.kernels.triton.distill_row import (
    COUNTS,
    TINY,
    centred_terms,
    classes_of,
    exponential,
    finite_maximum,
    fp64_sum,
    hard_exponential,
    in_units,
    label_logit,
    load_tile,
    normalised_terms,
    open_rows,
    power_of,
    problems_of,
    rise_of,
    shifted_terms,
    shrunk,
)
from tgt_fast.kernels.triton.distill_statistics import write_statistics
from tgt_fast.kernels.triton.numbers import INFINITY, as_real, real


@triton.jit(do_not_specialize=COUNTS)
def distill_fwd_kernel(
    student, teacher, target, weight, divisor_at, row_loss, d_student, d_teacher, row_state,
    rows, classes, student_stride, teacher_stride, d_student_stride, d_teacher_stride, ignore_index, unlabeled_index,
    inverse_ts_, inverse_ts_low, inverse_tt_, inverse_tt_low, unit_, beta_, beta_low, temperature_, temperature_low,
    soft_student_, soft_student_low, soft_teacher_, soft_teacher_low,
    hard_weight_, hard_weight_low, smoothing_, smoothing_low, divisor_, divisor_low,
    DIVERGENCE: tl.constexpr, SMOOTHED: tl.constexpr, POWER: tl.constexpr, IS_FP64: tl.constexpr,
    GRAIN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    LABELS: tl.constexpr = target is not None
    classes *= GRAIN
    student_stride *= GRAIN
    teacher_stride *= GRAIN
    d_student_stride *= GRAIN
    d_teacher_stride *= GRAIN
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    live = row < rows
    inverse_ts = real(inverse_ts_, inverse_ts_low, IS_FP64)
    inverse_tt = real(inverse_tt_, inverse_tt_low, IS_FP64)
    unit = real(unit_, 0.0, IS_FP64)
    beta = real(beta_, beta_low, IS_FP64)
    soft_student = real(soft_student_, soft_student_low, IS_FP64)
    hard_weight = real(hard_weight_, hard_weight_low, IS_FP64)
    smoothing = real(smoothing_, smoothing_low, IS_FP64)
    label, a_weight, coefficient, counts, active = open_rows(
        row, live, target, weight, divisor_at, real(divisor_, divisor_low, True), classes,
        ignore_index, unlabeled_index, IS_FP64,
    )  # fmt: skip

    of_label = label_logit(student, row, student_stride, label, IS_FP64)
    s = load_tile(student, row, live, student_stride, col, classes, IS_FP64)
    t = s
    if teacher is not None:
        t = load_tile(teacher, row, live, teacher_stride, col, classes, IS_FP64)
    s_max = tl.max(s, 1, keep_dims=True)
    t_max = tl.max(t, 1, keep_dims=True)
    problem = tl.max(problems_of(s, t, DIVERGENCE), 1, keep_dims=True)
    s_peak = finite_maximum(s_max)
    t_peak = finite_maximum(t_max)
    a, b, p, q = classes_of(s, t, s_peak, t_peak, inverse_ts, inverse_tt, unit, DIVERGENCE, IS_FP64)
    if DIVERGENCE == "mse" or DIVERGENCE == "none":
        student_sum = s_peak * 0.0 + 1.0
        teacher_sum = student_sum
    else:
        student_sum = tl.sum(q, 1, keep_dims=True)
        teacher_sum = tl.sum(p, 1, keep_dims=True)
    x = s_peak * 0.0
    y = x
    if DIVERGENCE == "jsd" or DIVERGENCE == "tvd":
        log_ratio = tl.log(teacher_sum / student_sum)
        x_terms, y_terms = normalised_terms(
            a, b, p, q, 1.0 / student_sum, 1.0 / teacher_sum, log_ratio, beta, DIVERGENCE
        )  # fmt: skip
        x = tl.sum(x_terms, 1, keep_dims=True)
        y = tl.sum(y_terms, 1, keep_dims=True)
    elif DIVERGENCE != "none":
        x_terms, y_terms = shifted_terms(a, b, p, q, unit, DIVERGENCE)
        if DIVERGENCE == "mse":
            x = tl.sum(x_terms, 1, keep_dims=True)
            y = tl.sum(y_terms, 1, keep_dims=True)
        elif DIVERGENCE != "reverse_kl":
            x = tl.sum(x_terms, 1, keep_dims=True) / teacher_sum
        if DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric":
            y = tl.sum(y_terms, 1, keep_dims=True) / student_sum
        if DIVERGENCE != "mse":
            x_terms, y_terms = centred_terms(a, b, p, q, x, y, DIVERGENCE)
            if DIVERGENCE != "reverse_kl":
                x += tl.sum(x_terms, 1, keep_dims=True) / teacher_sum
            if DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric":
                y += tl.sum(y_terms, 1, keep_dims=True) / student_sum

    hard_sum = student_sum
    linear = s_peak * 0.0
    finite = linear
    if LABELS:
        if POWER != 1:
            hard_sum = tl.sum(hard_exponential(s, s_peak, q, POWER, IS_FP64), 1, keep_dims=True)
        if SMOOTHED:
            exists = s > -INFINITY
            linear = tl.sum(tl.where(exists, shrunk(s, s_peak) * TINY, 0.0), 1, keep_dims=True)
            finite = as_real(tl.sum(exists.to(tl.int32), 1, keep_dims=True), IS_FP64)
    x, y, soft, hard, kind = close_rows(
        row, live, label, coefficient, counts, active, of_label,
        s_max, t_max, student_sum, teacher_sum, hard_sum, linear, finite, x, y, problem,
        beta, unit, soft_student, real(temperature_, temperature_low, IS_FP64), hard_weight, smoothing, rows, row_loss,
        row_state, DIVERGENCE, LABELS, SMOOTHED,
    )  # fmt: skip
    if (d_student is not None) or (d_teacher is not None):
        write_tile(
            s, t, row, live, col, classes, tl.where(hard != 0, label, -1),
            d_student, d_teacher, d_student_stride, d_teacher_stride,
            s_peak, t_peak, student_sum, teacher_sum, hard_sum, finite, x, y, soft, hard, kind,
            inverse_ts, inverse_tt, beta, unit, soft_student, real(soft_teacher_, soft_teacher_low, IS_FP64),
            hard_weight, smoothing, no_peaks(s_peak, 1, 4), DIVERGENCE, LABELS, SMOOTHED, POWER, IS_FP64, True,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def distill_fwd_stream_kernel(
    student, teacher, target, weight, divisor_at, row_loss, d_student, d_teacher, row_state,
    rows, classes, student_stride, teacher_stride, d_student_stride, d_teacher_stride, ignore_index, unlabeled_index,
    inverse_ts_, inverse_ts_low, inverse_tt_, inverse_tt_low, unit_, beta_, beta_low, temperature_, temperature_low,
    soft_student_, soft_student_low, soft_teacher_, soft_teacher_low,
    hard_weight_, hard_weight_low, smoothing_, smoothing_low, divisor_, divisor_low,
    DIVERGENCE: tl.constexpr, SMOOTHED: tl.constexpr, POWER: tl.constexpr, IS_FP64: tl.constexpr,
    GRAIN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every lane of the tile keeps its own sums, relative to the row's maxima so far; they meet at the row's end."""
    LABELS: tl.constexpr = target is not None
    classes *= GRAIN
    student_stride *= GRAIN
    teacher_stride *= GRAIN
    d_student_stride *= GRAIN
    d_teacher_stride *= GRAIN
    PROBABILITIES: tl.constexpr = DIVERGENCE != "mse" and DIVERGENCE != "none"
    row = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
    lane = tl.arange(0, BLOCK)[None, :]
    live = row < rows
    inverse_ts = real(inverse_ts_, inverse_ts_low, IS_FP64)
    inverse_tt = real(inverse_tt_, inverse_tt_low, IS_FP64)
    unit = real(unit_, 0.0, IS_FP64)
    beta = real(beta_, beta_low, IS_FP64)
    soft_student = real(soft_student_, soft_student_low, IS_FP64)
    hard_weight = real(hard_weight_, hard_weight_low, IS_FP64)
    smoothing = real(smoothing_, smoothing_low, IS_FP64)
    label, a_weight, coefficient, counts, active = open_rows(
        row, live, target, weight, divisor_at, real(divisor_, divisor_low, True), classes,
        ignore_index, unlabeled_index, IS_FP64,
    )  # fmt: skip

    of_label = label_logit(student, row, student_stride, label, IS_FP64)
    nothing = as_real(tl.zeros([1, BLOCK], tl.float32), IS_FP64)
    q_sums = nothing
    p_sums = nothing
    x_sums = nothing
    y_sums = nothing
    hard_sums = nothing
    linear_sums = nothing
    counted = tl.zeros([1, BLOCK], tl.int32)
    problems = tl.zeros([1, BLOCK], tl.int32)
    s_max = as_real(tl.full([1, 1], -INFINITY, tl.float32), IS_FP64)
    t_max = s_max
    for start in tl.range(0, classes, BLOCK, num_stages=STAGES):
        col = start + lane
        s = load_tile(student, row, live, student_stride, col, classes, IS_FP64)
        t = s
        if teacher is not None:
            t = load_tile(teacher, row, live, teacher_stride, col, classes, IS_FP64)
        problems = tl.maximum(problems, problems_of(s, t, DIVERGENCE))
        s_new = tl.maximum(s_max, tl.max(s, 1, keep_dims=True))
        t_new = tl.maximum(t_max, tl.max(t, 1, keep_dims=True))
        s_peak = finite_maximum(s_new)
        t_peak = finite_maximum(t_new)
        a, b, p, q = classes_of(s, t, s_peak, t_peak, inverse_ts, inverse_tt, unit, DIVERGENCE, IS_FP64)
        x_terms, y_terms = shifted_terms(a, b, p, q, unit, DIVERGENCE)
        if PROBABILITIES:
            s_rise = rise_of(s_max, s_new)
            t_rise = rise_of(t_max, t_new)
            ds = s_rise * in_units(inverse_ts, unit, DIVERGENCE)
            dt = t_rise * in_units(inverse_tt, unit, DIVERGENCE)
            shrink_s = exponential(-s_rise, inverse_ts, IS_FP64)
            shrink_t = exponential(-t_rise, inverse_tt, IS_FP64)
            if DIVERGENCE == "forward_kl" or DIVERGENCE == "symmetric":
                x_sums = (x_sums + (ds - dt) * p_sums) * shrink_t + x_terms
            if DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric":
                y_sums = (y_sums + (dt - ds) * q_sums) * shrink_s + y_terms
            if DIVERGENCE == "cross_entropy":
                x_sums = (x_sums + ds * p_sums) * shrink_t + x_terms
            q_sums = q_sums * shrink_s + q
            p_sums = p_sums * shrink_t + p
        if DIVERGENCE == "mse":
            x_sums += x_terms
            y_sums += y_terms
        if LABELS:
            rise = rise_of(s_max, s_new)
            if POWER == 0:
                hard_sums = hard_sums * exponential(-rise, 1.0, IS_FP64) + exponential(shrunk(s, s_peak), 1.0, IS_FP64)
            elif POWER != 1:
                hard_sums = hard_sums * power_of(shrink_s, POWER) + power_of(q, POWER)
            if SMOOTHED:
                exists = s > -INFINITY
                risen = as_real(counted, IS_FP64) * (rise * TINY)
                linear_sums += tl.where(exists, shrunk(s, s_peak) * TINY, 0.0) - risen
                counted += exists.to(tl.int32)
        s_max = s_new
        t_max = t_new

    last = (classes - 1) // BLOCK * BLOCK  # every other pass walks back, over what the cache still holds
    s_peak = finite_maximum(s_max)
    t_peak = finite_maximum(t_max)
    problem = tl.max(problems, 1, keep_dims=True)
    student_sum = s_peak * 0.0 + 1.0
    teacher_sum = student_sum
    x = s_peak * 0.0
    y = x
    if PROBABILITIES:
        student_sum = tl.sum(q_sums, 1, keep_dims=True)
        teacher_sum = tl.sum(p_sums, 1, keep_dims=True)
    if DIVERGENCE == "jsd" or DIVERGENCE == "tvd":
        log_ratio = tl.log(teacher_sum / student_sum)
        for start in tl.range(0, classes, BLOCK, num_stages=STAGES):
            col = last - start + lane
            s = load_tile(student, row, live, student_stride, col, classes, IS_FP64)
            t = load_tile(teacher, row, live, teacher_stride, col, classes, IS_FP64)
            a, b, p, q = classes_of(s, t, s_peak, t_peak, inverse_ts, inverse_tt, unit, DIVERGENCE, IS_FP64)
            x_terms, y_terms = normalised_terms(
                a, b, p, q, 1.0 / student_sum, 1.0 / teacher_sum, log_ratio, beta, DIVERGENCE
            )  # fmt: skip
            x_sums += x_terms
            y_sums += y_terms
        x = tl.sum(x_sums, 1, keep_dims=True)
        y = tl.sum(y_sums, 1, keep_dims=True)
    elif DIVERGENCE != "none":
        if DIVERGENCE == "mse":
            x = tl.sum(x_sums, 1, keep_dims=True)
            y = tl.sum(y_sums, 1, keep_dims=True)
        elif DIVERGENCE != "reverse_kl":
            x = as_real(fp64_sum(x_sums) / fp64_sum(p_sums), IS_FP64)
        if DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric":
            y = as_real(fp64_sum(y_sums) / fp64_sum(q_sums), IS_FP64)

    hard_sum = student_sum
    linear = s_peak * 0.0
    finite = linear
    if LABELS:
        if POWER != 1:
            hard_sum = tl.sum(hard_sums, 1, keep_dims=True)
        if SMOOTHED:
            linear = tl.sum(linear_sums, 1, keep_dims=True)
            finite = as_real(tl.sum(counted, 1, keep_dims=True), IS_FP64)
    x, y, soft, hard, kind = close_rows(
        row, live, label, coefficient, counts, active, of_label,
        s_max, t_max, student_sum, teacher_sum, hard_sum, linear, finite, x, y, problem,
        beta, unit, soft_student, real(temperature_, temperature_low, IS_FP64), hard_weight, smoothing, rows, row_loss,
        row_state, DIVERGENCE, LABELS, SMOOTHED,
    )  # fmt: skip
    if (d_student is not None) or (d_teacher is not None):
        label = tl.where(hard != 0, label, -1)
        peaks = no_peaks(s_peak, 1, BLOCK)
        for start in tl.range(0, classes, BLOCK, num_stages=STAGES):
            if DIVERGENCE == "jsd" or DIVERGENCE == "tvd":
                col = start + lane
            else:
                col = last - start + lane
            s = load_tile(student, row, live, student_stride, col, classes, IS_FP64)
            t = s
            if teacher is not None:
                t = load_tile(teacher, row, live, teacher_stride, col, classes, IS_FP64)
            peaks = write_tile(
                s, t, row, live, col, classes, label, d_student, d_teacher, d_student_stride, d_teacher_stride,
                s_peak, t_peak, student_sum, teacher_sum, hard_sum, finite, x, y, soft, hard, kind,
                inverse_ts, inverse_tt, beta, unit, soft_student, real(soft_teacher_, soft_teacher_low, IS_FP64),
                hard_weight, smoothing, peaks, DIVERGENCE, LABELS, SMOOTHED, POWER, IS_FP64, False,
            )  # fmt: skip
        write_peaks(peaks, row, live, kind, d_student, d_teacher, d_student_stride, d_teacher_stride, DIVERGENCE)


@triton.jit(do_not_specialize=["rows", "ignore_index", "unlabeled_index"])
def distill_count_kernel(
    target, weight, divisor, rows, classes, ignore_index, unlabeled_index, BLOCK: tl.constexpr
):  # fmt: skip
    """The counted rows, or their weights. One program, so that the order is fixed."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        row = start + lane
        label, a_weight, coefficient, counts, active = open_rows(
            row, row < rows, target, weight, None, tl.full([1], 1.0, tl.float64), classes,
            ignore_index, unlabeled_index, True,
        )  # fmt: skip
        total += tl.where(counts, a_weight, 0.0)
    tl.store(divisor, tl.sum(total, 0))


@triton.jit(do_not_specialize=["rows"])
def distill_reduce_kernel(
    row_loss, divisor_at, divisor_, divisor_low, loss, rows, BLOCK: tl.constexpr
):  # fmt: skip
    """The sum of the rows' losses, which are divided; 0 where the divisor is 0."""
    lane = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([1, BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        row = start + lane
        total += tl.load(row_loss + row, mask=row < rows, other=0.0).to(tl.float64)
    divisor = real(divisor_, divisor_low, True)
    if divisor_at is not None:
        divisor = divisor * 0.0 + tl.load(divisor_at)
    result = tl.where(divisor == 0, 0.0, tl.sum(total, 1, keep_dims=True))
    tl.store(loss + tl.zeros([1, 1], tl.int32), result.to(loss.dtype.element_ty))


@triton.jit(do_not_specialize=COUNTS)
def distill_stats_kernel(
    student, teacher, target, weight, divisor_at, divisor_, divisor_low, stats,
    rows, classes, student_stride, teacher_stride, ignore_index, unlabeled_index,
    inverse_ts_, inverse_ts_low, inverse_tt_, inverse_tt_low, unit_,
    IS_FP64: tl.constexpr, GRAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of a row, whatever the loss; zeros for a row that does not count, NaN for what is no distribution."""
    classes *= GRAIN
    student_stride *= GRAIN
    teacher_stride *= GRAIN
    row = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
    lane = tl.arange(0, BLOCK)[None, :]
    live = row < rows
    inverse_ts = real(inverse_ts_, inverse_ts_low, IS_FP64)
    inverse_tt = real(inverse_tt_, inverse_tt_low, IS_FP64)
    unit = real(unit_, 0.0, IS_FP64)
    one = as_real(tl.full([1, 1], 1.0, tl.float32), IS_FP64)
    label, a_weight, coefficient, counts, active = open_rows(
        row, live, target, weight, divisor_at, real(divisor_, divisor_low, True), classes,
        ignore_index, unlabeled_index, IS_FP64,
    )  # fmt: skip
    s_max = one * -INFINITY
    t_max = s_max
    s_best = tl.zeros([1, 1], tl.int32)
    t_best = s_best
    problems = tl.zeros([1, BLOCK], tl.int32)
    not_finite_s = problems
    not_finite_t = problems
    for start in range(0, classes, BLOCK):
        col = start + lane
        s = load_tile(student, row, live, student_stride, col, classes, IS_FP64)
        t = load_tile(teacher, row, live, teacher_stride, col, classes, IS_FP64)
        problems = tl.maximum(problems, problems_of(s, t, "forward_kl"))
        not_finite_s = tl.maximum(not_finite_s, (~(s < INFINITY)).to(tl.int32))
        not_finite_t = tl.maximum(not_finite_t, (~(t < INFINITY)).to(tl.int32))
        s_here = tl.max(s, 1, keep_dims=True)
        t_here = tl.max(t, 1, keep_dims=True)
        s_at = tl.min(tl.where(s == s_here, col, 2147483647), 1, keep_dims=True)
        t_at = tl.min(tl.where(t == t_here, col, 2147483647), 1, keep_dims=True)
        s_best = tl.where(s_here > s_max, s_at, s_best)
        t_best = tl.where(t_here > t_max, t_at, t_best)
        s_max = tl.maximum(s_max, s_here)
        t_max = tl.maximum(t_max, t_here)
    s_peak = finite_maximum(s_max)
    t_peak = finite_maximum(t_max)
    nothing = as_real(tl.zeros([1, BLOCK], tl.float32), IS_FP64)
    q_sums = nothing
    p_sums = nothing
    qb_sums = nothing
    pa_sums = nothing
    kl_sums = nothing
    for start in range(0, classes, BLOCK):
        col = start + lane
        s = load_tile(student, row, live, student_stride, col, classes, IS_FP64)
        t = load_tile(teacher, row, live, teacher_stride, col, classes, IS_FP64)
        a, b, p, q = classes_of(s, t, s_peak, t_peak, inverse_ts, inverse_tt, unit, "forward_kl", IS_FP64)
        q_sums += q
        p_sums += p
        qb_sums += q * b
        pa_sums += p * a
        kl_sums += p * (a - b)
    problem = tl.max(problems, 1, keep_dims=True)
    bad_student = (tl.max(not_finite_s, 1, keep_dims=True) > 0) | (s_max == -INFINITY)
    bad_teacher = (tl.max(not_finite_t, 1, keep_dims=True) > 0) | (t_max == -INFINITY)
    write_statistics(
        stats, rows, row, live, active, tl.sum(q_sums, 1, keep_dims=True), tl.sum(p_sums, 1, keep_dims=True),
        tl.sum(qb_sums, 1, keep_dims=True), tl.sum(pa_sums, 1, keep_dims=True), tl.sum(kl_sums, 1, keep_dims=True),
        unit, s_peak * inverse_ts, t_peak * inverse_tt, s_best == t_best, problem, bad_student, bad_teacher,
    )  # fmt: skip
