"""Rows of an adjusted soft-label loss in Triton: their logits, what is measured of a side, what a label is apart from.

The semantics are those of ``csrc/cpu/adjust_row.h``, ``by_label.h``, ``corrected.h`` and ``skewed.h``. Tiles are those
of :mod:`tgt_fast.kernels.triton.distill_row`, and so are their numbers; the numbers of a row, [R, 1], are float64 until
a tile takes them, for they are few and made of differences.
"""

import triton
import triton.language as tl

from tgt_fast.kernels.triton.distill_row import label_logit, load_tile, shrunk
from tgt_fast.kernels.triton.numbers import INFINITY, as_real

BESIDE_SPREAD = tl.constexpr(1e-7)  # a standard deviation
NOWHERE = tl.constexpr(2147483647)


@triton.jit
def side_tile(base, bias, row, live, stride, col, classes, IS_FP64: tl.constexpr):
    """[R, B] logits with the bias of their class, -inf where there is none."""
    x = load_tile(base, row, live, stride, col, classes, IS_FP64)
    if bias is not None:
        x += as_real(tl.load(bias + col, mask=col < classes, other=0.0), IS_FP64)
    return x


@triton.jit
def side_label(base, bias, row, stride, label, IS_FP64: tl.constexpr):
    """The label's logit with its bias, 0 without a label."""
    x = label_logit(base, row, stride, label, IS_FP64)
    if bias is not None:
        x += as_real(tl.load(bias + label, mask=label >= 0, other=0.0), IS_FP64)
    return x


@triton.jit
def measured_side(
    base, bias, row, live, stride, classes, label,
    LABELS: tl.constexpr, FIRST: tl.constexpr, MOMENTS: tl.constexpr, IS_FP64: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """-> the largest logit but the label's, its first column; whether any is no number; count, mean and squares of all.

    Each lane takes its moments about the first logit that it meets, and the lanes meet as whole samples do: nothing
    cancels, and no tile waits for another.
    """
    lane = tl.arange(0, BLOCK)[None, :]
    middle = as_real(tl.zeros([ROWS, BLOCK], tl.float32), IS_FP64)
    largest = middle - INFINITY
    columns = tl.zeros([ROWS, BLOCK], tl.int32)
    unusual = columns
    counted = columns
    first = tl.zeros([ROWS, BLOCK], tl.float64)
    second = first
    for start in tl.range(0, classes, BLOCK):
        col = start + lane
        x = side_tile(base, bias, row, live, stride, col, classes, IS_FP64)
        unusual = tl.maximum(unusual, (~(x < INFINITY)).to(tl.int32))
        if MOMENTS:
            exists = x > -INFINITY
            middle = tl.where(exists & (counted == 0), x, middle)
            counted += exists.to(tl.int32)
            difference = tl.where(exists, x.to(tl.float64) - middle.to(tl.float64), 0.0)
            first += difference
            second += difference * difference
        if LABELS:
            x = tl.where(col == label, -INFINITY, x)
        if FIRST:
            columns = tl.where(x > largest, col, columns)
        largest = tl.maximum(largest, x)
    most = tl.max(largest, 1, keep_dims=True)
    column = tl.min(tl.where(largest == most, columns, NOWHERE), 1, keep_dims=True)
    bad = tl.max(unusual, 1, keep_dims=True) > 0
    number = counted.to(tl.float64)
    here = tl.maximum(number, 1.0)
    of_lanes = middle.to(tl.float64) + first / here
    count = tl.sum(number, 1, keep_dims=True)
    mean = tl.sum(number * of_lanes, 1, keep_dims=True) / tl.maximum(count, 1.0)
    apart = of_lanes - mean
    squares = second - first * (first / here) + number * (apart * apart)
    return most, column, bad, count, mean, tl.sum(tl.where(number > 0, squares, 0.0), 1, keep_dims=True)


@triton.jit
def with_label(most, of_label, label):
    """The largest logit of all."""
    return tl.where(label >= 0, tl.maximum(most, of_label), most)


@triton.jit
def standard_of(count, squares):
    """1e-7 + the standard deviation, and that by the deviation and the degrees of freedom: 0 where it is 0."""
    degrees = tl.maximum(count - 1.0, 1.0)
    spread = tl.sqrt(tl.maximum(squares, 0.0) / degrees)
    scale = BESIDE_SPREAD + spread
    some = spread > 0
    return scale, tl.where(some, scale / (degrees * tl.where(some, spread, 1.0)), 0.0)


@triton.jit
def row_unit(least, digits, IS_FP64: tl.constexpr):
    """The nats that log-probabilities are counted by, a power of 2: as of a whole call, by the row's temperatures."""
    rise = tl.ceil(-tl.log2(tl.minimum(least, 1.0))).to(tl.int32)
    exponent = tl.minimum(digits + rise, 120)
    return as_real(((exponent + 127) << 23).to(tl.float32, bitcast=True), IS_FP64)


@triton.jit
def seen_tiles(
    s, t, col, label, s_peak, t_peak, s_centre, t_centre,
    DIVERGENCE: tl.constexpr, FORM: tl.constexpr, STANDARDIZED: tl.constexpr,
):  # fmt: skip
    """Both sides as the soft term sees them: without the label where it stands apart, less their means for mse."""
    if FORM == "decoupled":
        s = tl.where(col == label, -INFINITY, s)
        t = tl.where(col == label, -INFINITY, t)
    if STANDARDIZED and DIVERGENCE == "mse":
        s = shrunk(s, s_peak) + s_centre
        t = shrunk(t, t_peak) + t_centre
    return s, t


@triton.jit
def off_peak(x, peak, rate):
    """What logits are below the largest, tempered; 0 where there is none. rate: 1 / temperature / SHRINK"""
    return tl.where(x == -INFINITY, 0.0, shrunk(x, peak) * rate)


@triton.jit
def pair_of(own, rest):
    """Log-probabilities of two, from logarithms of which one may be -inf."""
    ahead = own >= rest
    of_larger = -tl.log(1.0 + tl.exp(tl.where(ahead, rest - own, own - rest)))
    return tl.where(ahead, of_larger, (own - rest) + of_larger), tl.where(ahead, (rest - own) + of_larger, of_larger)


@triton.jit
def side_pair(of_label, most, inverse, total):
    """Log-probabilities of a side's label and of all others together, whose largest logit and sum these are."""
    alone = most == -INFINITY
    own = tl.where(alone, 0.0, (of_label.to(tl.float64) - tl.where(alone, 0.0, most).to(tl.float64)) * inverse)
    return pair_of(own, tl.where(alone, -INFINITY, tl.log(total)))


@triton.jit
def own_part(own_q, rest_q, own_p, rest_p, infinite):
    """KL of (label, all others) from log-probabilities, and its gradients: to the student's label (the others' is the
    negative), to the teacher's label and to the teacher's others. Nothing where it is infinite."""
    own_q = tl.where(infinite, own_p, own_q)
    rest_q = tl.where(infinite, rest_p, rest_q)
    p = tl.exp(own_p)
    others = tl.exp(rest_p)
    own = tl.where(p > 0, own_p - own_q, 0.0)
    rest = tl.where(others > 0, rest_p - rest_q, 0.0)
    value = p * own + others * rest
    of_student = tl.where(p > 0.5, others - tl.exp(rest_q), tl.exp(own_q) - p)  # of the smaller numbers
    return value, of_student, p * (own - value), others * (rest - value)


@triton.jit
def corrected_part(kl, log_p, log_q, log_top, is_top, lead):
    """KL of a corrected teacher, what is kept of it, and the gradients beside the kept KL's: to label and first class.

    From KL(p, q), the label's log-probabilities, and the teacher's of its own first class.
    """
    p = tl.exp(log_p)
    top = tl.exp(log_top)
    of_p = tl.where(p > 0, p * log_p, 0.0)
    short = 1.0 - p
    ahead = 1.0 + (top - p)
    kept = tl.where(is_top, tl.where(p + lead >= 1.0, 0.0, 1.0 - lead / short), (1.0 - lead) / ahead)
    some = kept > 0
    log_kept = tl.where(some, tl.log(tl.where(some, kept, 1.0)), 0.0)
    both = p * kept + (1.0 - kept)
    log_both = tl.where(both > 0, tl.log(tl.where(both > 0, both, 1.0)), 0.0)
    mixed = p * log_kept + of_p
    value = kept * (kl + log_kept - mixed) + both * log_both - (1.0 - kept) * log_q
    by_kept = kl + log_kept + 1.0 - mixed - p + (p - 1.0) * (log_both + 1.0) + log_q
    by_label = tl.where(is_top, -lead / (short * short), kept / ahead)
    at_label = by_kept * by_label * p + kept * (p * (log_both - log_kept) - of_p)
    at_top = tl.where(is_top, 0.0, -by_kept * kept / ahead * top)
    return value, kept, tl.where(some, at_label, 0.0), tl.where(some, at_top, 0.0)


@triton.jit
def label_part(
    kl, s_label, t_label, s_most, t_most, is_first, s_inverse, t_inverse, student_sum, teacher_sum, first, second,
    lacking, FORM: tl.constexpr,
):  # fmt: skip
    """The value of a form that goes by the label, from the KL of what the sums are of, and how its gradients differ.

    -> value; factors: of q and p in the student's gradient, of p (log p / q - mean) in the teacher's; what p has there
    beside that; and what is added at the label to the student's gradient, to the teacher's, and at its first class
    """
    if FORM == "decoupled":
        own_q, rest_q = side_pair(s_label, s_most, s_inverse, student_sum)
        own_p, rest_p = side_pair(t_label, t_most, t_inverse, teacher_sum)
        value, of_student, of_teacher, of_rest = own_part(own_q, rest_q, own_p, rest_p, lacking)
        value = first * tl.where(value < 0, 0.0, value) + second * kl
        others = tl.where(teacher_sum == 0, 0.0, second)
        of_student *= first
        return value, others - of_student, others, others, first * of_rest, of_student, first * of_teacher, value * 0.0
    else:
        log_p = (t_label.to(tl.float64) - t_most.to(tl.float64)) * t_inverse - tl.log(teacher_sum)
        log_q = (s_label.to(tl.float64) - s_most.to(tl.float64)) * s_inverse - tl.log(student_sum)
        is_top = is_first & (t_label == t_most)
        value, kept, at_label, at_top = corrected_part(kl, log_p, log_q, -tl.log(teacher_sum), is_top, first)
        return value, value * 0.0 + 1.0, kept, kept, -(at_label + at_top), kept - 1.0, at_label, at_top


@triton.jit
def over_larger(d, skew):
    """(skew own + (1 - skew) other) / the larger, and the smaller / the larger, from d = log(own / other)."""
    smaller = tl.exp(-tl.abs(d))
    of_smaller = tl.where(d < 0, skew, 1 - skew)
    of_larger = tl.where(d < 0, 1 - skew, skew)
    near = 1 + of_smaller * (smaller - 1)
    return tl.where(smaller > 0.5, near, of_smaller * smaller + of_larger), smaller


@triton.jit
def skewed_ratio(d, skew):
    """r = own / (skew own + (1 - skew) other), its logarithm, and other / the same / r."""
    mixture, smaller = over_larger(d, skew)
    log_ratio = tl.where(d < 0, d, 0.0) - tl.log(mixture)
    return tl.where(d < 0, smaller, 1.0) / mixture, log_ratio


@triton.jit
def skewed_terms(own, d, skew):
    """A class's terms of x = sum own log r and y = sum own (1 - skew r)."""
    ratio, log_ratio = skewed_ratio(d, skew)
    return own * log_ratio, own * (1 - ratio * skew)


@triton.jit
def skewed_gradient(own, other, d, skew, x, y, OF_OWN: tl.constexpr):
    """The gradient to the side that is mixed in, or to the other."""
    ratio, log_ratio = skewed_ratio(d, skew)
    if OF_OWN:
        return own * ((log_ratio - x) + ((1 - ratio * skew) - y))
    else:
        return other * (y - ratio * (1 - skew))


@triton.jit
def hard_part(own, others, linear, finite, smoothing, SMOOTHED: tl.constexpr):
    """Cross-entropy of the label's logit against the others', all relative to the largest of those.

    others: sum of their exponentials; linear: of all logits; finite: how many there are.
    -> value; whether it is infinite; for gradients: what the others' exponentials are multiplied by, what is taken from
    each class, and the label's gradient.
    """
    alone = others == 0
    log_others = tl.where(alone, -INFINITY, tl.log(tl.where(alone, 1.0, others)))
    log_own, log_rest = pair_of(own, log_others)
    total = tl.where(own >= log_others, own - log_own, log_others - log_rest)
    missing = own == -INFINITY
    value = -tl.where(missing, 0.0, log_own)
    floor = value * 0.0
    slope = -tl.exp(log_rest)
    if SMOOTHED:
        floor = smoothing / finite
        value = (1 - smoothing) * value + smoothing * total - floor * linear
        slope = (smoothing - tl.where(missing, 0.0, floor)) - tl.exp(log_rest)
        missing = missing & (smoothing < 1)
    value = tl.where(missing, INFINITY, tl.where(value < 0, 0.0, value))
    return value, missing, tl.where(alone, 0.0, tl.exp(-total)), floor, slope
