"""The gradient of a class that has most of its row's probability, in Triton.

A gradient over the classes of a row adds up to 0. The one of such a class is a difference of numbers near 1 that leaves
little, and rounding takes much of that; the others' are exact. So it is the negative of what they add up to.
"""

import triton
import triton.language as tl

from tgt_fast.kernels.triton.distill_row import store_tile
from tgt_fast.kernels.triton.numbers import INFINITY

# Most of the probability is at the largest logit, which adds 1 to the row's sum of exponentials. Two of them would add
# 2, to within the error of an exponential.
PEAKED = tl.constexpr(1.9375)


@triton.jit
def student_peak(s, s_max, student_sum, hard_sum, hard, DIVERGENCE: tl.constexpr, LABELS: tl.constexpr):
    """The places of a tile's peaks, of the gradient to the student."""
    peaked = s_max != s_max
    if DIVERGENCE != "none":
        peaked = student_sum < PEAKED
    if LABELS:
        peaked = peaked | ((hard != 0) & (hard_sum < PEAKED))
    return peaked & (s == s_max)


@triton.jit
def teacher_peak(t, t_max, teacher_sum):
    """The same of the gradient to the teacher."""
    return (teacher_sum < PEAKED) & (t == t_max)


@triton.jit
def with_peak(grad, peak):
    """The gradients of whole rows."""
    others = tl.sum(tl.where(peak, 0.0, grad), 1, keep_dims=True)
    return tl.where(peak & (tl.abs(others) < INFINITY), -others, grad)


@triton.jit
def folded(lanes):
    """Sums over neighbours, which a thread has: a quarter of the registers.  [R, B] -> [R, B / 4]"""
    if lanes.shape[1] < 4:
        return lanes
    else:
        return tl.sum(tl.reshape(lanes, [lanes.shape[0], lanes.shape[1] // 4, 4]), 2)


@triton.jit
def write_peak(base, row, live, stride, others, at):
    """The peak's gradient over what tiles have written. others, at: of the lanes; ``at`` its column plus 1, or 0."""
    others = tl.sum(others, 1, keep_dims=True)
    at = tl.sum(at, 1, keep_dims=True)
    tl.debug_barrier()  # behind the tiles' stores
    store_tile(base, row, live & (at > 0) & (tl.abs(others) < INFINITY), stride, at - 1, 2147483647, -others)
