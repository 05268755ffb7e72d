"""E2M1 codes of bfloat16 weights, two at a time: Hopper's packed instructions, by inline assembly.

Beside the portable code of ptq.kernels.quantize and equal to it.  The product t·S of a rounding threshold t of E2M1 (.25, .75,
1.25, 1.75, 2.5, 3.5 or 5: three significant bits) and S = scale · tensor_scale (four, if tensor_scale is a power of two) has at
most seven significant bits.  So it is a bfloat16, and a weight's code follows from comparisons that are exact, without division:
a binary search that compares with 1.75, then with .75 or 3.5 (a tie goes up), then with .25, 1.25, 2.5 or 5 (a tie goes down).
A comparison gives 1.0 or 0.0, from which multiply-adds form the next threshold (intermediate values have at most eight
significant bits) and at last 128 + code, whose low bits are the code.  A NaN fails every comparison: code 0.
"""

import triton
import triton.language as tl

from ptq.kernels.rounding import E4M3_SHIFT, LARGEST, absmax_scale, quotient, round_to_binade

# Powers of two in this range keep every threshold a normal bfloat16.
LEAST_TENSOR_SCALE = tl.constexpr(2.0**-100)
GREATEST_TENSOR_SCALE = tl.constexpr(2.0**100)


@triton.jit
def is_exact(tensor_scale):
    """Whether `encode_pairs` may be used: a power of two, not extreme."""
    power = (tensor_scale.to(tl.int32, bitcast=True) & 0x7FFFFF) == 0
    return power & (tensor_scale >= LEAST_TENSOR_SCALE) & (tensor_scale <= GREATEST_TENSOR_SCALE)


@triton.jit
def larger_pair(a, b):
    return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def largest_magnitude(x):
    """Float32 (b,) of pairs x (b, k/2); NaN counts as 0."""
    pair = tl.reduce(x & 0x7FFF7FFF, 1, larger_pair)
    even, odd = (pair << 16).to(tl.float32, bitcast=True), (pair & 0x7FFF0000).to(tl.float32, bitcast=True)
    return tl.maximum(tl.maximum(even, odd), 0.0)


@triton.jit
def block_scale(amax, tensor_scale, ABSMAX: tl.constexpr):
    """Scales (float32) of blocks of largest magnitude amax, tensor_scale being a power of two."""
    if ABSMAX == "nearest_e4m3":
        inverse = (0x7F000000 - tensor_scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True) * (1.0 / 6.0)
        # Infinity becomes NaN here, and then the largest scale.
        s = tl.minimum(quotient(amax, 6.0 * tensor_scale, inverse), 448.0)
        return round_to_binade(tl.maximum(s, 0.001953125), 0.015625, E4M3_SHIFT)
    return absmax_scale(tl.minimum(amax, LARGEST), ABSMAX)


@triton.jit
def twice(s):
    """The bfloat16 pair (s, s) of float32 s."""
    return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,r", [s], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def times(s, factor: tl.constexpr):
    """The bfloat16 pairs s, times a factor given as the bits of a pair."""
    factors = tl.full(s.shape, factor, tl.int32)
    return tl.inline_asm_elementwise("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [s, factors], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def encode_pairs(x, s):
    """Two codes a byte (low bits of int32, the even column in the low nibble) of bfloat16 pairs x (b, k/2) under s (b, 1)."""
    first, second, rise = times(s, 0x3FE03FE0), times(s, 0x3F403F40), times(s, 0x40304030)  # 1.75; .75, + 2.75
    third, upper, steep = times(s, 0x3E803E80), times(s, 0x40104010), times(s, 0x3FC03FC0)  # .25 + 1; 2.25 + 1.5 above
    codes = tl.inline_asm_elementwise(
        """
        {
        .reg .b32 size, at, low, high, code, is4, is2, is1, negative, weight;
        abs.bf16x2 size, $1;
        set.ge.bf16x2.bf16x2 is4, size, $3;
        fma.rn.bf16x2 at, is4, $5, $4;
        set.ge.bf16x2.bf16x2 is2, size, at;
        fma.rn.bf16x2 low, is2, $2, $6;
        fma.rn.bf16x2 high, is2, $8, $7;
        fma.rn.bf16x2 at, is4, high, low;
        set.gt.bf16x2.bf16x2 is1, size, at;
        neg.bf16x2 at, $6;
        set.lt.bf16x2.bf16x2 negative, $1, at;
        mov.b32 code, 0x43004300;
        mov.b32 weight, 0x41004100;
        fma.rn.bf16x2 code, negative, weight, code;
        mov.b32 weight, 0x40804080;
        fma.rn.bf16x2 code, is4, weight, code;
        mov.b32 weight, 0x40004000;
        fma.rn.bf16x2 code, is2, weight, code;
        add.rn.bf16x2 $0, code, is1;
        }
        """,
        "=r,r,r,r,r,r,r,r,r",
        [x, s, first, second, rise, third, upper, steep],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    return (codes & 15) | ((codes >> 12) & 0xF0)
