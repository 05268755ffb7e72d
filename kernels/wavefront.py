"""GPTQ with row feedback on the GPU: tiles of rows × columns, all of an antidiagonal in one launch.

The reference is ptq.methods.gptq.sweep_one_by_one.  A tile (row panel i, column panel j) needs the errors of the tiles above it,
by row feedback, and of those to its left, by column feedback, so the tiles with i + j = t can run at once.

Column panels are stored in reverse: the tiles of an antidiagonal then lie at (i, s), (i + 1, s + 1), …, at one distance from each
other in memory, and what they are multiplied with is a range of a batch.  Errors not known yet are zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.core.formats import E2M1, Format
from ptq.core.linalg import block_diagonal
from ptq.core.pieces import Pieces, add_pieces, split
from ptq.core.scales import check_rule
from ptq.kernels.sweep import block_parts, launch

# Rows of errors in a product are a multiple of this, as the matrix units want bfloat16.
ALIGNED = 8
# Pieces of what columns and what rows are multiplied with.
PIECES, ROW_PIECES = 3, 2
ROWS_PER_PROGRAM = 8


@triton.jit(do_not_specialize=["first_row", "first_panel", "rows", "depth"])
def keep_kernel(
    target_ptr, q_ptr, e_ptr, scales_ptr, kept_q_ptr, kept_e_ptr, kept_scales_ptr, kept_left_ptr, first_row, first_panel,
    rows, depth, n, e_piece, left_piece,
    K: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, E_PIECES: tl.constexpr,
    LEFT_PIECES: tl.constexpr,
):  # fmt: skip
    """Puts what a launch found of the tiles (rows, P) where it belongs: q and scales, E in pieces for the tiles to the right, and
    what is left, target - q · scale, in pieces for those below.  Tile t has row panel `first_row` + t, column panel
    `first_panel` + t."""
    t = tl.program_id(0).to(tl.int64)
    element = tl.arange(0, ROWS * COLUMNS)
    row, column = tl.program_id(1) * ROWS + element // COLUMNS, element % COLUMNS
    inside = (row < rows) & (column < P)
    own = (t * rows + row) * P + column
    whole_row, panel = (first_row + t) * rows + row, first_panel + t
    place = whole_row * n + panel * P + column
    q = tl.load(q_ptr + own, mask=inside)
    scale = tl.load(scales_ptr + own // K, mask=inside)
    tl.store(kept_q_ptr + place, q, mask=inside)
    tl.store(kept_scales_ptr + place // K, scale, mask=inside & (column % K == 0))
    e = tl.load(e_ptr + own, mask=inside)
    for piece in tl.static_range(E_PIECES):
        part = e.to(kept_e_ptr.dtype.element_ty)
        tl.store(kept_e_ptr + piece * e_piece + place, part, mask=inside)
        e -= part.to(tl.float32)
    left = tl.load(target_ptr + place, mask=inside) - q * scale
    place = (panel * depth + whole_row) * P + column
    for piece in tl.static_range(LEFT_PIECES):
        part = left.to(kept_left_ptr.dtype.element_ty)
        tl.store(kept_left_ptr + piece * left_piece + place, part, mask=inside)
        left -= part.to(tl.float32)


def sweep_tiles(
    x: Tensor, V: Tensor, row_panel: int, A: Tensor, U: Tensor, format: Format, rule: str, panel: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values q (..., r, n), scales (..., r, n/block), Σ err² per row (..., r) float64 of x (..., r, n) float32 contiguous,
    which is overwritten with the weights that each row panel was swept from.

    V (..., r, r): inverse factor of the damped G.  A (..., n, n): damped Hessian.  U (..., n, n): its inverse factor.  Matrices
    of a batch run one after the other.  Raises ValueError for an unknown rule.
    """
    check_rule(rule, A, U)
    if x.dim() > 2:
        done = [sweep_tiles(*own, format, rule, panel) for own in zip(x, V, [row_panel] * len(x), A, U, strict=True)]
        q, scales, loss = (torch.stack(part) for part in zip(*done, strict=True))
        return q, scales, loss
    (rows, n), R, k = x.shape, row_panel, format.block
    P = max(p for p in range(k, max(panel, k) + 1, k) if n % p == 0) if format.elements is E2M1 else k
    panels, columns = -(-rows // R), n // P
    parts = [part.unflatten(1, (columns, P // k))[0].flip(0) for part in block_parts(A[None], U[None], format, rule)]
    U_own = block_diagonal(U, P).flip(0)
    above = split(U.reshape(columns, P, columns, P).flip(0, 2).permute(2, 0, 1, 3).reshape(columns, n, P), number(x, PIECES))
    before = split(row_products(V, panels, R), number(x, ROW_PIECES))
    depth = before[0].shape[-1]
    moved = x.new_zeros(panels * R, n)
    moved[:rows] = reverse(x, columns)
    q, scales = torch.empty_like(moved), x.new_empty(panels * R, n // k)
    loss = torch.zeros(panels, R, dtype=torch.float64, device=x.device)
    E = torch.zeros(len(above), panels, R, n, dtype=above[0].dtype, device=x.device)
    left = torch.zeros(len(before), columns, depth, P, dtype=before[0].dtype, device=x.device)
    grid = triton.cdiv(R, ROWS_PER_PROGRAM)
    for t in range(panels + columns - 1):
        low, high = max(0, t - columns + 1), min(panels, t + 1)
        first = columns - 1 - t + low
        i, s = slice(low, high), slice(first, first + high - low)
        known, right = slice(0, -(-(high - 1) * R // ALIGNED) * ALIGNED), slice((first + 1) * P, None)
        target = tiles(moved, R, P, i, s)
        subtract(target, [part[i, :, known] for part in before], left[:, s, known])
        own = target.clone(memory_format=torch.contiguous_format)
        subtract(own, E[:, i, :, right], [part[s, right] for part in above])
        q_own, E_own, scales_own = torch.empty_like(own), torch.empty_like(own), own.new_empty(*own.shape[:2], P // k)
        launch(own, U_own[s], [part[s] for part in parts], q_own, scales_own, E_own, loss[i], format, rule)
        keep_kernel[(high - low, grid)](
            moved, q_own, E_own, scales_own, q, E, scales, left, low, first, R, depth, n, E.stride(0), left.stride(0),
            K=k, P=P, ROWS=ROWS_PER_PROGRAM, COLUMNS=triton.next_power_of_2(P), E_PIECES=len(E), LEFT_PIECES=len(left),
            enable_fp_fusion=False,
        )  # fmt: skip
    x.copy_(reverse(moved[:rows], columns))
    return reverse(q[:rows], columns), reverse(scales[:rows], columns), loss.flatten()[:rows]


def row_products(V: Tensor, panels: int, R: int) -> Tensor:
    """(panels, R, depth): what each panel of rows is moved by, negative, for what is left in each row before it, V_p,iᵀ V_pp⁻ᵀ for
    the rows p of a panel.  V (r, r); depth: panels · R, and zeros up to a multiple of `ALIGNED`."""
    size = panels * R
    whole = torch.eye(size, dtype=V.dtype, device=V.device)
    whole[: len(V), : len(V)] = V
    one = torch.eye(R, dtype=V.dtype, device=V.device)
    inverses = torch.linalg.solve_triangular(block_diagonal(whole, R).mT, one, upper=False)
    products = whole.new_zeros(size, -(-size // ALIGNED) * ALIGNED)
    products[:, :size].view(size, panels, R).copy_((whole.view(panels, R, size).mT @ inverses).transpose(0, 1))
    return products.view(panels, R, -1)


def tiles(x: Tensor, rows: int, columns: int, i: slice, s: slice) -> Tensor:
    """The view (m, rows, columns) of the m tiles (i, s), (i + 1, s + 1), … of x, contiguous, in tiles of rows × columns."""
    n = x.shape[1]
    offset = i.start * rows * n + s.start * columns
    return x.as_strided((i.stop - i.start, rows, columns), (rows * n + columns, n, 1), offset)


def reverse(x: Tensor, panels: int) -> Tensor:
    """x (r, n) with its column panels in the opposite order."""
    return x.unflatten(1, (panels, -1)).flip(1).flatten(1)


def number(x: Tensor, pieces: int) -> int:
    """Of pieces: on a GPU so many, elsewhere one."""
    return pieces if x.is_cuda else 1


def subtract(C: Tensor, left: Pieces | Tensor, right: Pieces | Tensor) -> None:
    """C (m, r, p) -= left (m, r, k) right (m, k, p), in place, each operand in as many pieces."""
    if left[0].shape[-1]:
        add_pieces(C, left, right, alpha=-1)
