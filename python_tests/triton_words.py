"""A kernel that hands out the words of the random stream, for test_triton.py. Importing it imports Triton."""

# mypy: ignore-errors
import triton
import triton.language as tl

from tgt_fast.kernels.triton.philox import gumbel, philox4x32


@triton.jit
def words_kernel(counters, keys, out):
    """counters: [4, 64], keys: [2, 64], out: [4, 64], all int64 words."""
    lane = tl.arange(0, 64)[None, :]
    c = counters + lane
    k = keys + lane
    c0 = tl.load(c).to(tl.uint32)
    c1 = tl.load(c + 64).to(tl.uint32)
    c2 = tl.load(c + 128).to(tl.uint32)
    c3 = tl.load(c + 192).to(tl.uint32)
    x0, x1, x2, x3 = philox4x32(c0, c1, c2, c3, tl.load(k).to(tl.uint32), tl.load(k + 64).to(tl.uint32))
    tl.store(out + lane, x0.to(tl.int64))
    tl.store(out + 64 + lane, x1.to(tl.int64))
    tl.store(out + 128 + lane, x2.to(tl.int64))
    tl.store(out + 192 + lane, x3.to(tl.int64))


@triton.jit
def gumbel_kernel(words, out):
    """words: [4096] int64, out: [4096] float32."""
    at = tl.arange(0, 4096)[None, :]
    tl.store(out + at, gumbel(tl.load(words + at).to(tl.uint32)))
