"""Exact search of block scales on the GPU: rules `mse` and `local` (and any other rᵀ M r).

One thread owns a block: its 16 weights, their residuals and the factor of M stay in registers, so a candidate costs no memory
access and no exchange between threads.  A program is a tile of rows of one column block, which share M.  Scales are tried from
the smallest that clips nothing upwards, then downwards; a program stops when every row of its tile can.

What may be skipped, beside the three bounds of ptq.core.scales (`amax`: the block's largest magnitude):

- Clipping, as there: below (|x_i| - √(L (M⁻¹)_ii)) / 6 nothing can beat a known loss L.
- Dominance.  Let D be diagonal with M ⪰ D ⪰ 0, and B(s) = Σ D_i r_i(s)² ≤ rᵀ M r.  For amax ≤ 6 s every value of the grid of
  2s within reach of x is one of the grid of s, so |r_i(s)| ≤ |r_i(2s)|, and B(s) ≤ B(2s) ≤ B(4s) …  Once eight consecutive
  scales, one octave of E4M3 (for E8M0: one scale), all have B(s) ≥ L, every larger scale has too, and L is not beaten.
  D_i = 0.99 λ M_ii, where λ is a lower bound of the smallest eigenvalue of M scaled to a unit diagonal, C: the largest of C⁻¹
  is at most ‖C⁻⁴‖_F^¼.  Below code 8 an E4M3 scale need not have its half on the grid: there nothing is skipped.

M enters as G upper triangular with M = G Gᵀ, rounded from float64: ‖r G‖² keeps its relative accuracy where M is nearly
singular and r M rᵀ would not.  Found scales are those of the exhaustive search with losses compared in float32: a scale whose
loss is within float32 rounding of the smallest may be found instead, an exact tie goes to the smaller scale.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.core.formats import E4M3, Format
from ptq.kernels.quantize import check
from ptq.kernels.rounding import decode_scale, in_units, quotient, round_e2m1, scale_above

ROWS_PER_PROGRAM = 32
# Bounds computed in float32 keep this distance, so that rounding cannot exclude a winner.
MARGIN = tl.constexpr(0.999)


@triton.jit
def prepare_kernel(m_ptr, g_ptr, d_ptr, c_ptr, K: tl.constexpr, TRIANGLE: tl.constexpr):
    """One block of M: its factor G, packed by columns; D; and c_i = √(M⁻¹)_ii.  All of it in float64 but λ."""
    block = tl.program_id(0)
    i, j, k1 = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :], tl.arange(0, K)
    A = tl.load(m_ptr + block * K * K + i * K + j).to(tl.float64)
    diagonal = tl.sum(tl.where(i == j, A, 0.0), axis=0)
    unseen = tl.where(tl.max(diagonal, axis=0) == 0, 1.0, 0.0)
    A += tl.where(i == j, unseen, 0.0)
    diagonal += unseen
    G = tl.zeros([K, K], tl.float64)
    Y = tl.zeros([K, K], tl.float64)
    R = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    singular = 0
    for step in range(K):
        k = K - 1 - step
        column = tl.sum(tl.where(j == k, A, 0.0), axis=1)
        pivot = tl.sum(tl.where(k1 == k, column, 0.0), axis=0)
        sound = pivot > 1e-10 * tl.sum(tl.where(k1 == k, diagonal, 0.0), axis=0)
        singular = tl.where(sound, singular, 1)
        inverse = tl.where(sound, 1.0 / tl.sqrt(tl.where(sound, pivot, 1.0)), 0.0)
        g = tl.where(k1 <= k, column * inverse, 0.0)
        row = tl.sum(tl.where(i == k, R, 0.0), axis=0) * inverse
        A -= g[:, None] * g[None, :]
        R -= tl.where(k1 < k, g, 0.0)[:, None] * row[None, :]
        G = tl.where(j == k, g[:, None], G)
        Y = tl.where(i == k, row[None, :], Y)
    inverse_diagonal = tl.sum(Y * Y, axis=0)
    Y *= tl.sqrt(diagonal)[None, :]
    trace = tl.sum(tl.sum(Y * Y, axis=0), axis=0)
    Z = (Y / tl.sqrt(tl.where(singular == 1, 1.0, trace))).to(tl.float32)
    Z = tl.dot(tl.trans(Z), Z, input_precision="ieee")
    Z = tl.dot(Z, Z, input_precision="ieee")
    Z = tl.dot(Z, Z, input_precision="ieee")
    largest = trace * tl.sqrt(tl.sqrt(tl.sqrt(tl.sum(tl.sum(Z * Z, axis=0), axis=0)))).to(tl.float64)
    smallest = tl.where(singular == 1, 0.0, 0.99 / largest)
    tl.store(g_ptr + block * TRIANGLE + j * (j + 1) // 2 + i, G.to(tl.float32), mask=i <= j)
    tl.store(d_ptr + block * K + k1, (smallest * diagonal).to(tl.float32))
    tl.store(c_ptr + block * K + k1, tl.where(singular == 1, 1e18, tl.sqrt(inverse_diagonal)).to(tl.float32))


def prepare(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(G, D, c) of symmetric positive semidefinite blocks M (b, k, k) float32 or float64, for the search.

    G (b, k(k+1)/2): the upper factor, M = G Gᵀ, packed by columns.  D (b, k): M ⪰ diag(D).  c (b, k) = √(M⁻¹)_ii.
    A block with a zero diagonal is judged by r · r.  A pivot below 1e-10 of its diagonal is taken for 0; then nothing is
    known below or above: D = 0 and c is huge.
    """
    blocks, k, _ = M.shape
    triangle = k * (k + 1) // 2
    G = M.new_empty((blocks, triangle), dtype=torch.float32)
    D, c = (M.new_empty((blocks, k), dtype=torch.float32) for _ in range(2))
    prepare_kernel[(blocks,)](M.contiguous(), G, D, c, K=k, TRIANGLE=triangle, num_warps=1 if k == 16 else 4)
    return G, D, c


@triton.jit
def load_all(pointer, N: tl.constexpr):
    """N consecutive scalars as a tuple, to be kept in registers."""
    values = ()
    for n in tl.static_range(N):
        values = values + (tl.load(pointer + n),)
    return values


@triton.jit
def residuals(x, s, CLIP: tl.constexpr):
    """r_i = x_i - s · round(x_i / s) for the tuple x.  Without CLIP, |x_i| < 7 s must hold."""
    inverse = tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)
    r = ()
    for i in tl.static_range(len(x)):
        if CLIP:
            near = tl.clamp(x[i], -6.0 * s, 6.0 * s)
        else:
            near = x[i]
        r = r + (tl.fma(-round_e2m1(quotient(near, s, inverse)), s, x[i]),)
    return r


@triton.jit
def weighted_square(r, d):
    """Σ d_i r_i²."""
    total = d[0] * r[0] * r[0]
    for i in tl.static_range(1, len(r)):
        total += d[i] * r[i] * r[i]
    return total


@triton.jit
def quadratic_form(r, g, g_ptr):
    """‖r G‖² with G packed by columns: the tuple g, or, where that is empty (more than registers hold), read from memory."""
    total = tl.zeros(r[0].shape, tl.float32)
    for j in tl.static_range(len(r)):
        z = tl.zeros(r[0].shape, tl.float32)
        for i in tl.static_range(j + 1):
            if len(g) > 0:
                z += g[j * (j + 1) // 2 + i] * r[i]
            else:
                z += tl.load(g_ptr + j * (j + 1) // 2 + i) * r[i]
        total += z * z
    return total


@triton.jit
def search_kernel(
    w_ptr, tensor_scale_ptr, g_ptr, d_ptr, c_ptr, scales_ptr, rows, blocks, row_stride, column_stride,
    K: tl.constexpr, ROWS: tl.constexpr, E4M3: tl.constexpr, QUADRATIC: tl.constexpr,
):  # fmt: skip
    """scales (rows, blocks): for ROWS rows of one column block."""
    LAST: tl.constexpr = 126 if E4M3 else 254
    OCTAVE: tl.constexpr = 8 if E4M3 else 1
    # Powers of two are relative to the start: 24 octaves below it, x - 6 s is x in float32.
    NEGLIGIBLE: tl.constexpr = 1 if E4M3 else 103
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    tensor_scale = tl.load(tensor_scale_ptr)
    inverse = tl.div_rn(1.0, tensor_scale)
    corner = w_ptr + (row.to(tl.int64) * row_stride + block.to(tl.int64) * K * column_stride)
    x = ()
    amax = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(K):
        w = tl.load(corner + i * column_stride, mask=row < rows, other=0.0).to(tl.float32)
        x = x + (in_units(w, tensor_scale, inverse, E4M3),)
        amax = tl.maximum(amax, tl.abs(x[i]))
    start = scale_above(amax, E4M3)
    unit = tl.full([ROWS], 1.0, tl.float32)
    shift = tl.zeros([ROWS], tl.int32)
    if not E4M3:
        # Powers of two cost nothing to factor out, and losses of weights near 1e-20 or 1e20 stay within float32.
        shift = tl.minimum(start, LAST) - 127
        unit = decode_scale(shift + 127, False)
        y = ()
        for i in tl.static_range(K):
            y = y + (tl.div_rn(x[i], unit),)
        x = y
        amax = tl.div_rn(amax, unit)
    g = ()
    d = ()
    if QUADRATIC:
        d = load_all(d_ptr + block * K, K)
        if K == 16:
            g = load_all(g_ptr + block * (K * (K + 1) // 2), K * (K + 1) // 2)
    g_ptr += block * (K * (K + 1) // 2)

    best = tl.full([ROWS], float("inf"), tl.float32)
    best_code = tl.minimum(start, LAST)
    code = start
    losing = 0
    while losing < OCTAVE:
        s = decode_scale(tl.minimum(code, LAST) - shift, E4M3)
        below = decode_scale(tl.maximum(code - 1 - shift, 0), E4M3)
        possible = (code <= LAST) & ((below < 4.0 * amax) | (code == start))
        r = residuals(x, s, CLIP=False)
        if QUADRATIC:
            open = possible & ((weighted_square(r, d) < best) | (code < OCTAVE))
        else:
            open = possible & ((3.0 * s < amax) | (code < 2 * OCTAVE) | (code == start))
        state = tl.max(tl.where(open, 2, possible.to(tl.int32)), axis=0)
        losing += tl.where(state == 0, OCTAVE, 1)
        if state == 2:
            losing = 0
            if QUADRATIC:
                loss = quadratic_form(r, g, g_ptr)
            else:
                loss = sum_of_squares(r)
            better = possible & (loss < best)
            best = tl.where(better, loss, best)
            best_code = tl.where(better, code, best_code)
        code += 1

    lowest = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(K):
        if QUADRATIC:
            room = tl.sqrt(best) * tl.load(c_ptr + block * K + i)
        else:
            room = tl.sqrt(best)
        lowest = tl.maximum(lowest, tl.abs(x[i]) - room)
    lowest *= MARGIN / 6.0
    code = start - 1
    going = 1
    while going > 0:
        s = decode_scale(tl.maximum(code - shift, 1), E4M3)
        possible = (code >= 1) & (code - shift >= NEGLIGIBLE) & (s >= lowest)
        going = tl.max(possible.to(tl.int32), axis=0)
        if going > 0:
            r = residuals(x, s, CLIP=True)
            if QUADRATIC:
                loss = quadratic_form(r, g, g_ptr)
            else:
                loss = sum_of_squares(r)
            better = possible & (loss <= best)
            best = tl.where(better, loss, best)
            best_code = tl.where(better, code, best_code)
        code -= 1
    found = decode_scale(best_code, E4M3)
    tl.store(scales_ptr + row.to(tl.int64) * blocks + block, found, mask=row < rows)


@triton.jit
def sum_of_squares(r):
    total = r[0] * r[0]
    for i in tl.static_range(1, len(r)):
        total += r[i] * r[i]
    return total


def search_scales(
    W: Tensor, format: Format, tensor_scale: Tensor, prepared: tuple[Tensor, Tensor, Tensor] | None = None
) -> Tensor:
    """Scales (r, n/block) float32 of smallest loss for each block of W (r, n): r · r, or rᵀ M r with prepared = prepare(M).

    W: float32, bfloat16 or float16, any strides.  tensor_scale: () float32 on W's device.
    Blocks of zeros get the smallest scale.
    Raises ValueError for elements other than E2M1, a width that the block does not divide or an M of another shape.
    """
    check(W, format)
    rows, blocks = W.shape[0], W.shape[1] // format.block
    if prepared is not None and prepared[1].shape != (blocks, format.block):
        raise ValueError(f"M must have {blocks} blocks of {format.block}, not {tuple(prepared[1].shape)}")
    scales = W.new_empty((rows, blocks), dtype=torch.float32)
    G, D, c = (scales, scales, scales) if prepared is None else prepared
    search_kernel[(triton.cdiv(rows, ROWS_PER_PROGRAM), blocks)](
        W, tensor_scale, G, D, c, scales, rows, blocks, W.stride(0), W.stride(1),
        K=format.block, ROWS=ROWS_PER_PROGRAM, E4M3=format.grid is E4M3, QUADRATIC=prepared is not None, num_warps=1,
    )  # fmt: skip
    return scales
