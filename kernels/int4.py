"""GPTQ of INT4 on the GPU: one block of 32 to 256 columns in one launch, its bfloat16 scale chosen in the loop.

The reference is ptq.methods.gptq.sweep_panel with a panel of one block.  A block this wide does not fit the registers of a thread,
so a program (one warp) owns one row, and its tile is candidate scales × columns: the recursion walks the columns, and at each the
warp sums that column out of the tile, rounds it for every candidate, and takes its error from the columns after it.  The smallest
loss wins, the smaller scale on a tie, and the recursion runs once more for the winner.

Scales are tried in chunks upwards from the absmax one, then downwards, to where the bounds of ptq.core.scales say that no other can
beat the best loss so far.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.core.formats import BF16, INT4, Format
from ptq.core.scales import inverse_diagonal, or_identity, schur_complements
from ptq.kernels.rounding import quotient
from ptq.kernels.search import MARGIN

# Elements of a tile: 32 registers of a warp.
TILE = 1024
# 1.5 · 2²³: adding and taking it away rounds to an integer, ties to even.
SHIFT = tl.constexpr(1.5 * 2.0**23)
# Codes of the smallest and the largest normal bfloat16.
FIRST, LAST = tl.constexpr(0x80), tl.constexpr(0x7F7F)


@triton.jit
def round_int4(x, s, inverse):
    """round(x / s) as a float32 integer, saturating at -8 and 7.  inverse = 1 / s."""
    q = quotient(tl.minimum(tl.maximum(x, -8.0 * s), 7.0 * s), s, inverse)
    return (q + SHIFT) - SHIFT


@triton.jit
def nearest_code(x):
    """The bits (int32) of positive x rounded to bfloat16, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def absmax_code(amax):
    """The code of the absmax scale, as ptq.core.formats.nearest_bf16."""
    return tl.maximum(nearest_code(tl.div_rn(amax, 7.5)), FIRST)


@triton.jit
def decode(code):
    """The bfloat16 number of bits `code` (int32), as float32."""
    return (code << 16).to(tl.float32, bitcast=True)


@triton.jit
def column(tile, k, c):
    """Column c of a tile (lines, K); k (1, K) counts the columns.  The sum has one term."""
    return tl.sum(tl.where(k == c, tile, 0.0), axis=1)[:, None]


@triton.jit
def round_with_feedback(x, s, inverse, k, v_ptr, d_ptr, K: tl.constexpr, RECORD: tl.constexpr):
    """(loss, largest |code value|, q, E) of GPTQ inside a block, for scales s (lines, 1); without RECORD q and E stay 0.

    v_ptr: U with each row divided by its diagonal element, of which d_ptr holds the inverse.
    """
    left = x + tl.zeros([s.shape[0], K], tl.float32)
    loss = tl.zeros(s.shape, tl.float32)
    largest = tl.zeros(s.shape, tl.float32)
    q = tl.zeros(left.shape, tl.float32)
    E = tl.zeros(left.shape, tl.float32)
    for c in range(K):
        value = column(left, k, c)
        rounded = round_int4(value, s, inverse)
        error = tl.fma(-rounded, s, value)
        left -= error * tl.load(v_ptr + c * K + k)
        scaled = error * tl.load(d_ptr + c)
        loss += scaled * scaled
        largest = tl.maximum(largest, tl.abs(rounded))
        if RECORD:
            q = tl.where(k == c, rounded, q)
            E = tl.where(k == c, scaled, E)
    return loss, largest, q, E


@triton.jit
def candidate_loss(x, s, k, v_ptr, d_ptr, m_ptr, K: tl.constexpr, RULE: tl.constexpr):
    """(loss, largest |code value|), both (lines, 1), of scales s (lines, 1)."""
    inverse = tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)
    if RULE == "joint":
        loss, largest, _, _ = round_with_feedback(x, s, inverse, k, v_ptr, d_ptr, K, RECORD=False)
    else:
        q = round_int4(x, s, inverse)
        r = x - q * s
        largest = tl.max(tl.abs(q), axis=1)[:, None]
        z = r
        if RULE == "quadratic":
            z = tl.zeros(r.shape, tl.float32)
            for c in range(K):
                z += column(r, k, c) * tl.load(m_ptr + c * K + k)
        loss = tl.sum(z * r, axis=1)[:, None]
    return loss, largest


@triton.jit
def choose_code(
    x, k, v_ptr, d_ptr, m_ptr, c_ptr, K: tl.constexpr, LINES: tl.constexpr, STRIDE: tl.constexpr, RULE: tl.constexpr
):
    """The code (0-d) of smallest loss for the one row x (1, K)."""
    magnitudes = tl.abs(x)
    amax = tl.max(tl.max(magnitudes, axis=1), axis=0)
    start = absmax_code(amax)
    lane = tl.arange(0, LINES)[:, None] * STRIDE
    best = tl.full([LINES, 1], float("inf"), tl.float32)
    best_code = start + tl.zeros([LINES, 1], tl.int32)
    c = tl.load(c_ptr + k)
    lowest = amax * 0.0
    code = start + lane
    step = LINES * STRIDE
    while step != 0:
        s = decode(tl.minimum(tl.maximum(code, FIRST), LAST))
        loss, largest = candidate_loss(x, s, k, v_ptr, d_ptr, m_ptr, K, RULE)
        valid = (code >= FIRST) & (code <= LAST)
        better = valid & ((loss < best) | ((loss == best) & (code < best_code)))
        best = tl.where(better, loss, best)
        best_code = tl.where(better, code, best_code)
        code += step
        if step > 0:
            room = tl.sqrt(tl.min(tl.min(best, axis=1), axis=0)) * c
            telling = tl.where(magnitudes * MARGIN > room, magnitudes, float("inf"))
            last = (code - step >= LAST) | ((largest == 0) & valid) | (0.5 * s >= tl.min(tl.min(telling, axis=1), axis=0))
            if RULE == "mse":
                last = last | ((3.5 * s >= amax) & (code - step >= FIRST + 128))
            if tl.max(tl.max(last.to(tl.int32), axis=1), axis=0) == 1:
                lowest = tl.max(tl.max(magnitudes - room, axis=1), axis=0) * (MARGIN / 8.0)
                code = start - LINES * STRIDE + lane
                step = -LINES * STRIDE
        if step < 0:
            possible = (code >= FIRST) & (decode(tl.maximum(code, FIRST)) >= lowest)
            step = tl.where(tl.max(tl.max(possible.to(tl.int32), axis=1), axis=0) == 1, step, 0)
    smallest = tl.min(tl.min(best, axis=1), axis=0)
    return tl.min(tl.min(tl.where(best == smallest, best_code, LAST), axis=1), axis=0)


@triton.jit
def block_kernel(
    x_ptr, v_ptr, d_ptr, m_ptr, c_ptr, q_ptr, scales_ptr, e_ptr, loss_ptr,
    x_stride, q_stride, scales_stride, e_stride, v_matrix, d_matrix, m_matrix, c_matrix,
    K: tl.constexpr, LINES: tl.constexpr, STRIDE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """One row of a block: q, its scale and E are written, loss is added to.

    Of a batch of matrices, one below the other; …_matrix is how far what belongs to one is from that of the next.
    """
    matrix = tl.program_id(1).to(tl.int64)
    v_ptr += matrix * v_matrix
    d_ptr += matrix * d_matrix
    m_ptr += matrix * m_matrix
    c_ptr += matrix * c_matrix
    row = matrix * tl.num_programs(0) + tl.program_id(0)
    k = tl.arange(0, K)[None, :]
    x = tl.load(x_ptr + row * x_stride + k)
    if RULE == "absmax":
        code = absmax_code(tl.max(tl.max(tl.abs(x), axis=1), axis=0))
    else:
        code = choose_code(x, k, v_ptr, d_ptr, m_ptr, c_ptr, K, LINES, STRIDE, RULE)
    s = decode(code + tl.zeros([LINES, 1], tl.int32))
    inverse = tl.div_rn(tl.full([LINES, 1], 1.0, tl.float32), s)
    loss, _, q, E = round_with_feedback(x, s, inverse, k, v_ptr, d_ptr, K, RECORD=True)
    first = (tl.arange(0, LINES)[:, None] == 0) & (k >= 0)
    tl.store(q_ptr + row * q_stride + k + tl.zeros([LINES, K], tl.int32), q, mask=first)
    tl.store(e_ptr + row * e_stride + k + tl.zeros([LINES, K], tl.int32), E, mask=first)
    tl.store(scales_ptr + row * scales_stride, tl.max(tl.max(s, axis=1), axis=0))
    total = tl.load(loss_ptr + row) + tl.max(tl.max(loss, axis=1), axis=0).to(tl.float64)
    tl.store(loss_ptr + row, total)


def block_factors(H_blocks: Tensor, U_blocks: Tensor, rule: str) -> tuple[Tensor, ...]:
    """(V, d, M, c) of each block for the kernel, all float32: V (b, k, k) = U with the rows divided by their diagonal elements,
    d (b, k) = 1 / U_ii, M (b, k, k) of the rule's rᵀ M r (`local`, `schur`), c (b, k) = √(M⁻¹)_ii."""
    diagonal = U_blocks.diagonal(dim1=-2, dim2=-1)
    M = U_blocks
    if rule == "local":
        M = or_identity(H_blocks)
    if rule == "schur":
        M = schur_complements(U_blocks)
    c = torch.ones_like(diagonal)
    if rule in ("schur", "joint"):
        c = U_blocks.square().sum(-2).sqrt()
    if rule == "local":
        c = inverse_diagonal(M)[:, 0].sqrt().clamp(max=1e18)
    return tuple(t.contiguous() for t in (U_blocks / diagonal[..., None], 1 / diagonal, M, c))


def launch_block(
    x: Tensor, factors: Sequence[Tensor], q: Tensor, scales: Tensor, E: Tensor, loss: Tensor, format: Format, rule: str
) -> None:
    """One block: q (e, r, k), scales (e, r, 1) and E (e, r, k) of x (e, r, k) are written, loss (e, r) float64 is added to.

    All float32 but loss; rows may be strided, alike between matrices, columns must be adjacent.  `factors`: as `block_factors`
    gives, (e, 1, …) of this block.
    """
    assert format.elements is INT4 and format.grid is BF16 and all(t.stride(-1) == 1 for t in (x, q, E))
    assert all(t.stride(0) == t.shape[1] * t.stride(1) for t in (x, q, scales, E))
    kernel_rule = "quadratic" if rule in ("local", "schur") else rule
    block_kernel[(x.shape[1], x.shape[0])](
        x, *factors, q, scales, E, loss, *(t.stride(1) for t in (x, q, scales, E)), *(t.stride(0) for t in factors),
        K=format.block, LINES=TILE // format.block, STRIDE=format.grid.stride, RULE=kernel_rule, num_warps=1,
    )  # fmt: skip
