"""Linear algebra that torch does not have, for any device and dtype; of one matrix or of a batch of them."""

import torch
from einops import rearrange
from torch import Tensor

STRIP = 128
# Rows that are left to the library's factorization: of one matrix, and of each of a batch, which a GPU factorizes side by side.
SMALLEST, SMALLEST_OF_BATCH = 1024, 128


class NotPositiveDefiniteError(ValueError):
    """H or G + damping has no Cholesky factor."""


def block_diagonal(H: Tensor, block: int) -> Tensor:
    """The diagonal blocks (..., d/block, block, block) of H (..., d, d)."""
    blocks = rearrange(H, "... (a i) (b j) -> ... a b i j", i=block, j=block)
    return blocks.diagonal(dim1=-4, dim2=-3).movedim(-1, -3).contiguous()


def add_product(C: Tensor, A: Tensor, B: Tensor, *, alpha: float = 1, beta: float = 1) -> None:
    """C = beta C + alpha A B, in place; of each of a batch, where there are three dimensions."""
    (C.addmm_ if C.dim() == 2 else C.baddbmm_)(A, B, alpha=alpha, beta=beta)


def inverse_cholesky(A: Tensor, smallest: int | None = None) -> tuple[Tensor, int]:
    """(L⁻¹, 0) where A = L Lᵀ with L lower triangular.  A (..., n, n) symmetric; its lower triangle is overwritten.

    By halves,  [[P, 0], [R, S]]⁻¹ = [[P⁻¹, 0], [-S⁻¹ R P⁻¹, S⁻¹]]  with R = B P⁻ᵀ and S Sᵀ = C - R Rᵀ for A = [[P Pᵀ, ·], [B, C]]:
    nearly all of it is matmul, which a GPU does at several times the speed of a factorization or a triangular solve.
    Where A, or one of the batch, is not positive definite, the second value is the number of the pivot that failed, from 1.
    """
    smallest = smallest or (SMALLEST_OF_BATCH if A.dim() > 2 and A.is_cuda else SMALLEST)
    out = torch.zeros_like(A, memory_format=torch.contiguous_format)
    pivots: list[Tensor] = []
    invert_into(A, out, smallest, 0, pivots)
    failed = torch.stack(pivots).cpu()
    return out, int(failed[failed > 0].amin()) if (failed > 0).any() else 0


def invert_into(A: Tensor, out: Tensor, smallest: int, first: int, pivots: list[Tensor]) -> None:
    """The recursion of `inverse_cholesky`, for the diagonal block that starts at row `first` of the whole."""
    n = A.shape[-1]
    if n <= smallest:
        L, info = torch.linalg.cholesky_ex(A)
        pivots.append(torch.where(info > 0, info + first, info))
        out.copy_(torch.linalg.solve_triangular(L, torch.eye(n, dtype=A.dtype, device=A.device), upper=False))
        return
    half = (n // 2 + 127) // 128 * 128
    B, C, upper, lower = A[..., half:, :half], A[..., half:, half:], out[..., :half, :half], out[..., half:, half:]
    invert_into(A[..., :half, :half], upper, smallest, first, pivots)
    R = multiply_by_transpose(B, upper, smallest)
    for start in range(0, n - half, smallest):
        own = slice(start, start + smallest)
        add_product(C[..., start:, own], R[..., start:, :], R[..., own, :].mT, alpha=-1)
    invert_into(C, lower, smallest, first + half, pivots)
    lower_multiply_into(lower, multiply_by_lower(R, upper, smallest), out[..., half:, :half], smallest)


def multiply_by_transpose(B: Tensor, A: Tensor, strip: int) -> Tensor:
    """B Aᵀ for a lower triangular A, without most of the products with its zeros."""
    out = torch.empty_like(B, memory_format=torch.contiguous_format)
    for first in range(0, A.shape[-1], strip):
        own = slice(first, first + strip)
        add_product(out[..., own], B[..., : own.stop], A[..., own, : own.stop].mT, beta=0)
    return out


def multiply_by_lower(B: Tensor, A: Tensor, strip: int) -> Tensor:
    """B A for a lower triangular A, without most of the products with its zeros."""
    out = torch.empty_like(B, memory_format=torch.contiguous_format)
    for first in range(0, A.shape[-1], strip):
        own = slice(first, first + strip)
        add_product(out[..., own], B[..., first:], A[..., first:, own], beta=0)
    return out


def lower_multiply_into(C: Tensor, B: Tensor, out: Tensor, strip: int) -> None:
    """out = -C B for a lower triangular C, without most of the products with its zeros."""
    for first in range(0, C.shape[-1], strip):
        own = slice(first, first + strip)
        add_product(out[..., own, :], C[..., own, : own.stop], B[..., : own.stop, :], alpha=-1, beta=0)


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
    if A.dim() > 2 and A.is_cuda:
        inverse, failed = inverse_cholesky(A)
        return C @ inverse.mT @ inverse, failed
    factor, info = torch.linalg.cholesky_ex(A)
    return torch.cholesky_solve(C.mT, factor).mT, int(info.amax())


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
