"""The soft embedding in Triton, fused with its matrix products: a tile of probabilities lives in registers alone.

Forward goes over the vocabulary with a running maximum, as attention goes over its keys; backward makes a tile's
probabilities again from the maximum and the sum of its row. Noise is a function of its place, so it is drawn in each.
"""

import triton
import triton.language as tl

from tgt_fast.kernels.triton.numbers import INFINITY, INTERPRETED, cast
from tgt_fast.kernels.triton.philox import draw_gumbels, key_of


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b in float32. The interpreter multiplies the bits of bfloat16: there they are cast to float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def product(p, t, total, PRECISION: tl.constexpr):
    """total + p @ t of float32 probabilities. With a 16-bit table, p in two parts, so that nothing of it is rounded
    away and the tensor cores still do the work."""
    if t.dtype == tl.float32:
        return dot(p, t, total, PRECISION)
    else:
        high = cast(p, t.dtype)
        low = cast(p - high.to(tl.float32), t.dtype)
        return dot(low, t, dot(high, t, total, PRECISION), PRECISION)


@triton.jit
def noisy_tile(
    logits, row, live, col, classes, stride, positions,
    ids, seed_at, seed_low, seed_high, step_at, op_step, replica,
    GUMBEL: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Logits plus noise, -inf where there is none.  row [R, 1], col [1, V] -> [R, V] float32"""
    place = logits + row.to(tl.int64) * stride + col
    y = tl.load(place, mask=live & (col < classes), other=-INFINITY).to(tl.float32)
    if GUMBEL:
        sample = row // positions
        c1, c2, c3, k0, k1 = key_of(sample, live, ids, seed_at, seed_low, seed_high, step_at, op_step, replica)
        first = (row % positions).to(tl.int64) * ((classes + 3) // 4)
        start = tl.min(col, 1, keep_dims=True) // 4
        block = (first + start + tl.arange(0, CLASSES // 4)[None, :]).to(tl.uint32)
        y += draw_gumbels(block, c1, c2, c3, k0, k1)
    return y


@triton.jit
def table_tile(table, v, d, classes, width, stride):
    """[V, D] of the table, 0 where there is none."""
    return tl.load(table + v.to(tl.int64) * stride + d, mask=(v < classes) & (d < width), other=0.0)


@triton.jit(do_not_specialize=["rows", "positions", "seed_low", "seed_high", "op_step", "replica"])
def soft_fwd_kernel(
    logits, table, sums, largest, total, chosen,  # [S, N, D], [S, N], [S, N], [S, N]: a part a split
    rows, classes, width, logits_stride, table_stride, positions, splits, inverse_tau,
    ids, seed_at, seed_low, seed_high, step_at, op_step, replica,
    GUMBEL: tl.constexpr, HARD: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """exp((y - max y) / tau) @ table of a part of the vocabulary, its maximum and its sum; with HARD the first place of
    the maximum in the product's place."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, ROWS)
    row = (program % row_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    split = (program // row_tiles) % splits
    d = (program // (row_tiles * splits)) * WIDTH + tl.arange(0, WIDTH)[None, :]
    live = row < rows
    tiles = tl.cdiv(classes, CLASSES)
    peak = tl.full([ROWS, 1], -INFINITY, tl.float32)
    place = tl.zeros([ROWS, 1], tl.int32)
    odd = tl.zeros([ROWS, 1], tl.int32)  # +inf or NaN
    sum_ = tl.zeros([ROWS, 1], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for tile in range(split * tiles // splits, (split + 1) * tiles // splits):
        col = tile * CLASSES + tl.arange(0, CLASSES)[None, :]
        y = noisy_tile(
            logits, row, live, col, classes, logits_stride, positions, ids, seed_at, seed_low, seed_high, step_at,
            op_step, replica, GUMBEL, CLASSES,
        )  # fmt: skip
        y = tl.where(live & (col < classes), y, -INFINITY)
        odd = tl.maximum(odd, tl.max((~(y < INFINITY)).to(tl.int32), 1, keep_dims=True))
        most = tl.max(y, 1, keep_dims=True)
        if HARD:
            first = tl.min(tl.where(y == most, col, classes), 1, keep_dims=True)
            place = tl.where(most > peak, first, place)
        risen = tl.maximum(most, peak)
        base = tl.where(risen == -INFINITY, 0.0, risen)
        shrink = tl.exp((peak - base) * inverse_tau)
        p = tl.exp((y - base) * inverse_tau)
        sum_ = sum_ * shrink + tl.sum(p, 1, keep_dims=True)
        if not HARD:
            v = tile * CLASSES + tl.arange(0, CLASSES)[:, None]
            acc = product(p, table_tile(table, v, d, classes, width, table_stride), acc * shrink, PRECISION)
        peak = risen
    part = split.to(tl.int64) * rows
    if not HARD:
        tl.store(sums + (part + row) * width + d, acc, mask=live & (d < width))
    else:
        tl.store(chosen + part + row, place.to(tl.int64), mask=live)
    # Every tile of the embedding finds the same.
    tl.store(largest + part + row, tl.where(odd > 0, float("nan"), peak), mask=live)
    tl.store(total + part + row, sum_, mask=live)


@triton.jit
def probabilities(y, peak, total, inverse_tau):
    return tl.exp((y - peak) * inverse_tau) / total


@triton.jit
def slope_tile(
    table, d_out, row, live, v, classes, width, table_stride,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """d_out @ table^T of a tile: the gradient to the probabilities.  row [R, 1], v [V, 1] -> [R, V] float32"""
    slope = tl.zeros([ROWS, CLASSES], tl.float32)
    for start in range(0, width, WIDTH):
        d = start + tl.arange(0, WIDTH)[None, :]
        up = tl.load(d_out + row.to(tl.int64) * width + d, mask=live & (d < width), other=0.0)
        slope = dot(up, tl.trans(table_tile(table, v, d, classes, width, table_stride)), slope, PRECISION)
    return slope


@triton.jit(do_not_specialize=["rows", "positions", "seed_low", "seed_high", "op_step", "replica"])
def soft_mean_kernel(
    logits, table, d_out, largest, total, highest, centre, mean, share,  # the last four [S, N]: a part a split
    rows, classes, width, logits_stride, table_stride, positions, splits, inverse_tau,
    ids, seed_at, seed_low, seed_high, step_at, op_step, replica,
    GUMBEL: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of a part of the vocabulary: its largest logit, the slope there (the centre), sum p (slope - centre) and sum p.

    A row's gradient is p (slope - sum p slope). Where one class has nearly all of the probability, that is a small
    difference of large numbers, and float32 loses it; slopes less the one of that class are small from the start.
    """
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, ROWS)
    row = (program % row_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    split = program // row_tiles
    live = row < rows
    tiles = tl.cdiv(classes, CLASSES)
    peak = tl.load(largest + row, mask=live, other=0.0)
    sum_ = tl.load(total + row, mask=live, other=1.0)
    best = tl.full([ROWS, 1], -INFINITY, tl.float32)
    middle = tl.zeros([ROWS, 1], tl.float32)
    moved = tl.zeros([ROWS, 1], tl.float32)
    weight = tl.zeros([ROWS, 1], tl.float32)
    for tile in range(split * tiles // splits, (split + 1) * tiles // splits):
        col = tile * CLASSES + tl.arange(0, CLASSES)[None, :]
        v = tile * CLASSES + tl.arange(0, CLASSES)[:, None]
        slope = slope_tile(
            table, d_out, row, live, v, classes, width, table_stride, PRECISION, ROWS, CLASSES, WIDTH
        )  # fmt: skip
        y = noisy_tile(
            logits, row, live, col, classes, logits_stride, positions, ids, seed_at, seed_low, seed_high, step_at,
            op_step, replica, GUMBEL, CLASSES,
        )  # fmt: skip
        y = tl.where(live & (col < classes), y, -INFINITY)
        p = probabilities(y, peak, sum_, inverse_tau)
        most = tl.max(y, 1, keep_dims=True)
        there = tl.max(tl.where(y == most, slope, -INFINITY), 1, keep_dims=True)
        before = middle
        middle = tl.where(most > best, there, middle)
        best = tl.maximum(best, most)
        moved += weight * (before - middle)
        moved += tl.sum(p * (slope - middle), 1, keep_dims=True)
        weight += tl.sum(p, 1, keep_dims=True)
    at = split.to(tl.int64) * rows + row
    tl.store(highest + at, best, mask=live)
    tl.store(centre + at, middle, mask=live)
    tl.store(mean + at, moved, mask=live)
    tl.store(share + at, weight, mask=live)


@triton.jit(do_not_specialize=["rows", "positions", "seed_low", "seed_high", "op_step", "replica"])
def soft_bwd_logits_kernel(
    logits, table, d_out, largest, total, centre, mean, d_logits,  # [N]: a row's centre, and mean of slope - centre
    rows, classes, width, logits_stride, table_stride, positions, inverse_tau,
    ids, seed_at, seed_low, seed_high, step_at, op_step, replica,
    GUMBEL: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """p ((slope - centre) - mean) / tau of a tile, slope = d_out @ table^T."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, ROWS)
    row = (program % row_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    tile = program // row_tiles
    col = tile * CLASSES + tl.arange(0, CLASSES)[None, :]
    v = tile * CLASSES + tl.arange(0, CLASSES)[:, None]
    live = row < rows
    slope = slope_tile(
        table, d_out, row, live, v, classes, width, table_stride, PRECISION, ROWS, CLASSES, WIDTH
    )  # fmt: skip
    y = noisy_tile(
        logits, row, live, col, classes, logits_stride, positions, ids, seed_at, seed_low, seed_high, step_at, op_step,
        replica, GUMBEL, CLASSES,
    )  # fmt: skip
    peak = tl.load(largest + row, mask=live, other=0.0)
    p = probabilities(y, peak, tl.load(total + row, mask=live, other=1.0), inverse_tau)
    slope -= tl.load(centre + row, mask=live, other=0.0)
    grad = p * (slope - tl.load(mean + row, mask=live, other=0.0)) * inverse_tau
    to = d_logits + row.to(tl.int64) * classes + col
    tl.store(to, cast(grad, d_logits.dtype.element_ty), mask=live & (col < classes))


@triton.jit(do_not_specialize=["rows", "positions", "seed_low", "seed_high", "op_step", "replica"])
def soft_bwd_table_kernel(
    logits, d_out, largest, total, d_table,
    rows, classes, width, logits_stride, positions, inverse_tau,
    ids, seed_at, seed_low, seed_high, step_at, op_step, replica,
    GUMBEL: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """p^T @ d_out of a tile of the table, over all rows in their order."""
    program = tl.program_id(0)
    tiles = tl.cdiv(classes, CLASSES)
    tile = program % tiles
    col = tile * CLASSES + tl.arange(0, CLASSES)[None, :]
    d = (program // tiles) * WIDTH + tl.arange(0, WIDTH)[None, :]
    acc = tl.zeros([CLASSES, WIDTH], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        live = row < rows
        y = noisy_tile(
            logits, row, live, col, classes, logits_stride, positions, ids, seed_at, seed_low, seed_high, step_at,
            op_step, replica, GUMBEL, CLASSES,
        )  # fmt: skip
        peak = tl.load(largest + row, mask=live, other=0.0)
        p = probabilities(y, peak, tl.load(total + row, mask=live, other=1.0), inverse_tau)
        up = tl.load(d_out + row.to(tl.int64) * width + d, mask=live & (d < width), other=0.0)
        acc = product(tl.trans(tl.where(live, p, 0.0)), up, acc, PRECISION)
    v = tile * CLASSES + tl.arange(0, CLASSES)[:, None]
    to = d_table + v.to(tl.int64) * width + d
    tl.store(to, cast(acc, d_table.dtype.element_ty), mask=(v < classes) & (d < width))
