"""The kernel of an adjusted soft-label loss in Triton: some rows a program, tile by tile, in passes over the logits.

    largest logits, and moments where logits are standardised    a pass over each side
    sums                                                         a pass over both, two where they need normalisers
    the gradients' parts along standardised logits               a pass
    gradients                                                    a pass

Every other pass walks back, over what the cache still holds. Forward and backward are one kernel: backward is given the
rows' weights in the reduced loss, signed, and no room for losses.
"""

import triton
import triton.language as tl

from tgt_fast.kernels.triton.adjusted_gradients import soft_gradients, write_side
from tgt_fast.kernels.triton.adjusted_row import (
    hard_part,
    label_part,
    measured_side,
    off_peak,
    row_unit,
    seen_tiles,
    side_label,
    side_tile,
    skewed_terms,
    standard_of,
    with_label,
)
from tgt_fast.kernels.triton.distill_peak import folded, write_peak
from tgt_fast.kernels.triton.distill_row import (
    COUNTS,
    SHRINK,
    TINY,
    classes_of,
    exponential,
    finite_maximum,
    fp64_sum,
    normalised_terms,
    open_rows,
    problems_of,
    shifted_terms,
    shrunk,
    soft_value,
)
from tgt_fast.kernels.triton.numbers import INFINITY, as_real, real

NUMBERS = [*COUNTS, "state_stride", "digits"]


@triton.jit(do_not_specialize=NUMBERS)
def distill_adjusted_kernel(
    student, teacher, student_bias, teacher_bias, margin, student_temperature, teacher_temperature,
    target, weight, divisor_at, row_loss, d_student, d_teacher, row_state,
    rows, classes, student_stride, teacher_stride, d_student_stride, d_teacher_stride, state_stride,
    ignore_index, unlabeled_index, digits,
    ts_, ts_low, tt_, tt_low, soft_weight_, soft_weight_low, hard_weight_, hard_weight_low, smoothing_, smoothing_low,
    first_, first_low, second_, second_low, divisor_, divisor_low,
    DIVERGENCE: tl.constexpr, FORM: tl.constexpr, STANDARDIZED: tl.constexpr, HARD: tl.constexpr,
    SMOOTHED: tl.constexpr, IS_FP64: tl.constexpr, GRAIN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """first, second: of "decoupled" the weights of the label's part and of the others'; of "corrected" the lead; of
    "skewed" and of "mirrored", its mirror image, the skew; else jsd's beta. digits: of 16 times the classes."""
    LABELS: tl.constexpr = target is not None
    SOFT: tl.constexpr = DIVERGENCE != "none"
    BY_LABEL: tl.constexpr = FORM == "decoupled" or FORM == "corrected"
    SKEWED: tl.constexpr = FORM == "skewed" or FORM == "mirrored"
    PAIRED: tl.constexpr = DIVERGENCE == "jsd" or DIVERGENCE == "tvd"
    PROBABILITIES: tl.constexpr = SOFT and DIVERGENCE != "mse"
    classes *= GRAIN
    student_stride *= GRAIN
    teacher_stride *= GRAIN
    d_student_stride *= GRAIN
    d_teacher_stride *= GRAIN
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    live = row < rows
    one = tl.full([1, 1], 1.0, tl.float64)
    if row_loss is not None:
        label, a_weight, coefficient, counts, active = open_rows(
            row, live, target, weight, divisor_at, real(divisor_, divisor_low, True), classes,
            ignore_index, unlabeled_index, True,
        )  # fmt: skip
    else:
        label, a_weight, coefficient, counts, active = open_rows(
            row, live, target, None, None, one, classes, ignore_index, unlabeled_index, True
        )  # fmt: skip
        coefficient = tl.load(weight + row, mask=live, other=0.0)
        active = active & (coefficient != 0)
        coefficient = tl.where(active, coefficient, 0.0)

    # Before the first tile, for a faster warp may write over the logits later.
    s_label = side_label(student, student_bias, row, student_stride, label, IS_FP64)
    t_label = s_label
    if SOFT and BY_LABEL:
        t_label = side_label(teacher, teacher_bias, row, teacher_stride, label, IS_FP64)
    s_others, s_first, invalid, s_count, s_mean, s_squares = measured_side(
        student, student_bias, row, live, student_stride, classes, label, LABELS, False, STANDARDIZED, IS_FP64, ROWS,
        BLOCK,
    )  # fmt: skip
    s_most = with_label(s_others, s_label, label)
    invalid = invalid | (s_most == -INFINITY)
    if FORM == "decoupled":
        t_others, t_first, bad, t_count, t_mean, t_squares = measured_side(
            teacher, teacher_bias, row, live, teacher_stride, classes, label, LABELS, False, STANDARDIZED, IS_FP64,
            ROWS, BLOCK,
        )  # fmt: skip
        invalid = invalid | bad | (with_label(t_others, t_label, label) == -INFINITY)
        s_most = s_others
        t_most = t_others
    elif SOFT:
        t_most, t_first, bad, t_count, t_mean, t_squares = measured_side(
            teacher, teacher_bias, row, live, teacher_stride, classes, label, False, FORM == "corrected",
            STANDARDIZED, IS_FP64, ROWS, BLOCK,
        )  # fmt: skip
        invalid = invalid | bad | (t_most == -INFINITY)
    else:
        t_most = s_most
    s_peak = finite_maximum(s_most)
    t_peak = finite_maximum(t_most)
    h_peak = finite_maximum(s_others)

    ts = real(ts_, ts_low, True)
    tt = real(tt_, tt_low, True)
    if student_temperature is not None:
        ts = tl.load(student_temperature + row, mask=live, other=1.0)
        tt = tl.load(teacher_temperature + row, mask=live, other=1.0)
    s_scale = one
    t_scale = one
    s_bend = one
    t_bend = one
    if STANDARDIZED:
        s_scale, s_bend = standard_of(s_count, s_squares)
        t_scale, t_bend = standard_of(t_count, t_squares)
    s_inverse = 1.0 / (ts * s_scale)
    t_inverse = 1.0 / (tt * t_scale)
    unit = row_unit(tl.minimum(ts * s_scale, tt * t_scale), digits, IS_FP64)
    s_rate = as_real(s_inverse / SHRINK, IS_FP64)
    t_rate = as_real(t_inverse / SHRINK, IS_FP64)
    inverse_ts = as_real(s_inverse, IS_FP64)
    inverse_tt = as_real(t_inverse, IS_FP64)
    s_off = s_peak.to(tl.float64) - s_mean  # of the largest logit from the mean
    t_off = s_off
    if SOFT:
        t_off = t_peak.to(tl.float64) - t_mean
    s_centre = as_real(s_off * SHRINK, IS_FP64)
    t_centre = as_real(t_off * SHRINK, IS_FP64)
    if STANDARDIZED and DIVERGENCE == "mse":
        inverse_ts = s_rate
        inverse_tt = t_rate
    first = real(first_, first_low, True)
    second = real(second_, second_low, True)
    mix = as_real(first, IS_FP64)

    nothing = as_real(tl.zeros([ROWS, BLOCK], tl.float32), IS_FP64)
    q_sums = nothing
    p_sums = nothing
    x_sums = nothing
    y_sums = nothing
    hard_sums = nothing
    linear_sums = nothing
    counted = tl.zeros([ROWS, BLOCK], tl.int32)
    problems = counted
    last = (classes - 1) // BLOCK * BLOCK
    for start in tl.range(0, classes, BLOCK):
        col = last - start + lane
        s = side_tile(student, student_bias, row, live, student_stride, col, classes, IS_FP64)
        if HARD:
            others = tl.where(col == label, -INFINITY, s)
            hard_sums += exponential(shrunk(others, h_peak), 1.0, IS_FP64)
            if SMOOTHED:
                linear_sums += tl.where(others == -INFINITY, 0.0, shrunk(others, h_peak) * TINY)
                counted += (s > -INFINITY).to(tl.int32)
        if SOFT:
            t = side_tile(teacher, teacher_bias, row, live, teacher_stride, col, classes, IS_FP64)
            s, t = seen_tiles(
                s, t, col, label, s_peak, t_peak, s_centre, t_centre, DIVERGENCE, FORM, STANDARDIZED
            )  # fmt: skip
            problems = tl.maximum(problems, problems_of(s, t, DIVERGENCE))
            a, b, p, q = classes_of(s, t, s_peak, t_peak, inverse_ts, inverse_tt, unit, DIVERGENCE, IS_FP64)
            if PROBABILITIES:
                q_sums += q
                p_sums += p
            if not PAIRED:
                x_terms, y_terms = shifted_terms(a, b, p, q, unit, DIVERGENCE)
                x_sums += x_terms
                y_sums += y_terms

    zero = tl.zeros([ROWS, 1], tl.float64)
    student_sum = zero + 1.0
    teacher_sum = student_sum
    x = zero
    y = zero
    log_ratio = zero
    log_sums = zero
    if PROBABILITIES:
        student_sum = fp64_sum(q_sums)
        teacher_sum = fp64_sum(p_sums)
        none = (student_sum == 0) | (teacher_sum == 0)
        log_sums = tl.log(tl.where(none, 1.0, teacher_sum / student_sum))
        log_ratio = as_real(log_sums, IS_FP64)
    inverse_s = 1.0 / tl.where(student_sum == 0, 1.0, student_sum)
    inverse_t = 1.0 / tl.where(teacher_sum == 0, 1.0, teacher_sum)
    if PAIRED:
        of_q = as_real(inverse_s, IS_FP64)
        of_p = as_real(inverse_t, IS_FP64)
        for start in tl.range(0, classes, BLOCK):
            col = start + lane
            s = side_tile(student, student_bias, row, live, student_stride, col, classes, IS_FP64)
            t = side_tile(teacher, teacher_bias, row, live, teacher_stride, col, classes, IS_FP64)
            a, b, p, q = classes_of(s, t, s_peak, t_peak, inverse_ts, inverse_tt, unit, DIVERGENCE, IS_FP64)
            if FORM == "skewed":
                x_terms, y_terms = skewed_terms(p * of_p, (a - b) - log_ratio, mix)
            elif FORM == "mirrored":
                x_terms, y_terms = skewed_terms(q * of_q, log_ratio - (a - b), mix)
            else:
                x_terms, y_terms = normalised_terms(a, b, p, q, of_q, of_p, log_ratio, mix, DIVERGENCE)
            x_sums += x_terms
            y_sums += y_terms
    x = fp64_sum(x_sums)
    y = fp64_sum(y_sums)
    if SKEWED:  # of first order in what rounding the logarithm adds to each class
        off = log_sums - log_ratio.to(tl.float64)
        if FORM == "mirrored":
            off = -off
        x -= y * off
    if PROBABILITIES and not PAIRED:
        x *= inverse_t
        y *= inverse_s

    infinite = tl.max(problems, 1, keep_dims=True) == 1
    x = tl.where(infinite, 0.0, x)
    y = tl.where(infinite, 0.0, y)
    lacking = (label >= 0) & (s_label == -INFINITY)
    if FORM == "decoupled":
        lacking = (lacking & (t_label > -INFINITY)) | ((s_others == -INFINITY) & (t_others > -INFINITY))
        apart = (lacking & (first > 0)) | (infinite & (second > 0))
        infinite = tl.where(label >= 0, apart, infinite)
    if FORM == "corrected":
        infinite = infinite | lacking
    if PROBABILITIES:
        invalid = invalid | ~(student_sum < INFINITY) | ~(teacher_sum < INFINITY)
    soft = tl.where(infinite, 0.0, coefficient)
    soft_weight = real(soft_weight_, soft_weight_low, True)
    soft_s = ((soft * soft_weight) * ts) * (ts * s_inverse)
    soft_t = ((soft * soft_weight) * ts) * (ts * t_inverse)
    wide = unit.to(tl.float64)
    slope = soft_t * wide
    offset = zero
    inverse_q = inverse_s
    inverse_p = inverse_t
    student_label = zero
    teacher_label = zero
    teacher_top = zero
    top = label * 0 - 1
    loss = zero
    if DIVERGENCE == "mse":
        soft_s = (soft * soft_weight) * s_inverse
        soft_t = (soft * soft_weight) * t_inverse
        loss = soft_value(x, y, one, one, one, wide, soft, one, soft_weight, "mse")
    elif BY_LABEL:
        kl = x * wide - log_sums
        kl = tl.where((teacher_sum == 0) | (kl < 0), 0.0, kl)
        labeled = (label >= 0) & ~infinite
        value, of_q, of_p, of_t, at_others, at_student, at_teacher, at_top = label_part(
            kl, s_label, t_label, s_most, t_most, t_first == label, s_inverse, t_inverse, student_sum, teacher_sum,
            first, second, lacking, FORM,
        )  # fmt: skip
        inverse_q *= tl.where(labeled, of_q, 1.0)
        inverse_p *= tl.where(labeled, of_p, 1.0)
        slope *= tl.where(labeled, of_t, 1.0)
        offset = tl.where(labeled, soft_t * at_others, 0.0)
        student_label = tl.where(labeled, soft_s * at_student, 0.0)
        teacher_label = tl.where(labeled, soft_t * at_teacher, 0.0)
        teacher_top = tl.where(labeled, soft_t * at_top, 0.0)
        top = t_first
        value = tl.where(labeled, value, kl)
        loss = (((tl.where(value < 0, 0.0, value) * soft) * soft_weight) * ts) * ts
    elif SKEWED:
        loss = (((tl.where(x < 0, 0.0, x) * soft) * soft_weight) * ts) * ts
    elif SOFT:
        loss = soft_value(x, y, student_sum, teacher_sum, first, wide, soft, ts, soft_weight * ts, DIVERGENCE)
    if SOFT:
        loss = tl.where(infinite, coefficient * INFINITY, loss)

    hard = zero
    inverse_h = zero
    floor = zero
    hard_label = zero
    if HARD:
        own = s_label.to(tl.float64)
        if margin is not None:
            own -= tl.load(margin + label, mask=label >= 0, other=0.0)
        own -= h_peak.to(tl.float64)
        linear = zero
        finite = one
        smoothing = real(smoothing_, smoothing_low, True)
        if SMOOTHED:
            linear = fp64_sum(linear_sums) / (SHRINK * TINY) + tl.where(own == -INFINITY, 0.0, own)
            finite = tl.sum(counted, 1, keep_dims=True).to(tl.float64)
        value, missing, inverse_h, floor, slope_label = hard_part(
            own, fp64_sum(hard_sums), linear, finite, smoothing, SMOOTHED
        )  # fmt: skip
        of_hard = coefficient * real(hard_weight_, hard_weight_low, True)
        loss += tl.where(label >= 0, of_hard * value, 0.0)
        hard = tl.where((label >= 0) & ~missing, of_hard, 0.0)
        hard_label = tl.where((label >= 0) & ~missing, of_hard * slope_label, 0.0)

    if row_loss is not None:
        loss = tl.where(invalid, coefficient * float("nan"), loss)
        tl.store(row_loss + row, tl.where(active, loss, 0.0).to(row_loss.dtype.element_ty), mask=live)
    if row_state is not None:
        tl.store(row_state + row.to(tl.int64) * state_stride, coefficient, mask=live)
    if (d_student is not None) or (d_teacher is not None):
        kind = as_real(tl.where(active, tl.where(invalid, float("nan"), 1.0), 0.0), IS_FP64)
        numbers = (
            s_peak, t_peak, s_centre, t_centre, inverse_ts, inverse_tt, as_real(inverse_s, IS_FP64),
            as_real(inverse_t, IS_FP64), as_real(inverse_q, IS_FP64), as_real(inverse_p, IS_FP64),
            as_real(log_ratio, IS_FP64), as_real(x, IS_FP64), as_real(y, IS_FP64), mix, unit,
            as_real(soft_s, IS_FP64), as_real(soft_t, IS_FP64), as_real(slope, IS_FP64), as_real(offset, IS_FP64),
        )  # fmt: skip
        at_points = (
            as_real(student_label, IS_FP64), as_real(teacher_label, IS_FP64), as_real(teacher_top, IS_FP64)
        )  # fmt: skip
        s_along = as_real(zero, IS_FP64)
        t_along = s_along
        s_middle = s_along
        t_middle = s_along
        if STANDARDIZED:
            s_sums = nothing
            t_sums = nothing
            for start in tl.range(0, classes, BLOCK):
                col = last - start + lane
                s = side_tile(student, student_bias, row, live, student_stride, col, classes, IS_FP64)
                t = side_tile(teacher, teacher_bias, row, live, teacher_stride, col, classes, IS_FP64)
                of_student, of_teacher = soft_gradients(
                    s, t, col, label, top, numbers, at_points, d_student is not None, d_teacher is not None,
                    DIVERGENCE, FORM, STANDARDIZED, IS_FP64,
                )  # fmt: skip
                s_sums += of_student * off_peak(s, s_peak, s_rate)
                t_sums += of_teacher * off_peak(t, t_peak, t_rate)
            s_along = as_real(fp64_sum(s_sums) * (s_bend * (ts * ts)), IS_FP64)
            t_along = as_real(fp64_sum(t_sums) * (t_bend * (tt * tt)), IS_FP64)
            s_middle = as_real(s_off * s_inverse, IS_FP64)
            t_middle = as_real(t_off * t_inverse, IS_FP64)
        of_hard = as_real(hard, IS_FP64)
        inverse_h = as_real(inverse_h, IS_FP64)
        floor = as_real(floor, IS_FP64)
        hard_label = as_real(hard_label, IS_FP64)
        s_total = as_real(student_sum, IS_FP64)
        t_total = as_real(teacher_sum, IS_FP64)
        s_left = folded(nothing)  # what a peak is made of
        t_left = s_left
        s_at = folded(tl.zeros([ROWS, BLOCK], tl.int32))
        t_at = s_at
        for start in tl.range(0, classes, BLOCK):
            col = start + lane
            s = side_tile(student, student_bias, row, live, student_stride, col, classes, IS_FP64)
            t = s
            if SOFT:
                t = side_tile(teacher, teacher_bias, row, live, teacher_stride, col, classes, IS_FP64)
            of_student, of_teacher = soft_gradients(
                s, t, col, label, top, numbers, at_points, d_student is not None, d_teacher is not None,
                DIVERGENCE, FORM, STANDARDIZED, IS_FP64,
            )  # fmt: skip
            if d_teacher is not None:
                t_left, t_at = write_side(
                    d_teacher, row, live, d_teacher_stride, col, classes, kind, t, t_peak, t_total, of_teacher,
                    t_along, t_middle, t_rate, label, t_left, t_at, PROBABILITIES, FORM, STANDARDIZED,
                )  # fmt: skip
            if d_student is not None:
                if HARD:
                    share = exponential(shrunk(s, h_peak), 1.0, IS_FP64) * inverse_h
                    share -= tl.where(s == -INFINITY, 0.0, floor)
                    of_student += tl.where(col == label, hard_label, share * of_hard)
                s_left, s_at = write_side(
                    d_student, row, live, d_student_stride, col, classes, kind, s, s_peak, s_total, of_student,
                    s_along, s_middle, s_rate, label, s_left, s_at, PROBABILITIES, FORM, STANDARDIZED,
                )  # fmt: skip
        usual = live & (kind == 1.0)
        if PROBABILITIES and (d_teacher is not None):
            write_peak(
                d_teacher, row, usual, d_teacher_stride, tl.sum(t_left, 1, keep_dims=True) + t_along * t_middle,
                tl.sum(t_at, 1, keep_dims=True),
            )  # fmt: skip
        if PROBABILITIES and (d_student is not None):
            write_peak(
                d_student, row, usual, d_student_stride, tl.sum(s_left, 1, keep_dims=True) + s_along * s_middle,
                tl.sum(s_at, 1, keep_dims=True),
            )  # fmt: skip
