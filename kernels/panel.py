"""GPTQ on the GPU: a panel of columns in one launch, scales chosen in the loop.

The reference is ptq.methods.gptq.sweep_panel.  A program owns a few rows and walks over the panel's blocks.  Its threads form a
grid of rows × candidates: each keeps a row's 16 weights and evaluates the loss of one candidate scale (for `joint` the whole
recursion inside the block), the smallest loss of a row wins, the smaller scale on a tie.  The recursion then runs once more for
the winner and pushes its errors onto the panel's later blocks; columns after the panel are the caller's, one large matmul.

Scales are tried in chunks upwards, from a few below the smallest that clips nothing, then downwards, to where the bounds of
ptq.core.scales say that no other can beat the best loss so far.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ptq.core.formats import E4M3, Format
from ptq.core.scales import schur_complements
from ptq.kernels.rounding import absmax_scale, decode_scale, quantize_e2m1, scale_above
from ptq.kernels.search import MARGIN, load_all, prepare, quadratic_form, sum_of_squares

# Rows × candidates: one thread each, and at 4096 rows the grid fills the chip once.
ROWS_PER_PROGRAM, CANDIDATES = 16, 8
# Columns of the panel that take a block's errors at once.
COLUMNS_AT_ONCE = 64


@triton.jit
def round_with_feedback(x, s, u, inverses, u_ptr):
    """(q, E) of GPTQ inside a block: tuples of the columns' values in units of s and of their errors (x_c - s q_c) / U_cc.

    u: the columns of U above the diagonal, packed, in registers; where empty they are read from u_ptr (K × K).
    """
    inverse = tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)
    q = ()
    E = ()
    for c in tl.static_range(len(x)):
        left = x[c]
        for m in tl.static_range(c):
            if len(u) > 0:
                left -= E[m] * u[c * (c - 1) // 2 + m]
            else:
                left -= E[m] * tl.load(u_ptr + m * len(x) + c)
        q = q + (quantize_e2m1(left, s, inverse),)
        E = E + (tl.fma(-q[c], s, left) * inverses[c],)
    return q, E


@triton.jit
def load_above_diagonal(pointer, K: tl.constexpr):
    """The columns above the diagonal of a K × K matrix as one tuple, to be kept in registers."""
    values = ()
    for c in tl.static_range(K):
        for m in tl.static_range(c):
            values = values + (tl.load(pointer + m * K + c),)
    return values


@triton.jit
def candidate_loss(x, s, u, inverses, u_ptr, g, g_ptr, RULE: tl.constexpr):
    """(loss, largest |code value|) of scales s."""
    largest = tl.zeros(s.shape, tl.float32)
    if RULE == "joint":
        q, E = round_with_feedback(x, s, u, inverses, u_ptr)
        loss = sum_of_squares(E)
    else:
        inverse = tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)
        q = ()
        r = ()
        for i in tl.static_range(len(x)):
            q = q + (quantize_e2m1(x[i], s, inverse),)
            r = r + (tl.fma(-q[i], s, x[i]),)
        if RULE == "mse":
            loss = sum_of_squares(r)
        else:
            loss = quadratic_form(r, g, g_ptr)
    for i in tl.static_range(len(x)):
        largest = tl.maximum(largest, tl.abs(q[i]))
    return loss, largest


@triton.jit
def bounds(x, best, c_ptr, RULE: tl.constexpr):
    """Scales below the first and above the second lose to the best loss of the row: the one clips, the other leaves too little."""
    known = tl.sqrt(tl.min(best, axis=1))[:, None]
    lowest = tl.zeros(best.shape, tl.float32)
    highest = tl.full(best.shape, float("inf"), tl.float32)
    for i in tl.static_range(len(x)):
        if RULE == "mse":
            room = known
        else:
            room = known * tl.load(c_ptr + i)
        magnitude = tl.abs(x[i])
        lowest = tl.maximum(lowest, magnitude - room)
        highest = tl.where(magnitude * MARGIN > room, tl.minimum(highest, magnitude), highest)
    return lowest * (MARGIN / 6.0), 4.0 * highest


@triton.jit
def choose_code(
    x, amax, lane, u, inverses, u_ptr, g, g_ptr, c_ptr, CHUNK: tl.constexpr, E4M3: tl.constexpr, RULE: tl.constexpr
):  # fmt: skip
    """Code (ROWS, 1) of the smallest loss."""
    LAST: tl.constexpr = 126 if E4M3 else 254
    HALVES: tl.constexpr = 16 if E4M3 else 2
    BELOW: tl.constexpr = 4 if E4M3 else 2
    start = tl.minimum(scale_above(amax, E4M3), LAST)
    best = tl.full(amax.shape, float("inf"), tl.float32)
    best_code = start
    lowest = tl.zeros(amax.shape, tl.float32)
    code = start - BELOW + lane
    step = CHUNK
    while step != 0:
        s = decode_scale(tl.clamp(code.to(tl.float32), 1.0, LAST).to(tl.int32), E4M3)
        loss, largest = candidate_loss(x, s, u, inverses, u_ptr, g, g_ptr, RULE)
        valid = (code >= 1) & (code <= LAST)
        better = valid & ((loss < best) | ((loss == best) & (code < best_code)))
        best = tl.where(better, loss, best)
        best_code = tl.where(better, code, best_code)
        code += step
        if step > 0:
            below, above = bounds(x, best, c_ptr, RULE)
            last = (code - step >= LAST) | ((largest == 0) & valid) | (s >= above)
            if RULE == "mse":
                last = last | ((3.0 * s >= amax) & (code - step >= HALVES))
            if tl.min(tl.max(last.to(tl.int32), axis=1), axis=0) == 1:
                lowest = below
                code = start - BELOW - CHUNK + lane
                step = -CHUNK
        if step < 0:
            possible = (code >= 1) & (decode_scale(tl.maximum(code, 1), E4M3) >= lowest)
            step = tl.where(tl.max(tl.max(possible.to(tl.int32), axis=1), axis=0) == 1, step, 0)
    smallest = tl.min(best, axis=1)[:, None]
    return tl.min(tl.where(best == smallest, best_code, LAST), axis=1)[:, None]


@triton.jit
def chunks(pointer, K: tl.constexpr, CHUNK: tl.constexpr):
    """Pointers to the next K columns, CHUNK at a time.

    The loop over blocks carries them: for an access through a pointer computed in place, Triton 3.6 walks the whole kernel to
    choose a layout, which made K = 32 compile for minutes.
    """
    found = ()
    for first in tl.static_range(0, K, CHUNK):
        found = found + (pointer + (first + tl.arange(0, CHUNK)[None, :]),)
    return found


@triton.jit
def advance(pointers, columns: tl.constexpr):
    moved = ()
    for i in tl.static_range(len(pointers)):
        moved = moved + (pointers[i] + columns,)
    return moved


@triton.jit
def load_columns(pointers, lane, inside, CHUNK: tl.constexpr):
    """One tensor (ROWS, CHUNK) a column, each spread over its row's threads from one coalesced load for CHUNK columns."""
    x = ()
    for i in tl.static_range(len(pointers)):
        tile = tl.load(pointers[i], mask=inside, other=0.0)
        for c in tl.static_range(CHUNK):
            # The sum has one term.
            x = x + (tl.sum(tl.where(lane == c, tile, 0.0), axis=1)[:, None] + tl.zeros(tile.shape, tl.float32),)
    return x


@triton.jit
def store_columns(pointers, columns, lane, inside, CHUNK: tl.constexpr):
    """The inverse of `load_columns`."""
    for i in tl.static_range(len(pointers)):
        tile = columns[i * CHUNK]
        for c in tl.static_range(1, CHUNK):
            tile = tl.where(lane == c, columns[i * CHUNK + c], tile)
        tl.store(pointers[i], tile, mask=inside)


@triton.jit
def subtract_errors(errors, x_pointers, u_pointers, first, width, inside, WIDTH: tl.constexpr):
    """x -= errors U for the panel's columns from `first` on, which the pointers start at."""
    later = first + tl.arange(0, WIDTH)[None, :]
    for _ in range(first, width, WIDTH):
        u = tl.load(u_pointers, mask=later < width, other=0.0)
        x = tl.load(x_pointers, mask=inside & (later < width), other=0.0)
        tl.store(x_pointers, x - tl.dot(errors, u, input_precision="ieee"), mask=inside & (later < width))
        later += WIDTH
        x_pointers += WIDTH
        u_pointers += WIDTH


# Row panels of row feedback have any number of rows, which would compile it once more, and their losses lie anywhere.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["loss_ptr"])
def panel_kernel(
    x_ptr, u_ptr, blocks_ptr, g_ptr, c_ptr, q_ptr, scales_ptr, e_ptr, loss_ptr, rows, width,
    x_stride, u_stride, q_stride, scales_stride, e_stride, u_matrix, blocks_matrix, g_matrix, c_matrix,
    K: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, E4M3: tl.constexpr, ABSMAX: tl.constexpr,
    RULE: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a panel of `width` columns: x is updated in place, q, scales and E are written, loss is added to.

    Of a batch of matrices of `rows` each, one below the other; …_matrix is how far what belongs to one is from that of the next.
    """
    TRIANGLE: tl.constexpr = K * (K + 1) // 2
    matrix = tl.program_id(1).to(tl.int64)
    u_ptr += matrix * u_matrix
    blocks_ptr += matrix * blocks_matrix
    g_ptr += matrix * g_matrix
    c_ptr += matrix * c_matrix
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_of = matrix * rows + own
    row = row_of[:, None]
    lane = tl.arange(0, CHUNK)[None, :]
    k = tl.arange(0, K)[None, :]
    inside = own[:, None] < rows
    loss = tl.zeros([ROWS, CHUNK], tl.float64)
    x_pointers = chunks(x_ptr + row * x_stride, K, CHUNK)
    q_pointers = chunks(q_ptr + row * q_stride, K, CHUNK)
    e_pointers = chunks(e_ptr + row * e_stride, K, CHUNK)
    e_tile = e_ptr + row * e_stride + k
    scales_pointers = scales_ptr + row_of * scales_stride
    for b in range(width // K):
        block_ptr = blocks_ptr + b * K * K
        x = load_columns(x_pointers, lane, inside, CHUNK)
        amax = tl.zeros([ROWS, CHUNK], tl.float32)
        inverses = ()
        for c in tl.static_range(K):
            amax = tl.maximum(amax, tl.abs(x[c]))
            inverses = inverses + (tl.div_rn(1.0, tl.load(block_ptr + c * K + c)),)
        u = ()
        g = ()
        if K == 16 and RULE == "joint":
            u = load_above_diagonal(block_ptr, K)
        if K == 16 and RULE == "quadratic":
            g = load_all(g_ptr + b * TRIANGLE, TRIANGLE)
        if RULE == "absmax":
            s = absmax_scale(amax, ABSMAX)
        else:
            code = choose_code(x, amax, lane, u, inverses, block_ptr, g, g_ptr + b * TRIANGLE, c_ptr + b * K, CHUNK, E4M3, RULE)
            s = decode_scale(code + tl.zeros([ROWS, CHUNK], tl.int32), E4M3)
        tl.store(scales_pointers, tl.max(s, axis=1), mask=own < rows)
        if K == 16 and RULE != "joint":
            u = load_above_diagonal(block_ptr, K)
        q, E = round_with_feedback(x, s, u, inverses, block_ptr)
        loss += sum_of_squares(E)
        store_columns(q_pointers, q, lane, inside, CHUNK)
        store_columns(e_pointers, E, lane, inside, CHUNK)
        # Threads of this program read errors, and in the next round weights, that others of it wrote.
        tl.debug_barrier()
        errors = tl.load(e_tile, mask=inside, other=0.0)
        later = (b + 1) * K + tl.arange(0, WIDTH)[None, :]
        u_pointers = u_ptr + (b * K + tl.trans(k)) * u_stride + later
        subtract_errors(errors, x_ptr + row * x_stride + later, u_pointers, (b + 1) * K, width, inside, WIDTH)
        tl.debug_barrier()
        x_pointers, q_pointers, e_pointers = advance(x_pointers, K), advance(q_pointers, K), advance(e_pointers, K)
        e_tile += K
        scales_pointers += 1
    total = tl.load(loss_ptr + row_of, mask=own < rows, other=0.0) + tl.max(loss, axis=1)
    tl.store(loss_ptr + row_of, total, mask=own < rows)


def block_factors(H_blocks: Tensor, U_blocks: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """(G, c) of blocks (b, k, k) for the panel kernel: packed factor of the rule's M (unused by `joint`), and √(M⁻¹)_ii."""
    if rule == "local":
        G, _, c = prepare(H_blocks)
    elif rule == "schur":
        G, _, c = prepare(schur_complements(U_blocks.double()))
    else:
        G = c = U_blocks.square().sum(-2).sqrt()
    return G, c


def launch_panel(
    x: Tensor, U: Tensor, U_blocks: Tensor, factors: Sequence[Tensor], q: Tensor, scales: Tensor, E: Tensor, loss: Tensor,
    format: Format, rule: str,
) -> None:  # fmt: skip
    """One panel: x (e, r, p) is updated in place, q (e, r, p), scales (e, r, p/block) and E (e, r, p) written, loss (e, r)
    float64 added to.

    All float32 but loss; rows may be strided, alike between matrices, columns must be adjacent.  U (e, p, p): the
    panel's own.  U_blocks (e, p/block, block, block) and factors (e, p/block, …): of its blocks.
    """
    assert x.stride(-1) == U.stride(-1) == q.stride(-1) == scales.stride(-1) == E.stride(-1) == 1
    assert all(t.stride(0) == t.shape[1] * t.stride(1) for t in (x, q, scales, E))
    kernel_rule = "quadratic" if rule in ("local", "schur") else rule
    G, c = factors
    matrices, rows, width = x.shape
    panel_kernel[(-(-rows // ROWS_PER_PROGRAM), matrices)](
        x, U, U_blocks, G, c, q, scales, E, loss, rows, width,
        *(t.stride(1) for t in (x, U, q, scales, E)), *(t.stride(0) for t in (U, U_blocks, G, c)),
        K=format.block, ROWS=ROWS_PER_PROGRAM, CHUNK=CANDIDATES, WIDTH=COLUMNS_AT_ONCE, E4M3=format.grid is E4M3,
        ABSMAX=format.absmax.__name__, RULE=kernel_rule, num_warps=4,
    )  # fmt: skip
