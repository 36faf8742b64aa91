"""The gradients of a tile of an adjusted soft-label loss, in Triton, from the numbers of its rows."""

import triton
import triton.language as tl

from tgt_fast.kernels.triton.adjusted_row import off_peak, seen_tiles, skewed_gradient
from tgt_fast.kernels.triton.distill_peak import PEAKED, folded
from tgt_fast.kernels.triton.distill_row import classes_of, store_tile, student_tile, teacher_tile
from tgt_fast.kernels.triton.numbers import INFINITY


@triton.jit
def soft_gradients(
    s, t, col, label, top, numbers, at_points,
    WANT_STUDENT: tl.constexpr, WANT_TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr, FORM: tl.constexpr, STANDARDIZED: tl.constexpr, IS_FP64: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile to what the soft term sees, by the temperatures of the raw logits."""
    (
        s_peak, t_peak, s_centre, t_centre, inverse_ts, inverse_tt, inverse_s, inverse_t, inverse_q, inverse_p,
        log_ratio, x, y, mix, unit, soft_s, soft_t, slope, offset,
    ) = numbers  # fmt: skip
    student_label, teacher_label, teacher_top = at_points
    zero = x * 0.0
    s_seen, t_seen = seen_tiles(s, t, col, label, s_peak, t_peak, s_centre, t_centre, DIVERGENCE, FORM, STANDARDIZED)
    of_student = zero
    of_teacher = zero
    if FORM == "skewed" or FORM == "mirrored":
        a, b, p, q = classes_of(s_seen, t_seen, s_peak, t_peak, inverse_ts, inverse_tt, unit, DIVERGENCE, IS_FP64)
        p = p * inverse_t
        q = q * inverse_s
        d = (a - b) - log_ratio
        if FORM == "skewed":
            of_student = skewed_gradient(p, q, d, mix, x, y, False) * soft_s
            of_teacher = skewed_gradient(p, q, d, mix, x, y, True) * soft_t
        else:
            of_student = skewed_gradient(q, p, -d, mix, x, y, True) * soft_s
            of_teacher = skewed_gradient(q, p, -d, mix, x, y, False) * soft_t
    else:
        if WANT_STUDENT:
            of_student = student_tile(
                s_seen, t_seen, col, label, s_peak, t_peak, inverse_ts, inverse_tt, inverse_q, inverse_p, log_ratio,
                x, y, mix, unit, soft_s, zero, zero, zero, zero, DIVERGENCE, False, False, 0, IS_FP64,
            )  # fmt: skip
        if WANT_TEACHER:
            if FORM == "plain":
                of_teacher = teacher_tile(
                    s_seen, t_seen, s_peak, t_peak, inverse_ts, inverse_tt, inverse_s, inverse_t, log_ratio, x, y, mix,
                    unit, soft_t, DIVERGENCE, IS_FP64,
                )  # fmt: skip
            else:
                a, b, p, q = classes_of(
                    s_seen, t_seen, s_peak, t_peak, inverse_ts, inverse_tt, unit, DIVERGENCE, IS_FP64
                )  # fmt: skip
                p = p * inverse_t
                of_teacher = (p * ((a - b) - x)) * slope + p * offset
    if FORM == "decoupled" or FORM == "corrected":
        of_student += tl.where(col == label, student_label, 0.0)
        of_teacher += tl.where(col == label, teacher_label, 0.0)
    if FORM == "corrected":
        of_teacher += tl.where(col == top, teacher_top, 0.0)
    return of_student, of_teacher


@triton.jit
def write_side(
    base, row, live, stride, col, classes, kind, x, most, total, grad, along, middle, rate, label, others, at,
    PEAKS: tl.constexpr, FORM: tl.constexpr, STANDARDIZED: tl.constexpr,
):  # fmt: skip
    """Writes a tile of a side's gradient. -> what its peak needs of the tiles so far"""
    if PEAKS:
        peak = (total < PEAKED) & (x == most)
        if FORM == "decoupled":
            peak = peak & (col != label)
        others += folded(tl.where(peak, 0.0, grad))
        at += folded(tl.where(peak, col + 1, 0))
    if STANDARDIZED:
        grad -= tl.where(x == -INFINITY, 0.0, (off_peak(x, most, rate) + middle) * along)
    store_tile(base, row, live, stride, col, classes, tl.where(kind == 1.0, grad, kind))
    return others, at
