"""GPTQ of INT4 on the GPU: one block of 32 to 256 columns, its bfloat16 scale chosen in the loop.

The reference is ptq.methods.gptq.sweep_panel with a panel of one block.  A line is a row under one candidate scale, a thread.
Everything is in units of that scale: with R = U of the block, its rows divided by their diagonal, the error e_m = left_m - q_m of
column m takes e_m R_mc from each later column c.  Columns are taken 16 at a time: the recursion runs through them in registers,
then one product on the matrix units sums what their errors do to each 16 of the columns to come.  One kernel chooses scales, a
second one rounds each row under its own.

Scales are tried in chunks, from around the absmax one upwards, then downwards, to where the bounds of ptq.core.scales say that no
other can beat the best loss so far.  A loss is a sum of squares that grows with the columns, so a chunk ends where every candidate
of it has lost.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.core.formats import BF16, INT4, Format
from ptq.core.scales import or_identity, schur_complements
from ptq.kernels.rounding import FIRST_BF16, INT4_SHIFT, LAST_BF16, absmax_bf16, decode_bf16, quotient
from ptq.kernels.search import MARGIN
from ptq.kernels.tiles import COLUMNS, add_errors, as_tiles, columns_of, scalars, tile_of, zero_sums

# Rows × candidates of a program, one warp.
ROWS, CANDIDATES = 4, 8
# Candidates below the absmax scale where the search begins: the best is seldom further below, and seldom above absmax.
BELOW = 13
# Rows of a program that rounds them under their scales.
ROWS_TO_ROUND = 16
# Ratios beyond are taken for this: far from what GPTQ meets, within what float16 holds.
LARGEST_RATIO = 60000.0


@triton.jit
def round_columns(x_ptr, s, inverse, before, r_ptr, first, K: tl.constexpr, RULE: tl.constexpr):
    """(q, e, z) of the COLUMNS columns from `first` on, tuples in units of s: values, errors, and what d · s · z gives the loss.

    before: Σ e_m R_mc of the columns before.  `joint`: e is the error of GPTQ, and z.  `quadratic`: e = x / s - q, and z is a
    column of their product with R.
    """
    q = ()
    e = ()
    z = ()
    r = ()
    for c in tl.static_range(COLUMNS):
        x = quotient(tl.load(x_ptr + first + c), s, inverse)
        if RULE == "joint":
            x -= before[c]
            for m in tl.static_range(c):
                x = tl.fma(-e[m], r[m][c], x)
        value = (tl.minimum(tl.maximum(x, -8.0), 7.0) + INT4_SHIFT) - INT4_SHIFT
        error = x - value
        total = error
        if RULE == "quadratic":
            total += before[c]
            for m in tl.static_range(c):
                total = tl.fma(e[m], r[m][c], total)
        q = q + (value,)
        e = e + (error,)
        z = z + (total,)
        r = r + (scalars(r_ptr + (first + c) * K + first),)
    return q, e, z


@triton.jit
def candidate_loss(x_ptr, s, possible, best, r_ptr, tiles_ptr, d_ptr, K: tl.constexpr, RULE: tl.constexpr):
    """(loss, largest |code value|, of `joint` alone) of scales s (lines,); where all are above `best`, over the columns up to
    there."""
    inverse = tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)
    loss = tl.where(possible, 0.0, float("inf"))
    largest = tl.zeros(s.shape, tl.float32)
    sums = zero_sums(s.shape[0], K)
    squares = loss
    first = 0
    while first < K:
        before = columns_of(tl.trans(sums[0]))
        q, e, z = round_columns(x_ptr, s, inverse, before, r_ptr, first, K, RULE)
        d = scalars(d_ptr + first)
        for c in tl.static_range(COLUMNS):
            share = z[c] * d[c]
            squares = tl.fma(share, share, squares)
            if RULE == "joint":
                largest = tl.maximum(largest, tl.abs(q[c]))
        loss = squares * s * s
        # What has overflowed has lost.
        loss = tl.where(loss == loss, loss, float("inf"))
        if RULE != "mse":
            sums = add_errors(sums, e, tiles_ptr, first, K)
        first = tl.where(any(loss <= best), first + COLUMNS, K)
    return loss, largest


@triton.jit
def any(x):
    """Whether any of x (lines,) is true."""
    return tl.max(x.to(tl.int32), axis=0) == 1


@triton.jit
def bounds(magnitudes, best, c):
    """Scales below the first and from the second on (ROWS, 1) lose to the loss `best` (ROWS, 1): the one clips, the other leaves
    too little.  magnitudes (ROWS, K), c (1, K)."""
    room = tl.sqrt(best) * c
    lowest = tl.max(magnitudes - room, axis=1)[:, None] * (MARGIN / 8.0)
    highest = 2.0 * tl.min(tl.where(magnitudes * MARGIN > room, magnitudes, float("inf")), axis=1)[:, None]
    return lowest, highest


@triton.jit
def lines_of(x, ROWS: tl.constexpr, CANDIDATES: tl.constexpr):
    """x, of rows or of rows and candidates, as one (ROWS × CANDIDATES,)."""
    return tl.reshape(tl.broadcast_to(x, [ROWS, CANDIDATES]), [ROWS * CANDIDATES])


@triton.jit
def choose_code(
    x_ptr, magnitudes, r_ptr, tiles_ptr, d_ptr, c, K: tl.constexpr, ROWS: tl.constexpr, CANDIDATES: tl.constexpr,
    BELOW: tl.constexpr, STRIDE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """The code (ROWS, 1) of smallest loss."""
    amax = tl.max(magnitudes, axis=1)[:, None]
    best = tl.full([ROWS, 1], float("inf"), tl.float32)
    lowest = tl.zeros([ROWS, 1], tl.float32)
    highest = best
    begin = absmax_bf16(amax) - BELOW * STRIDE
    best_code = tl.full([ROWS, 1], LAST_BF16, tl.int32)
    x_ptr = lines_of(x_ptr, ROWS, CANDIDATES)
    offset = 0
    step = CANDIDATES * STRIDE
    while step != 0:
        code = begin + (offset + tl.arange(0, CANDIDATES)[None, :] * STRIDE)
        s = decode_bf16(code)
        possible = (code >= FIRST_BF16) & (code <= LAST_BF16) & (s >= lowest) & (s < highest)
        if RULE == "mse":
            possible = possible & ((3.5 * s < amax) | (code < FIRST_BF16 + 128))
        if RULE == "quadratic":
            possible = possible & ((decode_bf16(code - STRIDE) < 2.0 * amax) | (code < FIRST_BF16 + STRIDE))
        judged = lines_of(possible, ROWS, CANDIDATES)
        if any(judged):
            loss, largest = candidate_loss(
                x_ptr, lines_of(s, ROWS, CANDIDATES), judged, lines_of(best, ROWS, CANDIDATES), r_ptr, tiles_ptr, d_ptr,
                K, RULE,
            )  # fmt: skip
            loss = tl.reshape(loss, [ROWS, CANDIDATES])
            smallest = tl.min(loss, axis=1)[:, None]
            found = tl.min(tl.where(loss == smallest, code, LAST_BF16), axis=1)[:, None]
            better = (smallest < best) | ((smallest == best) & (found < best_code))
            best = tl.where(better, smallest, best)
            best_code = tl.where(better, found, best_code)
            lowest, above = bounds(magnitudes, best, c)
            highest = tl.minimum(highest, above)
            if RULE == "joint":
                all_zero = possible & (tl.reshape(largest, [ROWS, CANDIDATES]) == 0)
                highest = tl.minimum(highest, tl.min(tl.where(all_zero, s, float("inf")), axis=1)[:, None])
            offset += step
        elif step > 0:
            step = -step
            offset = step
        else:
            step = 0
    return best_code


# Scales of a block lie anywhere in their row; one compilation serves every number of rows and blocks.
@triton.jit(do_not_specialize=["rows", "scales_stride"], do_not_specialize_on_alignment=["scales_ptr"])
def choose_kernel(
    x_ptr, r_ptr, tiles_ptr, d_ptr, c_ptr, scales_ptr, rows, x_stride, scales_stride, r_matrix, tiles_matrix, d_matrix,
    K: tl.constexpr, ROWS: tl.constexpr, CANDIDATES: tl.constexpr, BELOW: tl.constexpr, STRIDE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """The scales of ROWS rows of a block.

    Of a batch of matrices, one below the other; …_matrix is how far what belongs to one is from that of the next.
    """
    matrix = tl.program_id(1).to(tl.int64)
    # The last row again where there are no more.
    row = matrix * rows + tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], rows - 1)
    k = tl.arange(0, K)[None, :]
    magnitudes = tl.abs(tl.load(x_ptr + row * x_stride + k))
    if RULE == "absmax":
        code = absmax_bf16(tl.max(magnitudes, axis=1)[:, None])
    else:
        code = choose_code(
            x_ptr + row * x_stride, magnitudes, r_ptr + matrix * r_matrix, tiles_ptr + matrix * tiles_matrix,
            d_ptr + matrix * d_matrix, tl.load(c_ptr + matrix * d_matrix + k),
            K, ROWS, CANDIDATES, BELOW, STRIDE, RULE,
        )  # fmt: skip
    tl.store(scales_ptr + row * scales_stride, decode_bf16(code))


@triton.jit(do_not_specialize=["rows", "scales_stride"], do_not_specialize_on_alignment=["scales_ptr"])
def round_kernel(
    x_ptr, r_ptr, tiles_ptr, d_ptr, scales_ptr, q_ptr, e_ptr, loss_ptr, rows, x_stride, scales_stride, q_stride, e_stride, r_matrix,
    tiles_matrix, d_matrix, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a block under their scales: q and E are written, loss is added to."""
    matrix = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = own < rows
    row = matrix * rows + tl.minimum(own, rows - 1)
    r_ptr += matrix * r_matrix
    tiles_ptr += matrix * tiles_matrix
    d_ptr += matrix * d_matrix
    s = tl.load(scales_ptr + row * scales_stride)
    inverse = tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)
    loss = tl.zeros(s.shape, tl.float32)
    sums = zero_sums(ROWS, K)
    for first in range(0, K, COLUMNS):
        q, e, _ = round_columns(x_ptr + row * x_stride, s, inverse, columns_of(tl.trans(sums[0])), r_ptr, first, K, "joint")
        d = scalars(d_ptr + first)
        E = ()
        for c in tl.static_range(COLUMNS):
            E = E + (e[c] * s * d[c],)
            loss += E[c] * E[c]
        place = first + tl.arange(0, COLUMNS)[None, :]
        tl.store(q_ptr + row[:, None] * q_stride + place, tile_of(q), mask=inside[:, None])
        tl.store(e_ptr + row[:, None] * e_stride + place, tile_of(E), mask=inside[:, None])
        sums = add_errors(sums, e, tiles_ptr, first, K)
    tl.store(loss_ptr + row, tl.load(loss_ptr + row) + loss.to(tl.float64), mask=inside)


def block_factors(H_blocks: Tensor, U_blocks: Tensor, rule: str) -> tuple[Tensor, ...]:
    """(R, tiles, d) to round by and (R, tiles, d, c) to choose by, of each block for the kernels.

    R (b, k, k) float32, upper with a unit diagonal: what the errors of a candidate are pushed on with, U with its rows divided by
    their diagonal (`joint`), or the factor G of M = G Gᵀ with its columns so divided, rounded from float64 (`local`, `schur`).
    Its tiles, float32 (b, k · k) to round by, to choose by its two float16 pieces (b, 2, k · k).  d (b, k): 1 / U_ii or G_ii.
    c (b, k) = √(M⁻¹)_ii.  A block whose M has no Cholesky factor is judged by r · r, without bounds.
    """
    inverses = 1 / U_blocks.diagonal(dim1=-2, dim2=-1)
    R = U_blocks * inverses[..., None]
    to_round = R, as_tiles(R), inverses
    d, c = inverses, U_blocks.square().sum(-2).sqrt()
    if rule in ("local", "schur"):
        M = or_identity(H_blocks) if rule == "local" else schur_complements(U_blocks.double())
        L, info = torch.linalg.cholesky_ex(M.double().flip(-2, -1))
        one = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
        G = torch.where((info > 0)[:, None, None], one, L.flip(-2, -1))
        inverse = torch.linalg.solve_triangular(G, one, upper=True)
        d = G.diagonal(dim1=-2, dim2=-1)
        R, d = (G / d[..., None, :]).float(), d.float()
        c = torch.where((info > 0)[:, None], 1e18, inverse.square().sum(-2).sqrt()).float()
    if rule == "mse":
        d = c = torch.ones_like(c)
    tiles = as_tiles(R.clamp(-LARGEST_RATIO, LARGEST_RATIO))
    high = tiles.half()
    return tuple(t.contiguous() for t in (*to_round, R, torch.stack([high, (tiles - high.float()).half()], 1), d, c))


def launch_block(
    x: Tensor, factors: Sequence[Tensor], q: Tensor, scales: Tensor, E: Tensor, loss: Tensor, format: Format, rule: str
) -> None:
    """One block: q (e, r, k), scales (e, r, 1) and E (e, r, k) of x (e, r, k) are written, loss (e, r) float64 is added to.

    All float32 but loss; rows may be strided, alike between matrices, columns must be adjacent.  `factors`: as `block_factors`
    gives, (e, 1, …) of this block.
    """
    assert format.elements is INT4 and format.grid is BF16 and x.stride(-1) == q.stride(-1) == E.stride(-1) == 1
    assert all(t.stride(0) == t.shape[1] * t.stride(1) for t in (x, q, scales, E))
    R_round, tiles_round, d_round, R, tiles, d, c = factors
    matrices, rows, k = x.shape
    choose_kernel[(-(-rows // ROWS), matrices)](
        x, R, tiles, d, c, scales, rows, x.stride(1), scales.stride(1), *(t.stride(0) for t in (R, tiles, d)),
        K=k, ROWS=ROWS, CANDIDATES=CANDIDATES, BELOW=BELOW, STRIDE=format.grid.stride,
        RULE="quadratic" if rule in ("local", "schur") else rule, num_warps=1,
    )  # fmt: skip
    round_kernel[(-(-rows // ROWS_TO_ROUND), matrices)](
        x, R_round, tiles_round, d_round, scales, q, E, loss, rows, *(t.stride(1) for t in (x, scales, q, E)),
        *(t.stride(0) for t in (R_round, tiles_round, d_round)), K=k, ROWS=ROWS_TO_ROUND, num_warps=1, num_stages=1,
    )  # fmt: skip
