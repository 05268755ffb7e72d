"""GPTQ of INT4 on the GPU: one block of 32 to 256 columns, its bfloat16 scale chosen in the loop.

The reference is ptq.methods.gptq.sweep_panel with a panel of one block.  A line is a row under one candidate scale.  A thread owns
a few lines and takes their columns a sub-block at a time: what the errors of earlier sub-blocks do to these columns comes first,
from memory, then the recursion runs through the sub-block in registers.  Each element takes its errors in the order of the
columns, as in the reference.  One kernel chooses scales, a second one rounds each row under its own.

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
from ptq.kernels.rounding import FIRST_BF16, LAST_BF16, absmax_bf16, decode_bf16, round_int4
from ptq.kernels.search import MARGIN

# Columns of a sub-block.
COLUMNS = 16
# Rows × candidates of a program, one warp.
ROWS, CANDIDATES = 4, 32
# Columns whose errors are loaded at once.
ERRORS_AHEAD = 4
# Programs that have room for their errors at a time.
PROGRAMS = 2048
# Of a program that rounds rows under their scales.
ROWS_TO_ROUND, COLUMNS_TO_ROUND = 32, 8


@triton.jit
def load_errors(e_ptr, LINES: tl.constexpr, AHEAD: tl.constexpr):
    """The errors of the next AHEAD columns, a tuple."""
    e = ()
    for m in tl.static_range(AHEAD):
        e = e + (tl.load(e_ptr + m * LINES),)
    return e


@triton.jit
def subtract_errors(left, e_ptr, f_ptr, columns, K: tl.constexpr, LINES: tl.constexpr, AHEAD: tl.constexpr):
    """left_c - Σ_m e_m F_mc of the first `columns` columns m, in their order, for the tuple `left` of adjacent columns.

    Errors come from far: they are loaded while the ones before are at work, at last AHEAD columns that are not used.
    """
    following = load_errors(e_ptr, LINES, AHEAD)
    for _ in range(0, columns, AHEAD):
        e = following
        e_ptr += AHEAD * LINES
        following = load_errors(e_ptr, LINES, AHEAD)
        for i in tl.static_range(AHEAD):
            less = ()
            for c in tl.static_range(len(left)):
                less = less + (tl.fma(-e[i], tl.load(f_ptr + i * K + c), left[c]),)
            left = less
        f_ptr += AHEAD * K
    return left


@triton.jit
def round_columns(
    x_ptr, s, inverse, e_ptr, f_ptr, d_ptr, first, K: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr,
    AHEAD: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """(q, e, z) of the COLUMNS columns from `first` on, tuples: values in units of s, errors, and what squared is the loss.

    `joint`: F is U, the errors are those of GPTQ (d = 1 / U_cc).  `quadratic`: F is G, the errors are x - s q, z is a column of
    their product with G (d = G_cc).  e_ptr: errors of the columns before.
    """
    x = ()
    left = ()
    for c in tl.static_range(COLUMNS):
        x = x + (tl.load(x_ptr + first + c),)
        left = left + ((x[c] if RULE == "joint" else 0.0) + tl.zeros(s.shape, tl.float32),)
    if RULE != "mse":
        left = subtract_errors(left, e_ptr, f_ptr + first, first, K, LINES, AHEAD)
    q = ()
    e = ()
    z = ()
    for c in tl.static_range(COLUMNS):
        value = left[c]
        if RULE != "mse":
            for m in tl.static_range(c):
                value = tl.fma(-e[m], tl.load(f_ptr + (first + m) * K + first + c), value)
        rounding = value if RULE == "joint" else x[c] + tl.zeros(s.shape, tl.float32)
        q = q + (round_int4(rounding, s, inverse),)
        error = tl.fma(q[c], -s, rounding)
        if RULE == "joint":
            error *= tl.load(d_ptr + first + c)
        e = e + (error,)
        z = z + ((value - error * tl.load(d_ptr + first + c) if RULE == "quadratic" else error),)
    return q, e, z


@triton.jit
def candidate_loss(
    x_ptr, s, possible, best, e_ptr, f_ptr, d_ptr, K: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr,
    AHEAD: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """(loss, largest |code value|, of `joint` alone) of scales s; where all are above `best`, over the columns up to there."""
    inverse = tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)
    loss = tl.where(possible, 0.0, float("inf"))
    largest = tl.zeros(s.shape, tl.float32)
    first = 0
    while first < K:
        q, e, z = round_columns(x_ptr, s, inverse, e_ptr, f_ptr, d_ptr, first, K, COLUMNS, LINES, AHEAD, RULE)
        for c in tl.static_range(COLUMNS):
            loss += z[c] * z[c]
            if RULE == "joint":
                largest = tl.maximum(largest, tl.abs(q[c]))
        first += COLUMNS
        if RULE != "mse":
            if first < K:
                for c in tl.static_range(COLUMNS):
                    tl.store(e_ptr + (first - COLUMNS + c) * LINES, e[c])
            tl.debug_barrier()
        first = tl.where(any(loss <= best), first, K)
    return loss, largest


@triton.jit
def any(x):
    """Whether any of x (ROWS, CANDIDATES) is true."""
    return tl.max(tl.max(x.to(tl.int32), axis=1), axis=0) == 1


@triton.jit
def bounds(magnitudes, best, c):
    """Scales below the first and from the second on (ROWS, 1) lose to the loss `best` (ROWS, 1): the one clips, the other leaves
    too little.  magnitudes (ROWS, K), c (1, K)."""
    room = tl.sqrt(best) * c
    lowest = tl.max(magnitudes - room, axis=1)[:, None] * (MARGIN / 8.0)
    highest = 2.0 * tl.min(tl.where(magnitudes * MARGIN > room, magnitudes, float("inf")), axis=1)[:, None]
    return lowest, highest


@triton.jit
def choose_code(
    x_ptr, magnitudes, e_ptr, f_ptr, d_ptr, c, K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    CANDIDATES: tl.constexpr, STRIDE: tl.constexpr, AHEAD: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """The code (ROWS, 1) of smallest loss."""
    LINES: tl.constexpr = ROWS * CANDIDATES
    amax = tl.max(magnitudes, axis=1)[:, None]
    best = tl.full([ROWS, 1], float("inf"), tl.float32)
    lowest = tl.zeros([ROWS, 1], tl.float32)
    highest = best
    # The best scale is seldom above the absmax one, and seldom below half of it.
    begin = absmax_bf16(amax) - CANDIDATES * 5 // 8 * STRIDE
    best_code = tl.full([ROWS, 1], LAST_BF16, tl.int32)
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
        if any(possible):
            loss, largest = candidate_loss(x_ptr, s, possible, best, e_ptr, f_ptr, d_ptr, K, COLUMNS, LINES, AHEAD, RULE)
            smallest = tl.min(loss, axis=1)[:, None]
            found = tl.min(tl.where(loss == smallest, code, LAST_BF16), axis=1)[:, None]
            better = (smallest < best) | ((smallest == best) & (found < best_code))
            best = tl.where(better, smallest, best)
            best_code = tl.where(better, found, best_code)
            lowest, above = bounds(magnitudes, best, c)
            highest = tl.minimum(highest, above)
            if RULE == "joint":
                zero = tl.min(tl.where(possible & (largest == 0), s, float("inf")), axis=1)[:, None]
                highest = tl.minimum(highest, zero)
            offset += step
        elif step > 0:
            step = -step
            offset = step
        else:
            step = 0
    return best_code


# Scales of a block lie anywhere in their row.
@triton.jit(do_not_specialize_on_alignment=["scales_ptr"])
def choose_kernel(
    x_ptr, f_ptr, d_ptr, c_ptr, e_ptr, scales_ptr, rows, groups, x_stride, scales_stride, f_matrix, d_matrix, c_matrix,
    K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CANDIDATES: tl.constexpr, STRIDE: tl.constexpr,
    AHEAD: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """The scales of a block, ROWS rows of a matrix at a time.

    Of a batch of matrices, one below the other; …_matrix is how far what belongs to one is from that of the next.  e_ptr: room
    for the errors of each program, K × ROWS × CANDIDATES.
    """
    k = tl.arange(0, K)[None, :]
    line = tl.arange(0, ROWS)[:, None] * CANDIDATES + tl.arange(0, CANDIDATES)[None, :]
    e_ptr += tl.program_id(0).to(tl.int64) * (K * ROWS * CANDIDATES) + line
    in_matrix = tl.cdiv(rows, ROWS)
    for group in range(tl.program_id(0), groups, tl.num_programs(0)):
        matrix = (group // in_matrix).to(tl.int64)
        # The last row again where there are no more.
        row = matrix * rows + tl.minimum((group % in_matrix) * ROWS + tl.arange(0, ROWS)[:, None], rows - 1)
        magnitudes = tl.abs(tl.load(x_ptr + row * x_stride + k))
        if RULE == "absmax":
            code = absmax_bf16(tl.max(magnitudes, axis=1)[:, None])
        else:
            c = tl.load(c_ptr + matrix * c_matrix + k)
            code = choose_code(
                x_ptr + row * x_stride, magnitudes, e_ptr, f_ptr + matrix * f_matrix, d_ptr + matrix * d_matrix, c,
                K, COLUMNS, ROWS, CANDIDATES, STRIDE, AHEAD, RULE,
            )  # fmt: skip
        tl.store(scales_ptr + row * scales_stride, decode_bf16(code))


@triton.jit(do_not_specialize_on_alignment=["scales_ptr"])
def round_kernel(
    x_ptr, u_ptr, d_ptr, scales_ptr, room_ptr, q_ptr, e_ptr, loss_ptr, rows, x_stride, scales_stride, q_stride, e_stride,
    u_matrix, d_matrix, K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a block under their scales: q and E are written, loss is added to.  room_ptr: E once more, by columns."""
    matrix = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = own < rows
    row = matrix * rows + tl.minimum(own, rows - 1)
    room_ptr += (matrix * tl.num_programs(0) + tl.program_id(0)) * (K * ROWS) + tl.arange(0, ROWS)
    s = tl.load(scales_ptr + row * scales_stride)
    inverse = tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)
    loss = tl.zeros(s.shape, tl.float32)
    for first in range(0, K, COLUMNS):
        q, E, _ = round_columns(
            x_ptr + row * x_stride, s, inverse, room_ptr, u_ptr + matrix * u_matrix, d_ptr + matrix * d_matrix, first,
            K, COLUMNS, ROWS, AHEAD, "joint",
        )  # fmt: skip
        for c in tl.static_range(COLUMNS):
            loss += E[c] * E[c]
            tl.store(room_ptr + (first + c) * ROWS, E[c])
            tl.store(q_ptr + row * q_stride + first + c, q[c], mask=inside)
            tl.store(e_ptr + row * e_stride + first + c, E[c], mask=inside)
        tl.debug_barrier()
    tl.store(loss_ptr + row, tl.load(loss_ptr + row) + loss.to(tl.float64), mask=inside)


def block_factors(H_blocks: Tensor, U_blocks: Tensor, rule: str) -> tuple[Tensor, ...]:
    """(U, 1 / U_ii, F, d, c) of each block for the kernels, all float32.

    F (b, k, k) upper: what the errors of a candidate are pushed on with, U (`joint`), or the factor G of M = G Gᵀ, rounded from
    float64 (`local`, `schur`).  d (b, k): what its diagonal does, 1 / U_ii or G_ii.  c (b, k) = √(M⁻¹)_ii.  A block whose M has no
    Cholesky factor is judged by r · r, without bounds.
    """
    inverses = 1 / U_blocks.diagonal(dim1=-2, dim2=-1)
    F, d, c = U_blocks, inverses, U_blocks.square().sum(-2).sqrt()
    if rule in ("local", "schur"):
        M = or_identity(H_blocks) if rule == "local" else schur_complements(U_blocks.double())
        L, info = torch.linalg.cholesky_ex(M.double().flip(-2, -1))
        one = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
        G = torch.where((info > 0)[:, None, None], one, L.flip(-2, -1))
        inverse = torch.linalg.solve_triangular(G, one, upper=True)
        F, d = G.float(), G.diagonal(dim1=-2, dim2=-1).float()
        c = torch.where((info > 0)[:, None], 1e18, inverse.square().sum(-2).sqrt()).float()
    if rule == "mse":
        c = torch.ones_like(c)
    return tuple(t.contiguous() for t in (U_blocks, inverses, F, d, c))


def launch_block(
    x: Tensor, factors: Sequence[Tensor], q: Tensor, scales: Tensor, E: Tensor, loss: Tensor, format: Format, rule: str
) -> None:
    """One block: q (e, r, k), scales (e, r, 1) and E (e, r, k) of x (e, r, k) are written, loss (e, r) float64 is added to.

    All float32 but loss; rows may be strided, alike between matrices, columns must be adjacent.  `factors`: as `block_factors`
    gives, (e, 1, …) of this block.
    """
    assert format.elements is INT4 and format.grid is BF16 and all(t.stride(-1) == 1 for t in (x, q, E))
    assert all(t.stride(0) == t.shape[1] * t.stride(1) for t in (x, q, scales, E))
    U, inverses, F, d, c = factors
    matrices, rows, k = x.shape
    groups = triton.cdiv(rows, ROWS) * matrices
    programs = min(groups, PROGRAMS)
    room = x.new_empty(programs * k * ROWS * CANDIDATES)
    kernel_rule = "quadratic" if rule in ("local", "schur") else rule
    choose_kernel[(programs,)](
        x, F, d, c, room, scales, rows, groups, x.stride(1), scales.stride(1), *(t.stride(0) for t in (F, d, c)),
        K=k, COLUMNS=COLUMNS, ROWS=ROWS, CANDIDATES=CANDIDATES, STRIDE=format.grid.stride, AHEAD=ERRORS_AHEAD,
        RULE=kernel_rule, num_warps=1,
    )  # fmt: skip
    programs = triton.cdiv(rows, ROWS_TO_ROUND)
    room = x.new_empty(matrices * programs * k * ROWS_TO_ROUND)
    round_kernel[(programs, matrices)](
        x, U, inverses, scales, room, q, E, loss, rows, *(t.stride(1) for t in (x, scales, q, E)), U.stride(0),
        inverses.stride(0), K=k, COLUMNS=COLUMNS_TO_ROUND, ROWS=ROWS_TO_ROUND, AHEAD=ERRORS_AHEAD, num_warps=1,
    )  # fmt: skip
