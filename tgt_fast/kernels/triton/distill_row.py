"""Rows of the soft-label loss in Triton: what a class is, a row's terms, its loss, and the gradients of a tile.

The semantics are those of ``csrc/common/divergence.h`` and ``csrc/cuda/distill_row.h``. A tile is ``[R, B]``: R rows by
B classes; what belongs to a row is ``[R, 1]``. Logits beyond a row's end are -inf on both sides, which is what a class
that does not exist looks like anyway.

Sums are taken of values relative to the row's maxima, a = (t - max t) / Tt and b = (s - max s) / Ts, and the gradients
need no more: only losses, and the mixtures of jsd, see the logarithms of the normalisers, as that of their ratio where
that is all there is.

Differences of logits are shrunk, so that they are finite whatever the logits, and a and b are in units of so many nats
that sums over a row stay in range. Both are powers of 2, which round nothing. What jsd and tvd make of a and b is
bounded, and in nats.
"""

import triton
import triton.language as tl

from tgt_fast.kernels.triton.numbers import INFINITY, as_real, cast

LOG2_E = tl.constexpr(1.4426950408889634)

SHRINK = tl.constexpr(0.125)
TINY = tl.constexpr(2.0**-33)  # sums of shrunk differences of as many classes as there may be stay in range with it
SMALL = tl.constexpr(2.0**-70)  # squares in units of its inverse stay in range
FITS = tl.constexpr(1e37)

# Numbers of calls for each of which no kernel is compiled anew.
COUNTS = [
    "rows", "classes", "student_stride", "teacher_stride", "d_student_stride", "d_teacher_stride", "ignore_index",
    "unlabeled_index",
]  # fmt: skip

# The columns of a row's state: what the gradients are made of, beside the logits.
STUDENT_MAX = tl.constexpr(0)
TEACHER_MAX = tl.constexpr(1)
STUDENT_SUM = tl.constexpr(2)
TEACHER_SUM = tl.constexpr(3)
HARD_SUM = tl.constexpr(4)
FINITE = tl.constexpr(5)  # number of classes whose student logit is not -inf
X = tl.constexpr(6)
Y = tl.constexpr(7)
SOFT = tl.constexpr(8)  # coefficient of the soft term; 0 where it is infinite
HARD = tl.constexpr(9)  # coefficient of the hard term; 0 where there is none or it is infinite
KIND = tl.constexpr(10)  # 1: as above; 0: gradients of 0; NaN: gradients of NaN


@triton.jit
def lowest(IS_FP64: tl.constexpr):
    """A quarter of the lowest finite number."""
    if IS_FP64:
        return -4.0e307
    else:
        return -8.0e37


@triton.jit
def bounded_below(x, IS_FP64: tl.constexpr):
    """Keeps -inf away from 0 * inf and inf - inf. NaN stays."""
    return tl.where(x < lowest(IS_FP64), lowest(IS_FP64), x)


@triton.jit
def shrunk(x, most):
    return x * SHRINK - most * SHRINK


@triton.jit
def exponential(difference, inverse, IS_FP64: tl.constexpr):
    """exp of a difference, which is shrunk, times the inverse."""
    if IS_FP64:
        return tl.exp(difference * (inverse / SHRINK))
    else:
        return tl.exp2(difference * (inverse * (LOG2_E / SHRINK)))


@triton.jit
def power_of(base, POWER: tl.constexpr):
    """base ** POWER, of 1 to 4."""
    if POWER == 1:
        return base
    elif POWER == 2:
        return base * base
    elif POWER == 3:
        return base * base * base
    else:
        squared = base * base
        return squared * squared


@triton.jit
def hard_exponential(s, s_max, q, POWER: tl.constexpr, IS_FP64: tl.constexpr):
    """exp(s - max); with POWER, the student's temperature, by multiplications from q = exp((s - max) / Ts)."""
    if POWER > 0:
        return power_of(q, POWER)
    else:
        return exponential(shrunk(s, s_max), 1.0, IS_FP64)


@triton.jit
def in_units(inverse, unit, DIVERGENCE: tl.constexpr):
    """The factor of a shrunk difference, with an inverse temperature."""
    if DIVERGENCE == "jsd" or DIVERGENCE == "tvd":
        return inverse / SHRINK
    else:
        return inverse / SHRINK / unit


@triton.jit
def finite_maximum(x):
    """x, or 0 where it is -inf: a row of nothing but -inf is recognised by its maximum, not by what follows from it."""
    return tl.where(x == -INFINITY, 0.0, x)


@triton.jit
def load_tile(base, row, live, stride, col, classes, IS_FP64: tl.constexpr):
    """[R, B] logits, -inf where there is none."""
    inside = live & (col < classes)
    return as_real(tl.load(base + row.to(tl.int64) * stride + col, mask=inside, other=-INFINITY), IS_FP64)


@triton.jit
def label_logit(student, row, stride, label, IS_FP64: tl.constexpr):
    """The label's logit, 0 without one. To be read beside the first tiles: later a faster warp may overwrite it."""
    return as_real(tl.load(student + row.to(tl.int64) * stride + label, mask=label >= 0, other=0.0), IS_FP64)


@triton.jit
def store_tile(base, row, live, stride, col, classes, value):
    inside = live & (col < classes)
    tl.store(base + row.to(tl.int64) * stride + col, cast(value, base.dtype.element_ty), mask=inside)


@triton.jit
def classes_of(s, t, s_max, t_max, inverse_ts, inverse_tt, unit, DIVERGENCE: tl.constexpr, IS_FP64: tl.constexpr):
    """a, b, exp a, exp b of a tile; the tempered logits themselves, without exponentials, for mse."""
    if DIVERGENCE == "mse" or DIVERGENCE == "none":
        a = bounded_below(t * (inverse_tt / unit), IS_FP64)
        b = bounded_below(s * (inverse_ts / unit), IS_FP64)
        return a, b, a, b
    else:
        t_shifted = shrunk(t, t_max)
        s_shifted = shrunk(s, s_max)
        p = exponential(t_shifted, inverse_tt, IS_FP64)
        q = exponential(s_shifted, inverse_ts, IS_FP64)
        a = bounded_below(t_shifted * in_units(inverse_tt, unit, DIVERGENCE), IS_FP64)
        b = bounded_below(s_shifted * in_units(inverse_ts, unit, DIVERGENCE), IS_FP64)
        return a, b, p, q


@triton.jit
def problems_of(s, t, DIVERGENCE: tl.constexpr):
    """2: NaN or +inf; 1: the divergence is infinite, since one side's mass meets none on the other; 0: neither."""
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "cross_entropy":
        mismatch = (s == -INFINITY) & (t > -INFINITY)
    elif DIVERGENCE == "reverse_kl":
        mismatch = (t == -INFINITY) & (s > -INFINITY)
    elif DIVERGENCE == "symmetric" or DIVERGENCE == "mse":
        mismatch = (s == -INFINITY) ^ (t == -INFINITY)
    else:
        mismatch = s != s
    usual = (s < INFINITY) & (t < INFINITY)
    return tl.where(usual, mismatch.to(tl.int32), 2)


@triton.jit
def log_ratios(a, b, log_ratio, beta):
    """log(p / m) and log(q / m), m = beta p + (1 - beta) q, from d = log(p / q) alone.

    With w the weight of the larger of p and q, log(larger / m) = -log(w + (1 - w) exp(-|d|)) and the other is |d| less:
    the rounding error that all d share then cancels between both sums to first order.
    """
    d = (a - b) - log_ratio
    other = tl.where(d < 0, beta, 1 - beta)
    of_larger = -tl.log(1 + other * (tl.exp(-tl.abs(d)) - 1))
    return tl.where(d < 0, of_larger + d, of_larger), tl.where(d < 0, of_larger, of_larger - d)


@triton.jit
def half_sign(p, q):
    """sign(p - q) / 2."""
    return tl.where(p > q, 0.5, tl.where(p < q, -0.5, 0.0))


@triton.jit
def shifted_terms(a, b, p, q, unit, DIVERGENCE: tl.constexpr):
    """A class's terms of the sums x and y that can be taken before the row's normalisers are known.

    Of mse x is in nats, and y is x in units of 1 / SMALL, should x leave the range.
    """
    x = p * 0.0
    y = x
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "symmetric":
        x = p * (a - b)
    if DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric":
        y = q * (b - a)
    if DIVERGENCE == "cross_entropy":
        x = p * -b
    if DIVERGENCE == "mse":
        difference = (b - a) * unit
        small = (b - a) * (unit * SMALL)
        x = difference * difference
        y = small * small
    return x, y


@triton.jit
def centred_terms(a, b, p, q, x, y, DIVERGENCE: tl.constexpr):
    """The same about the means x and y that they gave: their sums are what rounding left of them.

    The gradients are made of such differences, so a mean is to be right relative to them, not to its own size.
    """
    x_terms = p * 0.0
    y_terms = x_terms
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "symmetric":
        x_terms = p * ((a - b) - x)
    if DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric":
        y_terms = q * ((b - a) - y)
    if DIVERGENCE == "cross_entropy":
        x_terms = p * (-b - x)
    return x_terms, y_terms


@triton.jit
def normalised_terms(a, b, p, q, inverse_s, inverse_t, log_ratio, beta, DIVERGENCE: tl.constexpr):
    """A class's terms of the sums of jsd and tvd, which need the normalisers."""
    p = p * inverse_t
    q = q * inverse_s
    if DIVERGENCE == "jsd":
        of_teacher, of_student = log_ratios(a, b, log_ratio, beta)
        return p * of_teacher, q * of_student
    else:
        side = half_sign(p, q)
        return p * side, q * -side


@triton.jit
def open_rows(
    row,  # [R, 1]
    live,  # [R, 1] whether the row exists
    target,
    weight,
    divisor_at,  # float64
    divisor,  # float64
    classes,
    ignore_index,
    unlabeled_index,
    IS_FP64: tl.constexpr,
):
    """Each row's label (-1: none), weight, coefficient in the reduced loss; whether it counts, and has gradients.

    A label or a weight that is out of range drops the row: on a device it cannot be an error.
    """
    counts = live
    label = tl.full(row.shape, -1, tl.int64)
    if target is not None:
        label = tl.load(target + row, mask=live, other=0)
        unlabeled = label == unlabeled_index
        counts = counts & (label != ignore_index) & (unlabeled | ((label >= 0) & (label < classes)))
        label = tl.where(counts & ~unlabeled, label, -1)
    if divisor_at is not None:
        divisor = tl.load(divisor_at)
    safe = tl.where(divisor == 0, 1.0, divisor)
    if weight is not None:
        a_weight = tl.load(weight + row, mask=live, other=0.0)  # float64: it may leave the range of the logits' type
        counts = counts & (a_weight > 0) & (a_weight < INFINITY)
        coefficient = as_real(a_weight / safe, IS_FP64)
    else:
        a_weight = as_real(tl.full(row.shape, 1.0, tl.float32), IS_FP64)
        coefficient = as_real(1.0 / safe + tl.zeros(row.shape, tl.float64), IS_FP64)
    active = tl.where(counts, divisor, 0.0) != 0
    return label, a_weight, tl.where(active, coefficient, 0.0), counts, active


@triton.jit
def soft_value(
    x, y, student_sum, teacher_sum, beta, unit, coefficient, temperature, soft_loss, DIVERGENCE: tl.constexpr
):  # fmt: skip
    """coefficient * temperature * soft_loss * the divergence from its sums, which is not negative.

    In an order in which neither a squared temperature nor what the coefficient is yet to shrink leaves the range.
    """
    scale = temperature * unit
    if DIVERGENCE == "forward_kl":
        value = x - tl.log(teacher_sum / student_sum) / unit
    elif DIVERGENCE == "reverse_kl":
        value = y + tl.log(teacher_sum / student_sum) / unit
    elif DIVERGENCE == "cross_entropy":
        value = x + tl.log(student_sum) / unit
    elif DIVERGENCE == "jsd":
        value = beta * x + (1 - beta) * y
        scale = temperature
    elif DIVERGENCE == "mse":
        fits = x < FITS
        value = tl.where(fits, x, y)
        root = tl.where(fits, 1.0, 1.0 / SMALL)
        return (((value * coefficient) * soft_loss) * temperature) * root * root
    elif DIVERGENCE == "none":
        value = x * 0.0
    else:  # symmetric, whose logarithms cancel, and tvd
        value = x + y
        if DIVERGENCE == "tvd":
            scale = temperature
    return ((tl.where(value < 0, 0.0, value) * coefficient) * soft_loss) * scale


@triton.jit
def hard_value(label_shifted, hard_sum, linear, finite, smoothing, SMOOTHED: tl.constexpr):
    """Cross-entropy with the label, shrunk. label_shifted: the label's logit less the maximum, shrunk; linear: the sum
    of all those times TINY."""
    value = tl.log(hard_sum) * SHRINK
    of_label = tl.where(label_shifted == -INFINITY, 0.0, label_shifted)
    if SMOOTHED:
        value -= (smoothing / finite * linear) / TINY + (1 - smoothing) * of_label
        missing = tl.where(label_shifted == -INFINITY, 1 - smoothing, 0.0) > 0
    else:
        value -= of_label
        missing = label_shifted == -INFINITY
    return tl.where(missing, INFINITY, tl.where(value < 0, 0.0, value)), missing


@triton.jit
def student_tile(
    s, t, col, label, s_max, t_max, inverse_ts, inverse_tt, inverse_s, inverse_t, log_ratio, x, y, beta, unit,
    soft, hard, inverse_h, floor, of_label,
    DIVERGENCE: tl.constexpr, LABELS: tl.constexpr, SMOOTHED: tl.constexpr, POWER: tl.constexpr, IS_FP64: tl.constexpr,
):  # fmt: skip
    """The gradient to a tile of student logits: soft * d D + hard * (softmax - smoothed label)."""
    a, b, p, q = classes_of(s, t, s_max, t_max, inverse_ts, inverse_tt, unit, DIVERGENCE, IS_FP64)
    grad = q * 0.0
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "cross_entropy":
        grad = (q * inverse_s - p * inverse_t) * soft
    if DIVERGENCE == "reverse_kl":
        grad = (q * inverse_s) * ((b - a) - y) * (soft * unit)
    if DIVERGENCE == "symmetric":
        grad = (q * inverse_s - p * inverse_t) * soft + (q * inverse_s) * ((b - a) - y) * (soft * unit)
    if DIVERGENCE == "jsd":
        of_teacher, of_student = log_ratios(a, b, log_ratio, beta)
        grad = (q * inverse_s * (1 - beta)) * (of_student - y) * soft
    if DIVERGENCE == "tvd":
        grad = (q * inverse_s) * (-half_sign(p * inverse_t, q * inverse_s) - y) * soft
    if DIVERGENCE == "mse":
        grad = (b - a) * 2.0 * (soft * unit)
    if LABELS:
        share = hard_exponential(s, s_max, q, POWER, IS_FP64) * inverse_h
        if SMOOTHED:
            share = tl.where(s == -INFINITY, share, share - floor)
        grad += share * hard
        grad -= tl.where(col == label, of_label, 0.0)
    return grad


@triton.jit
def teacher_tile(
    s, t, s_max, t_max, inverse_ts, inverse_tt, inverse_s, inverse_t, log_ratio, x, y, beta, unit, soft,
    DIVERGENCE: tl.constexpr, IS_FP64: tl.constexpr,
):  # fmt: skip
    """The gradient to a tile of teacher logits."""
    a, b, p, q = classes_of(s, t, s_max, t_max, inverse_ts, inverse_tt, unit, DIVERGENCE, IS_FP64)
    grad = p * 0.0
    if DIVERGENCE == "forward_kl":
        grad = (p * inverse_t) * ((a - b) - x) * (soft * unit)
    if DIVERGENCE == "reverse_kl":
        grad = (p * inverse_t - q * inverse_s) * soft
    if DIVERGENCE == "symmetric":
        grad = (p * inverse_t) * ((a - b) - x) * (soft * unit) + (p * inverse_t - q * inverse_s) * soft
    if DIVERGENCE == "jsd":
        of_teacher, of_student = log_ratios(a, b, log_ratio, beta)
        grad = (p * inverse_t * beta) * (of_teacher - x) * soft
    if DIVERGENCE == "tvd":
        grad = (p * inverse_t) * (half_sign(p * inverse_t, q * inverse_s) - x) * soft
    if DIVERGENCE == "cross_entropy":
        grad = (p * inverse_t) * (-b - x) * (soft * unit)
    if DIVERGENCE == "mse":
        grad = (a - b) * 2.0 * (soft * unit)
    return grad


@triton.jit
def rise_of(old, new):
    """By how much a side's maximum rises, shrunk; 0 for the first maximum, before which there is nothing."""
    return tl.where(old == -INFINITY, 0.0, shrunk(finite_maximum(new), finite_maximum(old)))


@triton.jit
def fp64_sum(lanes):
    """The sum of a row's lanes, in float64: the gradients are made of differences from such means."""
    return tl.sum(lanes.to(tl.float64), 1, keep_dims=True)
