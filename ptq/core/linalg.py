"""Linear algebra that torch does not have, for any device and dtype; of one matrix or of a batch of them."""

import torch
from einops import rearrange
from torch import Tensor

from ptq.core.pieces import Pieces, add_pieces, split

STRIP = 128
# Rows that are left to the library's factorization: of one matrix, and of each of a batch, which a GPU factorizes side by side.
SMALLEST, SMALLEST_OF_BATCH = 1024, 128
# Rows of a matrix whose halves are large enough that it pays to multiply them in pieces.
SMALLEST_IN_PIECES = 4096


class NotPositiveDefiniteError(ValueError):
    """H or G + damping has no Cholesky factor."""


def block_diagonal(H: Tensor, block: int) -> Tensor:
    """The diagonal blocks (..., d/block, block, block) of H (..., d, d)."""
    blocks = rearrange(H, "... (a i) (b j) -> ... a b i j", i=block, j=block)
    return blocks.diagonal(dim1=-4, dim2=-3).movedim(-1, -3).contiguous()


def pieces_for(A: Tensor) -> int:
    """In how many each operand of a product is, for a factorization of A (..., n, n): on a GPU three where it is large."""
    return 3 if A.is_cuda and A.dtype == torch.float32 and A.dim() == 2 and len(A) >= SMALLEST_IN_PIECES else 1


def inverse_cholesky(A: Tensor, smallest: int | None = None, pieces: int | None = None) -> tuple[Tensor, int]:
    """(L⁻¹, 0) where A = L Lᵀ with L lower triangular.  A (..., n, n) symmetric; its lower triangle is overwritten.

    By halves,  [[P, 0], [R, S]]⁻¹ = [[P⁻¹, 0], [-S⁻¹ R P⁻¹, S⁻¹]]  with R = B P⁻ᵀ and S Sᵀ = C - R Rᵀ for A = [[P Pᵀ, ·], [B, C]]:
    nearly all of it is matmul, which a GPU does at several times the speed of a factorization or a triangular solve; operands of
    its larger products in so many `pieces` (ptq.core.pieces), without which it is `pieces_for(A)`.
    Where A, or one of the batch, is not positive definite, the second value is the number of the pivot that failed, from 1.
    """
    smallest = smallest or (SMALLEST_OF_BATCH if A.dim() > 2 and A.is_cuda else SMALLEST)
    out = torch.zeros_like(A, memory_format=torch.contiguous_format)
    pivots: list[Tensor] = []
    invert_into(A, out, smallest, pieces or pieces_for(A), 0, pivots)
    failed = torch.stack(pivots).cpu()
    return out, int(failed[failed > 0].amin()) if (failed > 0).any() else 0


def invert_into(A: Tensor, out: Tensor, smallest: int, pieces: int, first: int, pivots: list[Tensor]) -> None:
    """The recursion of `inverse_cholesky`, for the diagonal block that starts at row `first` of the whole."""
    n = A.shape[-1]
    if n <= smallest:
        L, info = torch.linalg.cholesky_ex(A)
        pivots.append(torch.where(info > 0, info + first, info))
        out.copy_(torch.linalg.solve_triangular(L, torch.eye(n, dtype=A.dtype, device=A.device), upper=False))
        return
    half = (n // 2 + 127) // 128 * 128
    B, C, upper, lower = A[..., half:, :half], A[..., half:, half:], out[..., :half, :half], out[..., half:, half:]
    invert_into(A[..., :half, :half], upper, smallest, pieces, first, pivots)
    number = pieces if n >= SMALLEST_IN_PIECES else 1
    P = split(upper, number)
    R = split(multiply_by_transpose(split(B, number), P, smallest), number)
    for start in range(0, n - half, smallest):
        own = slice(start, start + smallest)
        add_pieces(C[..., start:, own], rows(R, slice(start, None)), transposed(rows(R, own)), alpha=-1)
    invert_into(C, lower, smallest, pieces, first + half, pivots)
    product = split(multiply_by_lower(R, P, smallest), number)
    lower_multiply_into(split(lower, number), product, out[..., half:, :half], smallest)


def rows(A: Pieces, own: slice) -> Pieces:
    return [piece[..., own, :] for piece in A]


def columns(A: Pieces, own: slice) -> Pieces:
    return [piece[..., own] for piece in A]


def transposed(A: Pieces) -> Pieces:
    return [piece.mT for piece in A]


def multiply_by_transpose(B: Pieces, A: Pieces, strip: int) -> Tensor:
    """B Aᵀ for a lower triangular A, without most of the products with its zeros."""
    out = empty_product(B)
    for first in range(0, A[0].shape[-1], strip):
        own, known = slice(first, first + strip), slice(0, first + strip)
        add_pieces(out[..., own], columns(B, known), transposed(columns(rows(A, own), known)), beta=0)
    return out


def multiply_by_lower(B: Pieces, A: Pieces, strip: int) -> Tensor:
    """B A for a lower triangular A, without most of the products with its zeros."""
    out = empty_product(B)
    for first in range(0, A[0].shape[-1], strip):
        own, rest = slice(first, first + strip), slice(first, None)
        add_pieces(out[..., own], columns(B, rest), columns(rows(A, rest), own), beta=0)
    return out


def lower_multiply_into(C: Pieces, B: Pieces, out: Tensor, strip: int) -> None:
    """out = -C B for a lower triangular C, without most of the products with its zeros."""
    for first in range(0, C[0].shape[-1], strip):
        own, known = slice(first, first + strip), slice(0, first + strip)
        add_pieces(out[..., own, :], columns(rows(C, own), known), rows(B, known), alpha=-1, beta=0)


def empty_product(B: Pieces) -> Tensor:
    """Of the shape of B, in the dtype of what it was split from."""
    dtype = B[0].dtype if len(B) == 1 else torch.float32
    return torch.empty(B[0].shape, dtype=dtype, device=B[0].device)


def damped(H: Tensor, damp: float, order: Tensor | None = None) -> Tensor:
    """H + damp · mean(diag H) · I, its rows and columns in `order`.  H (..., d_in, d_in), order (..., d_in)."""
    amount = damp * H.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    A = H.clone() if order is None else in_order(in_order(H, order, -2), order, -1)
    A.diagonal(dim1=-2, dim2=-1).add_(amount)
    return A


def in_order(A: Tensor, order: Tensor, dim: int) -> Tensor:
    """A (..., m, n) with its rows (dim -2) or columns (dim -1) as `order` (..., m or n) says."""
    if A.dim() == 2:
        return A.index_select(dim, order)
    return A.take_along_dim(order[..., None] if dim == -2 else order[..., None, :], dim)


def inverse_factor(A: Tensor, *, name: str = "H", remedy: str = "more calibration tokens or more damping help") -> Tensor:
    """U, upper triangular with A⁻¹ = Uᵀ U.  A (..., d_in, d_in) symmetric positive definite, in A's dtype.

    U = flip(inv(chol(flip A))) instead of Cholesky, inverse and Cholesky again, and the Cholesky factor and its
    inverse together.  Raises NotPositiveDefiniteError with the pivot that failed, the `name` of what was damped
    and the `remedy`.
    """
    inverse, failed = inverse_cholesky(A.flip(-2, -1))
    diagonal = inverse.diagonal(dim1=-2, dim2=-1)
    if failed or not ((diagonal > 0) & diagonal.isfinite()).all():  # 0 where A holds an infinity
        n = A.shape[-1]
        raise NotPositiveDefiniteError(f"{name} + damping is not positive definite (pivot {n - failed} of {n}); {remedy}")
    return inverse.flip(-2, -1)


def solve_from_right(C: Tensor, A: Tensor) -> tuple[Tensor, int]:
    """(C A⁻¹, 0) for C (..., m, n) and a symmetric positive definite A (..., n, n), which is overwritten; the second value is
    as `inverse_cholesky` has it."""
    if A.is_cuda:
        inverse, failed = inverse_cholesky(A)
        return multiply_by_inverse(C, inverse), failed
    factor, info = torch.linalg.cholesky_ex(A)
    return torch.cholesky_solve(C.mT, factor).mT, int(info.amax())


def multiply_by_inverse(C: Tensor, inverse: Tensor) -> Tensor:
    """C A⁻¹ for C (..., m, n) and what `inverse_cholesky` gives of A."""
    pieces = pieces_for(inverse)
    L = split(inverse, pieces)
    half = multiply_by_transpose(split(C, pieces), L, SMALLEST)
    return multiply_by_lower(split(half, pieces), L, SMALLEST)


def pack_symmetric(A: Tensor, strip: int = STRIP) -> Tensor:
    """A (n, n) without most of what is above its diagonal, which is not looked at: `strip` rows at a time, flat."""
    return torch.cat([A[row : row + strip, : row + strip].tril(row).flatten() for row in range(0, len(A), strip)])


def unpack_symmetric(packed: Tensor, n: int, strip: int = STRIP) -> Tensor:
    """The symmetric matrix (n, n) whose lower triangle `pack_symmetric` kept, on the same device."""
    A = packed.new_empty(n, n)
    start = 0
    for row in range(0, n, strip):
        own = A[row : row + strip, : row + strip]
        own.copy_(packed[start : start + own.numel()].view_as(own))
        start += own.numel()
        own[:, row:] = own[:, row:].tril() + own[:, row:].tril(-1).T
        A[:row, row : row + strip] = own[:, :row].T
    return A


def packed_size(n: int, strip: int = STRIP) -> int:
    """Elements of what `pack_symmetric` gives for n rows."""
    return sum(min(strip, n - row) * min(row + strip, n) for row in range(0, n, strip))
