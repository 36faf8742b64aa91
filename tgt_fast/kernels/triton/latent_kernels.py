"""The latent kernels in Triton: seeded noise, a step up a gradient, and projections.

A sample that fits a tile takes one launch. A larger one is cut into tiles, and what its coordinates need to know of
each other is measured first: a launch leaves a number a tile, which the next one adds up in a fixed order. Noise is
drawn again in each: it is a function of its place.
"""

import triton
import triton.language as tl

from tgt_fast.kernels.triton.numbers import INFINITY, as_real, cast, real
from tgt_fast.kernels.triton.philox import draw, key_of


@triton.jit
def load_rows(base, row, col, inside, size, IS_FP64: tl.constexpr):
    """[R, B] numbers of contiguous samples, 0 where there is none."""
    return as_real(tl.load(base + row.to(tl.int64) * size + col, mask=inside, other=0.0), IS_FP64)


@triton.jit
def ones(ROWS: tl.constexpr, BLOCK: tl.constexpr, IS_FP64: tl.constexpr):
    return as_real(tl.full([ROWS, BLOCK], 1.0, tl.float32), IS_FP64)


@triton.jit
def a_sample(values, number, number_low, row, live, IS_FP64: tl.constexpr):
    """A factor that is one a sample, or one for all.  -> [R, 1] or [1, 1]"""
    if values is not None:
        return tl.load(values + row, mask=live, other=0.0)
    else:
        return real(number, number_low, IS_FP64)


@triton.jit
def sum_of_squares(v, w, live, IS_FP64: tl.constexpr):
    """sum (v w)^2 of each row in float64; again with care where that left the range of float32.  -> [R, 1]"""
    u = v * w
    total = tl.sum(u * u, 1, keep_dims=True).to(tl.float64)
    if not IS_FP64:
        usual = ((total > 1e-20) & (total < 1e30)) | ~live
        if tl.min(tl.min(usual.to(tl.int32), 1), 0) == 0:
            product = v.to(tl.float64) * w.to(tl.float64)
            total = tl.where(usual, total, tl.sum(product * product, 1, keep_dims=True))
    return total


@triton.jit
def power_near(x, IS_FP64: tl.constexpr):
    """A power of 2 near x, within the range of the arithmetic: a factor that rounds nothing. x: float64 above 0"""
    most = 1e300 if IS_FP64 else 1e37
    bits = tl.minimum(tl.maximum(x, 1 / most), most).to(tl.int64, bitcast=True)
    return (bits & 0x7FF0000000000000).to(tl.float64, bitcast=True)


@triton.jit
def gathered(partial, row, live, samples, tiles, LARGEST: tl.constexpr):
    """The sum, or the largest, of what the tiles of each row left.  -> [R, 1]"""
    at = partial + row
    total = tl.zeros([1, 256], tl.float64)
    for start in range(0, tiles, 256):
        tile = start + tl.arange(0, 256)[None, :]
        here = tl.load(at + tile.to(tl.int64) * samples, mask=live & (tile < tiles), other=0.0)
        if LARGEST:
            total = tl.maximum(total, here)
        else:
            total = total + here
    if LARGEST:
        return tl.max(total, 1, keep_dims=True)
    else:
        return tl.sum(total, 1, keep_dims=True)


@triton.jit(do_not_specialize=["samples", "tiles", "seed_low", "seed_high", "op_step", "replica"])
def latent_perturb_kernel(
    z, out, sigma_at, scale, before, after,  # before, after: [tiles, samples], squares of z and of the result
    samples, size, tiles, sigma_, sigma_low, radius_, radius_low, bound_, bound_low, mass_, mass_low,
    ids, seed_at, seed_low, seed_high, step_at, op_step, replica,
    PHASE: tl.constexpr,  # "whole", "measure" or "write"
    SPHERE: tl.constexpr,  # "none", "radius" or "keep"
    TRUNCATED: tl.constexpr, IS_FP64: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z + sigma * scale * noise, then onto the sphere."""
    program = tl.program_id(0)
    tile = program % tiles
    row = (program // tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = row < samples
    inside = live & (col < size)
    c1, c2, c3, k0, k1 = key_of(row, live, ids, seed_at, seed_low, seed_high, step_at, op_step, replica)
    block = tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    block = (block + tl.zeros([ROWS, 1], tl.int32)).to(tl.uint32)
    bound = real(bound_, bound_low, True)
    noise = as_real(draw(block, c1, c2, c3, k0, k1, bound, real(mass_, mass_low, True), TRUNCATED), IS_FP64)
    factor = a_sample(sigma_at, sigma_, sigma_low, row, live, IS_FP64)
    start = load_rows(z, row, col, inside, size, IS_FP64)
    if scale is not None:
        moved = start + factor * tl.load(scale + col, mask=col < size, other=0.0) * noise
    else:
        moved = start + factor * noise
    if SPHERE != "none":
        if PHASE == "write":
            squares = gathered(after, row, live, samples, tiles, False)
        else:
            moved = tl.where(inside, moved, 0.0)
            squares = sum_of_squares(moved, ones(ROWS, BLOCK, IS_FP64), live, IS_FP64)
        norm = squares * 0.0 + real(radius_, radius_low, True)
        if SPHERE == "keep":
            if PHASE == "write":
                norm = tl.sqrt(gathered(before, row, live, samples, tiles, False))
            else:
                squares_before = sum_of_squares(start, ones(ROWS, BLOCK, IS_FP64), live, IS_FP64)
                norm = tl.sqrt(squares_before)
                if PHASE == "measure":
                    tl.store(before + tile.to(tl.int64) * samples + row, squares_before, mask=live)
        if PHASE == "measure":
            tl.store(after + tile.to(tl.int64) * samples + row, squares, mask=live)
        else:
            length = tl.sqrt(tl.where(squares > 0, squares, 1.0))
            lift = power_near(1.0 / length, IS_FP64)
            stretch = tl.where(squares > 0, norm / (length * lift), 1.0)
            moved = moved * as_real(tl.where(squares > 0, lift, 1.0), IS_FP64) * as_real(stretch, IS_FP64)
    if PHASE != "measure":
        tl.store(out + row.to(tl.int64) * size + col, cast(moved, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["samples", "tiles", "seed_low", "seed_high", "op_step", "replica"])
def latent_ascend_kernel(
    z, grad, anchor, scale, out, squares, distances,  # squares, distances: [tiles, samples]
    samples, size, tiles, step_at_, step_, step_low, sigma_at, sigma_, sigma_low, radius_at, radius_, radius_low,
    ids, seed_at, seed_low, seed_high, step_at, op_step, replica,
    PHASE: tl.constexpr,  # "whole", "norm", "distance" or "write"
    NORM: tl.constexpr, RADIUS_NORM: tl.constexpr, NOISE: tl.constexpr,
    IS_FP64: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z + scale * (step * direction(scale * grad) + sigma * noise), then into the ball round the anchor."""
    program = tl.program_id(0)
    tile = program % tiles
    row = (program // tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = row < samples
    inside = live & (col < size)
    slope = load_rows(grad, row, col, inside, size, IS_FP64)
    unit = ones(ROWS, BLOCK, IS_FP64)
    if scale is not None:
        unit = unit * tl.load(scale + col, mask=col < size, other=1.0)
    if PHASE == "norm":
        total = sum_of_squares(slope, unit, live, IS_FP64)
        tl.store(squares + tile.to(tl.int64) * samples + row, total, mask=live)
    else:
        if PHASE == "whole":
            norm = tl.sqrt(sum_of_squares(slope, unit, live, IS_FP64))
        else:
            norm = tl.sqrt(gathered(squares, row, live, samples, tiles, False))
        moves = (norm > 0) & (norm < INFINITY)
        length = a_sample(step_at_, step_, step_low, row, live, IS_FP64)
        if NORM == "linf":
            step = tl.where(slope > 0, length, tl.where(slope < 0, -length, 0.0))
            step = tl.where(unit == 0, 0.0, step)
        elif NORM == "l2":
            # A power of 2, which rounds nothing: where the norm is near the ends of float32's range, the reciprocal
            # of the norm would leave it.
            lift = tl.where(norm < 1e-30, 18446744073709551616.0, tl.where(norm > 1e30, 5.421010862427522e-20, 1.0))
            length = length.to(tl.float64) / (tl.where(moves, norm, 1.0) * lift)
            step = slope * as_real(lift, IS_FP64) * unit * as_real(length, IS_FP64)
        else:
            step = slope * unit * length
        step = tl.where(moves, step, 0.0)
        if NOISE:
            c1, c2, c3, k0, k1 = key_of(row, live, ids, seed_at, seed_low, seed_high, step_at, op_step, replica)
            block = tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
            block = (block + tl.zeros([ROWS, 1], tl.int32)).to(tl.uint32)
            noise = as_real(draw(block, c1, c2, c3, k0, k1, 0.0, 0.0, False), IS_FP64)
            step += a_sample(sigma_at, sigma_, sigma_low, row, live, IS_FP64) * noise
        moved = load_rows(z, row, col, inside, size, IS_FP64) + unit * step
        if anchor is not None:
            centre = load_rows(anchor, row, col, inside, size, IS_FP64)
            away = moved - centre
            if PHASE == "write":
                distance = gathered(distances, row, live, samples, tiles, RADIUS_NORM == "linf")
            else:
                offset = tl.where(inside & (unit > 0), away / tl.where(unit > 0, unit, 1.0), 0.0)
                if RADIUS_NORM == "linf":  # a coordinate that is NaN is its own affair
                    offset = tl.where(offset == offset, offset, 0.0)
                    distance = tl.max(tl.abs(offset), 1, keep_dims=True).to(tl.float64)
                else:
                    distance = sum_of_squares(offset, ones(ROWS, BLOCK, IS_FP64), live, IS_FP64)
            if PHASE == "distance":
                tl.store(distances + tile.to(tl.int64) * samples + row, distance, mask=live)
            if RADIUS_NORM == "l2":
                distance = tl.sqrt(distance)
            radius = a_sample(radius_at, radius_, radius_low, row, live, IS_FP64)
            outside = distance > radius.to(tl.float64)
            if RADIUS_NORM == "l2":
                shrink = radius.to(tl.float64) / tl.where(outside, distance, 1.0)
                moved = tl.where(outside, centre + away * as_real(shrink, IS_FP64), moved)
            else:  # inside, bit for bit: no trip to the anchor and back
                limit = radius * unit
                clamped = tl.where(away > limit, centre + limit, tl.where(away < -limit, centre - limit, moved))
                moved = tl.where(outside, clamped, moved)
            moved = tl.where(unit > 0, moved, centre)  # a coordinate without a unit has no room to move in
        if PHASE != "distance":
            tl.store(out + row.to(tl.int64) * size + col, cast(moved, out.dtype.element_ty), mask=inside)
