"""Rounding to E2M1 and to stored scales inside Triton kernels, exact at ties.

Two facts carry everything.  Adding 1.5 · 2²³ · step and taking it away again rounds to a multiple of `step`, ties to even, and
a fused multiply-add does so without an intermediate error.  And a quotient that is correctly rounded falls on a midpoint of the
grid exactly when the real quotient does: where x ≠ m·s, |x/s - m| exceeds half a unit in the last place of m, because s has at
most four significant bits.  Triton's `/` is one unit off at times and so flips codes of bfloat16 weights, which often sit on
midpoints.
"""

import triton
import triton.language as tl

# 1.5 · 2²³ · step of the lowest binade: E2M1 steps by 1/2 below 2, E4M3 by 2⁻⁹ below 2⁻⁵.
E2M1_SHIFT = tl.constexpr(1.5 * 2.0**22)
E4M3_SHIFT = tl.constexpr(1.5 * 2.0**20)
# One binade up from the smallest normal numbers of E2M1 and E4M3, so that float32's own subnormals line up with theirs.
E2M1_BIAS = tl.constexpr(2.0**-126)
E4M3_BIAS = tl.constexpr(2.0**-120)
E4M3_UNBIAS = tl.constexpr(2.0**120)
LARGEST = tl.constexpr(3.4028234663852886e38)
# 1.5 · 2²³: integers.
INT4_SHIFT = tl.constexpr(1.5 * 2.0**23)
# Codes of the smallest and the largest normal bfloat16.
FIRST_BF16, LAST_BF16 = tl.constexpr(0x80), tl.constexpr(0x7F7F)


@triton.jit
def round_to_binade(x, smallest, shift: tl.constexpr):
    """x rounded to a grid whose step is proportional to x's binade, and constant below `smallest`."""
    binade = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    binade = tl.maximum(binade, smallest)
    return tl.fma(binade, -shift, tl.fma(binade, shift, x))


@triton.jit
def round_e2m1(x):
    """Nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with the sign of x, ties to the even mantissa.  |x| < 7; zero comes out positive."""
    return round_to_binade(x, 1.0, E2M1_SHIFT)


@triton.jit
def quotient(x, s, inverse):
    """x / s correctly rounded (Markstein), given inverse = 1 / s correctly rounded.  Finite, no underflow."""
    q = x * inverse
    return tl.fma(tl.fma(q, -s, x), inverse, q)


@triton.jit
def quantize_e2m1(x, s, inverse):
    """round(x / s) as a float32 E2M1 value, saturating at 6."""
    return round_e2m1(quotient(tl.clamp(x, -6.0 * s, 6.0 * s), s, inverse))


@triton.jit
def round_int4(x, s, inverse):
    """round(x / s) as a float32 integer, saturating at -8 and 7.  inverse = 1 / s."""
    q = quotient(tl.minimum(tl.maximum(x, -8.0 * s), 7.0 * s), s, inverse)
    return (q + INT4_SHIFT) - INT4_SHIFT


@triton.jit
def encode_e2m1(q):
    """Code 0 … 15 (int32) of an E2M1 value: scaled so that E2M1's subnormal is float32's, the bits are the rank."""
    bits = (q * E2M1_BIAS).to(tl.int32, bitcast=True)
    return ((bits >> 22) & 7) | ((bits >> 28) & 8)


@triton.jit
def decode_scale(code, E4M3: tl.constexpr):
    """Scale (float32) of a stored code: E4M3 codes 1 … 126, else E8M0 codes 1 … 254."""
    if E4M3:
        return (code << 20).to(tl.float32, bitcast=True) * E4M3_UNBIAS
    return (code << 23).to(tl.float32, bitcast=True)


@triton.jit
def encode_scale(s, E4M3: tl.constexpr):
    """Stored code (int32) of a scale that is on the grid."""
    if E4M3:
        return (s * E4M3_BIAS).to(tl.int32, bitcast=True) >> 20
    return s.to(tl.int32, bitcast=True) >> 23


@triton.jit
def absmax_scale(amax, ABSMAX: tl.constexpr):
    """The scale a format gives a block of largest magnitude `amax` (finite).  ABSMAX: `nearest_e4m3`, `floor_exponent` or
    `round_exponent`, as in ptq.core.formats."""
    if ABSMAX == "nearest_e4m3":
        s = tl.clamp(tl.div_rn(amax, tl.full(amax.shape, 6.0, tl.float32)), 0.001953125, 448.0)
        return round_to_binade(s, 0.015625, E4M3_SHIFT)
    bits = tl.maximum(amax, 1.1754943508222875e-38).to(tl.int32, bitcast=True)
    if ABSMAX == "round_exponent":
        bits += 0x200000
    return (tl.clamp((bits >> 23).to(tl.float32) - 2.0, 1.0, 254.0).to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_above(amax, E4M3: tl.constexpr):
    """Code (int32) of the smallest scale s with amax ≤ 6 s; one past the last code where there is none."""
    if E4M3:
        s = absmax_scale(amax, "nearest_e4m3")
    else:
        s = absmax_scale(amax, "floor_exponent")
    return encode_scale(s, E4M3) + (6.0 * s < amax).to(tl.int32)


@triton.jit
def in_units(w, tensor_scale, inverse, E4M3: tl.constexpr):
    """w / tensor_scale, finite: NaN becomes 0, and what is beyond every scale's reach saturates there.

    inverse = 1 / tensor_scale.  With E4M3 scales the limit is 2²² (6 · 448 is the largest value): far enough to change no
    choice, near enough for squares to be finite.
    """
    limit = 4194304.0 * tensor_scale if E4M3 else LARGEST * tl.minimum(tensor_scale, 1.0)
    return quotient(tl.where(w == w, tl.clamp(w, -limit, limit), 0.0), tensor_scale, inverse)


@triton.jit
def absmax_bf16(amax):
    """The bits (int32) of the absmax scale of INT4, amax / 7.5 to the nearest bfloat16, as ptq.core.formats.nearest_bf16."""
    bits = tl.div_rn(amax, tl.full(amax.shape, 7.5, tl.float32)).to(tl.int32, bitcast=True)
    return tl.maximum((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, FIRST_BF16)


@triton.jit
def decode_bf16(code):
    """The positive normal bfloat16 of bits `code` (int32) as float32, the nearest one where there is none."""
    return (tl.minimum(tl.maximum(code, FIRST_BF16), LAST_BF16) << 16).to(tl.float32, bitcast=True)
