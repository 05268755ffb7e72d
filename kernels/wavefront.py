"""GPTQ with row feedback on the GPU: tiles of rows × columns, all of an antidiagonal in one launch.

The reference is ptq.methods.gptq.sweep_one_by_one.  A tile (row panel i, column panel j) needs the errors of the tiles above it,
by row feedback, and of those to its left, by column feedback, so the tiles with i + j = t can run at once.

Column panels are stored in reverse: the tiles of an antidiagonal then lie at (i, s), (i + 1, s + 1), …, at one distance from each
other in memory, and what they are multiplied with is a range of a batch.  Errors not known yet are zero.
"""

import torch
from torch import Tensor

from ptq.core.formats import E2M1, Format
from ptq.core.linalg import block_diagonal
from ptq.core.pieces import PRODUCTS, split
from ptq.core.scales import check_rule
from ptq.kernels.sweep import block_parts, launch

# Rows of errors in a product are a multiple of this, as the matrix units want bfloat16.
ALIGNED = 8


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
    padded = panels * R
    parts = [part.unflatten(1, (columns, P // k))[0].flip(0) for part in block_parts(A[None], U[None], format, rule)]
    U_own = block_diagonal(U, P).flip(0)
    U_above = split_for(U.reshape(columns, P, columns, P).flip(0, 2).permute(2, 0, 1, 3).reshape(columns, n, P), 3)
    depth = -(-padded // ALIGNED) * ALIGNED
    V_all = torch.eye(depth, padded, dtype=x.dtype, device=x.device)
    V_all[:rows, :rows] = V
    one = torch.eye(R, dtype=x.dtype, device=x.device)
    inverses = torch.linalg.solve_triangular(block_diagonal(V_all[:padded], R).mT, one, upper=False)
    V_left = split_for(V_all.mT.contiguous().view(panels, R, depth), 2)
    moved = x.new_zeros(padded, n)
    moved[:rows] = reverse(x, columns)
    q, scales = torch.empty_like(moved), x.new_empty(padded, n // k)
    loss = torch.zeros(panels, R, dtype=torch.float64, device=x.device)
    E = [torch.zeros(panels, R, n, dtype=part.dtype, device=x.device) for part in U_above]
    E_rows = [torch.zeros(columns, depth, P, dtype=part.dtype, device=x.device) for part in V_left]
    for t in range(panels + columns - 1):
        low, high = max(0, t - columns + 1), min(panels, t + 1)
        first = columns - 1 - t + low
        i, s = slice(low, high), slice(first, first + high - low)
        above = slice(0, -(-(high - 1) * R // ALIGNED) * ALIGNED)
        left = slice((first + 1) * P, None)
        target = tiles(moved, R, P, i, s).clone(memory_format=torch.contiguous_format)
        subtract(target, [part[i, :, above] for part in V_left], [part[s, above] for part in E_rows])
        tiles(moved, R, P, i, s).copy_(target)
        own = target.clone()
        subtract(own, [part[i, :, left] for part in E], [part[s, left] for part in U_above])
        q_own, E_own, scales_own = torch.empty_like(own), torch.empty_like(own), own.new_empty(*own.shape[:2], P // k)
        launch(own, U_own[s], [part[s] for part in parts], q_own, scales_own, E_own, loss[i], format, rule)
        tiles(q, R, P, i, s).copy_(q_own)
        tiles(scales, R, P // k, i, s).copy_(scales_own)
        for kept, piece in zip(E, split_for(E_own, 3), strict=True):
            tiles(kept.view(padded, n), R, P, i, s).copy_(piece)
        values = (q_own.unflatten(-1, (-1, k)) * scales_own[..., None]).flatten(-2)
        for kept, piece in zip(E_rows, split_for(inverses[i] @ (target - values), 2), strict=True):
            distance = (depth + R) * P
            kept.as_strided(piece.shape, (distance, P, 1), (first * depth + low * R) * P).copy_(piece)
    x.copy_(reverse(moved[:rows], columns))
    return reverse(q[:rows], columns), reverse(scales[:rows], columns), loss.flatten()[:rows]


def tiles(x: Tensor, rows: int, columns: int, i: slice, s: slice) -> Tensor:
    """The view (m, rows, columns) of the m tiles (i, s), (i + 1, s + 1), … of x, contiguous, in tiles of rows × columns."""
    n = x.shape[1]
    offset = i.start * rows * n + s.start * columns
    return x.as_strided((i.stop - i.start, rows, columns), (rows * n + columns, n, 1), offset)


def reverse(x: Tensor, panels: int) -> Tensor:
    """x (r, n) with its column panels in the opposite order."""
    return x.unflatten(1, (panels, -1)).flip(1).flatten(1)


def split_for(x: Tensor, pieces: int) -> list[Tensor]:
    """x in bfloat16 pieces on a GPU, itself elsewhere."""
    return split(x, pieces) if x.is_cuda else [x]


def subtract(C: Tensor, left: list[Tensor], right: list[Tensor]) -> None:
    """C (m, r, p) -= left (m, r, k) right (m, k, p), in place, each operand in pieces as `split_for` gives."""
    if left[0].shape[-1] == 0:
        return
    if len(left) == 1:
        C.baddbmm_(left[0], right[0], alpha=-1)
        return
    for i, j in PRODUCTS[len(left)]:
        torch.baddbmm(C, left[i], right[j], alpha=-1, out_dtype=torch.float32, out=C)
