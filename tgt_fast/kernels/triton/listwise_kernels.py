"""The listwise loss in Triton: a program a row, two scans over its classes in their order.

All sums are of logarithms, so that no spread of the logits underflows: M_k = logsumexp_{l >= k} x_l from the end on,
L_j = logsumexp_{k <= j} (log a_k - M_k) from the beginning; the gradient is exp(x_j + L_j) - a_j, and x_j + L_j <= 0.
"""

import triton
import triton.language as tl

from tgt_fast.kernels.triton.numbers import INFINITY, as_real, cast


@triton.jit
def log_add(a, b):
    """log(exp a + exp b)"""
    high = tl.maximum(a, b)
    low = tl.minimum(a, b)
    apart = tl.where(high == -INFINITY, -INFINITY, low - high)
    return high + tl.log(1.0 + tl.exp(apart))


@triton.jit
def listwise_kernel(
    student, order, weights, factor, loss, d_student, suffix,
    classes, student_stride, d_stride,
    WANT_D: tl.constexpr, IS_FP64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of a row and its gradient, along ``order`` [N, C], whose -1 are classes that are left out."""
    row = tl.program_id(0).to(tl.int64)
    share = tl.load(factor + row)
    x_row, at_row = student + row * student_stride, row * classes
    tiles = tl.cdiv(classes, BLOCK)
    none = tl.zeros([1], tl.float64 if IS_FP64 else tl.float32)
    if share == 0.0:
        tl.store(loss + row, share)
    else:
        after = tl.sum(none, 0) - INFINITY
        total = tl.sum(none, 0)
        missing = tl.program_id(0) * 0
        for step in range(tiles):
            k = (tiles - 1 - step) * BLOCK + tl.arange(0, BLOCK)
            place = tl.load(order + at_row + k, mask=k < classes, other=-1)
            a = as_real(tl.load(weights + at_row + k, mask=k < classes, other=0.0), IS_FP64)
            x = as_real(tl.load(x_row + place, mask=place >= 0, other=-INFINITY), IS_FP64)
            m = log_add(tl.associative_scan(x, 0, log_add, reverse=True), after)
            after = tl.max(m, 0)
            tl.store(suffix + at_row + k, m, mask=k < classes)
            missing = tl.maximum(missing, tl.max(((a > 0) & (x == -INFINITY)).to(tl.int32), 0))
            total += tl.sum(tl.where((a > 0) & (x > -INFINITY), a * (m - x), 0.0), 0)
        found = share * tl.maximum(total, 0.0).to(tl.float64)
        tl.store(loss + row, tl.where(missing > 0, INFINITY, found))
        if WANT_D:
            scale = as_real(tl.where(missing > 0, 0.0, share), IS_FP64)
            before = tl.sum(none, 0) - INFINITY
            for tile in range(tiles):
                k = tile * BLOCK + tl.arange(0, BLOCK)
                place = tl.load(order + at_row + k, mask=k < classes, other=-1)
                a = as_real(tl.load(weights + at_row + k, mask=k < classes, other=0.0), IS_FP64)
                x = as_real(tl.load(x_row + place, mask=place >= 0, other=-INFINITY), IS_FP64)
                m = tl.load(suffix + at_row + k, mask=k < classes, other=0.0)
                part = tl.where(a > 0, tl.log(tl.where(a > 0, a, 1.0)) - m, -INFINITY)
                part = log_add(tl.associative_scan(part, 0, log_add), before)
                before = tl.max(part, 0)
                slope = scale * (tl.exp(tl.where(x == -INFINITY, -INFINITY, x + part)) - a)
                slope = tl.where(scale == 0.0, 0.0, slope)
                tl.store(d_student + row * d_stride + place, cast(slope, d_student.dtype.element_ty), mask=place >= 0)
