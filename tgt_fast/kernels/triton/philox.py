"""The random stream in Triton: the words of ``csrc/common/philox.h``, and normals from the same polynomials."""

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of blocks of uint32 that broadcast together."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        low0 = c0 * 0xD2511F53
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def key_of(row, live, ids, seed_at, seed_low, seed_high, step_at, op_step, replica):
    """(c1, c2, c3, k0, k1) of the rows' samples, [R, 1] and [1, 1] uint32.

    ``replica`` comes shifted to its place, ``op_step`` is op << 28 | step; what lives on the device replaces it.
    """
    one = tl.zeros([1, 1], tl.int32)
    if seed_at is not None:
        seed = tl.load(seed_at + one)
        k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
        k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    else:
        k0 = (one + seed_low).to(tl.uint32, bitcast=True)
        k1 = (one + seed_high).to(tl.uint32, bitcast=True)
    c3 = (one + op_step).to(tl.uint32, bitcast=True)
    if step_at is not None:
        c3 = c3 | (tl.load(step_at + one) & 0x0FFFFFFF).to(tl.uint32)
    sample = tl.load(ids + row, mask=live, other=0)
    c1 = (sample & 0xFFFFFFFF).to(tl.uint32)
    c2 = ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32) | (one + replica).to(tl.uint32, bitcast=True)
    return c1, c2, c3, k0, k1


@triton.jit
def uniform(word):
    """(word + 1/2) 2^-32, rounded once to float32."""
    high = (word >> 16).to(tl.int32).to(tl.float32)
    low = (word & 0xFFFF).to(tl.int32).to(tl.float32)
    return high * 1.52587890625e-5 + (low + 0.5) * 2.3283064365386963e-10


@triton.jit
def log_positive(x):
    """log(m 2^e) = e log 2 + log m of normal float32, m in [sqrt(1/2), sqrt(2)): exact enough where x is near 1."""
    offset = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (offset >> 23).to(tl.float32)
    return log_of_parts(((offset & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0, e)


@triton.jit
def log_of_parts(f, e):
    """log((1 + f) 2^e)"""
    g = f * f
    tail = f * 0.0 + 7.0376836292e-2
    tail = tl.fma(f, tail, -1.1514610310e-1)
    tail = tl.fma(f, tail, 1.1676998740e-1)
    tail = tl.fma(f, tail, -1.2420140846e-1)
    tail = tl.fma(f, tail, 1.4249322787e-1)
    tail = tl.fma(f, tail, -1.6668057665e-1)
    tail = tl.fma(f, tail, 2.0000714765e-1)
    tail = tl.fma(f, tail, -2.4999993993e-1)
    tail = tl.fma(f, tail, 3.3333331174e-1)
    small = tl.fma(g, -0.5, tl.fma(e, -2.12194440e-4, f * g * tail))
    return tl.fma(e, 0.693359375, f + small)


@triton.jit
def normal_pair(u, v):
    """Box-Muller: two independent standard normals from two words."""
    radius = tl.sqrt(log_positive(uniform(u)) * -2.0)
    # angle = 2 pi v / 2^32 = (quadrant + f) pi / 2 with |f| <= 1/2, exactly in integers
    quadrant = (v + 0x20000000) >> 30
    f = (v - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 9.31322574615478515625e-10
    g = f * f
    sine = tl.fma(g, g * 0.0 - 3.5988432352e-6, 1.60441184787e-4)
    sine = tl.fma(g, sine, -4.68175413531e-3)
    sine = tl.fma(g, sine, 7.96926262462e-2)
    sine = tl.fma(g, sine, -6.45964097506e-1)
    sine = f * tl.fma(g, sine, 1.57079632679)
    cosine = tl.fma(g, g * 0.0 + 4.71087477881e-7, -2.52020423731e-5)
    cosine = tl.fma(g, cosine, 9.19260274839e-4)
    cosine = tl.fma(g, cosine, -2.08634807634e-2)
    cosine = tl.fma(g, cosine, 2.53669507901e-1)
    cosine = tl.fma(g, cosine, -1.23370055014)
    cosine = tl.fma(g, cosine, 1.0)
    swap = (quadrant & 1) != 0
    first = radius * tl.where(swap, sine, cosine)
    second = radius * tl.where(swap, cosine, sine)
    first = tl.where((((quadrant + 1) >> 1) & 1) != 0, -first, first)  # negative in quadrants 1 and 2
    second = tl.where(((quadrant >> 1) & 1) != 0, -second, second)  # and in 2 and 3
    return first, second


@triton.jit
def normal_quantile(q):
    """The standard normal quantile of 1/2 + q in float64 (Wichura, algorithm AS 241, PPND16, 1988)."""
    r = 0.180625 - q * q
    above = ((r * 2.5090809287301226727e3 + 3.3430575583588128105e4) * r + 6.7265770927008700853e4) * r
    above = ((above + 4.5921953931549871457e4) * r + 1.3731693765509461125e4) * r
    above = ((above + 1.9715909503065514427e3) * r + 1.3314166789178437745e2) * r + 3.3871328727963666080
    below = ((r * 5.2264952788528545610e3 + 2.8729085735721942674e4) * r + 3.9307895800092710610e4) * r
    below = ((below + 2.1213794301586595867e4) * r + 5.3941960214247511077e3) * r
    below = ((below + 6.8718700749205790830e2) * r + 4.2313330701600911252e1) * r + 1.0
    central = q * above / below
    size = tl.where(q < 0, -q, q)
    r = tl.sqrt(-tl.log(0.5 - tl.where(size <= 0.425, 0.25, size))) - 1.6
    above = ((r * 7.74545014278341407640e-4 + 2.27238449892691845833e-2) * r + 2.41780725177450611770e-1) * r
    above = ((above + 1.27045825245236838258) * r + 3.64784832476320460504) * r
    above = ((above + 5.76949722146069140550) * r + 4.63033784615654529590) * r + 1.42343711074968357734
    below = ((r * 1.05075007164441684324e-9 + 5.47593808499534494600e-4) * r + 1.51986665636165571966e-2) * r
    below = ((below + 1.48103976427480074590e-1) * r + 6.89767334985100004550e-1) * r
    below = ((below + 1.67638483018380384940) * r + 2.05319162663775882187) * r + 1.0
    outer = above / below
    return tl.where(size <= 0.425, central, tl.where(q < 0, -outer, outer))


@triton.jit
def truncated_normal(word, bound, mass):
    """A normal truncated to [-bound, bound], by its quantile: one word a number. mass = erf(bound / sqrt 2)."""
    high = (word >> 16).to(tl.int32).to(tl.float64)
    low = (word & 0xFFFF).to(tl.int32).to(tl.float64)
    centred = (high * 65536.0 + low + 0.5) * 2.3283064365386963e-10 - 0.5
    value = normal_quantile(centred * mass)
    return tl.where(value < -bound, -bound, tl.where(value > bound, bound, value)).to(tl.float32)


@triton.jit
def draw(block, c1, c2, c3, k0, k1, bound, mass, TRUNCATED: tl.constexpr):
    """The four numbers of each block of the stream, [R, K] uint32, in order.  -> [R, 4 K] float32"""
    x0, x1, x2, x3 = philox4x32(block, c1, c2, c3, k0, k1)
    if TRUNCATED:
        n0 = truncated_normal(x0, bound, mass)
        n1 = truncated_normal(x1, bound, mass)
        n2 = truncated_normal(x2, bound, mass)
        n3 = truncated_normal(x3, bound, mass)
    else:
        n0, n1 = normal_pair(x0, x1)
        n2, n3 = normal_pair(x2, x3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def gumbel(word):
    """-log(-log(u)), u = (word + 1/2) 2^-32: the inner logarithm from 1 - u where u is above 1/2."""
    upper = (word >> 31) != 0
    y = uniform(tl.where(upper, word ^ 0xFFFFFFFF, word))
    x = tl.where(upper, 1.0 - y, y)
    offset = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = offset >> 23
    m = ((offset & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    exponential = -log_of_parts(tl.where(exponent == 0, -y, m - 1.0), exponent.to(tl.float32))
    return -log_positive(exponential)


@triton.jit
def draw_gumbels(block, c1, c2, c3, k0, k1):
    """The four Gumbel numbers of each block of the stream, [R, K] uint32, in order.  -> [R, 4 K] float32"""
    x0, x1, x2, x3 = philox4x32(block, c1, c2, c3, k0, k1)
    return tl.interleave(tl.interleave(gumbel(x0), gumbel(x2)), tl.interleave(gumbel(x1), gumbel(x3)))
