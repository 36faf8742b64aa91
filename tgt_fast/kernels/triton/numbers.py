"""Numbers in Triton: from the host to a kernel, between types, and to memory."""

import triton
import triton.language as tl

# Its conversion to bfloat16 cuts bits off, where a GPU rounds.
INTERPRETED = tl.constexpr("Interpreted" in type(tl.sum).__name__)
INFINITY = tl.constexpr(float("inf"))
# NaN is written inside the kernels: Triton compares globals at every launch, and NaN never equals itself.


@triton.jit
def real(high, low, IS_FP64: tl.constexpr):
    """A number of the host, which comes as the float32 nearest to it and what that lacks.  -> [1, 1]"""
    if IS_FP64:
        return (tl.zeros([1, 1], tl.float64) + high) + low
    else:
        return tl.zeros([1, 1], tl.float32) + high


@triton.jit
def as_real(x, IS_FP64: tl.constexpr):
    """x in the type of the arithmetic."""
    if IS_FP64:
        return x.to(tl.float64)
    else:
        return x.to(tl.float32)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in the type of an output, rounded to nearest."""
    if dtype == tl.bfloat16:
        x = x.to(tl.float32)
        if INTERPRETED:
            bits = x.to(tl.uint32, bitcast=True)
            bits = bits + (0x7FFF + ((bits >> 16) & 1))
            x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)
