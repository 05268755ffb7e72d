"""Linear algebra that torch does not have, for any device and dtype."""

import torch
from einops import rearrange
from torch import Tensor

STRIP = 128


class NotPositiveDefiniteError(ValueError):
    """H or G + damping has no Cholesky factor."""


def block_diagonal(H: Tensor, block: int) -> Tensor:
    """The diagonal blocks (d/block, block, block) of H (d, d)."""
    blocks = rearrange(H, "(a i) (b j) -> a b i j", i=block, j=block)
    return blocks.diagonal(dim1=0, dim2=1).permute(2, 0, 1).contiguous()


def inverse_cholesky(A: Tensor, smallest: int = 1024) -> tuple[Tensor, int]:
    """(L⁻¹, 0) where A = L Lᵀ with L lower triangular.  A (n, n) symmetric; its lower triangle is overwritten.

    By halves,  [[P, 0], [R, S]]⁻¹ = [[P⁻¹, 0], [-S⁻¹ R P⁻¹, S⁻¹]]  with R = B P⁻ᵀ and S Sᵀ = C - R Rᵀ for A = [[P Pᵀ, ·], [B, C]]:
    nearly all of it is matmul, which a GPU does at several times the speed of a factorization or a triangular solve.
    Where A is not positive definite, the second value is the number of the pivot that failed, from 1.
    """
    out = torch.zeros_like(A, memory_format=torch.contiguous_format)
    pivots: list[Tensor] = []
    invert_into(A, out, smallest, 0, pivots)
    failed = torch.stack(pivots).cpu()
    return out, int(failed[failed > 0].amin()) if (failed > 0).any() else 0


def invert_into(A: Tensor, out: Tensor, smallest: int, first: int, pivots: list[Tensor]) -> None:
    """The recursion of `inverse_cholesky`, for the diagonal block that starts at row `first` of the whole."""
    n = A.shape[0]
    if n <= smallest:
        L, info = torch.linalg.cholesky_ex(A)
        pivots.append(torch.where(info > 0, info + first, info))
        out.copy_(torch.linalg.solve_triangular(L, torch.eye(n, dtype=A.dtype, device=A.device), upper=False))
        return
    half = (n // 2 + 127) // 128 * 128
    B, C, upper, lower = A[half:, :half], A[half:, half:], out[:half, :half], out[half:, half:]
    invert_into(A[:half, :half], upper, smallest, first, pivots)
    R = multiply_by_transpose(B, upper, smallest)
    for start in range(0, n - half, smallest):
        C[start:, start : start + smallest].addmm_(R[start:], R[start : start + smallest].T, alpha=-1)
    invert_into(C, lower, smallest, first + half, pivots)
    lower_multiply_into(lower, multiply_by_lower(R, upper, smallest), out[half:, :half], smallest)


def multiply_by_transpose(B: Tensor, A: Tensor, strip: int) -> Tensor:
    """B Aᵀ for a lower triangular A, without most of the products with its zeros."""
    out = torch.empty_like(B, memory_format=torch.contiguous_format)
    for first in range(0, A.shape[0], strip):
        last = first + strip
        torch.mm(B[:, :last], A[first:last, :last].T, out=out[:, first:last])
    return out


def multiply_by_lower(B: Tensor, A: Tensor, strip: int) -> Tensor:
    """B A for a lower triangular A, without most of the products with its zeros."""
    out = torch.empty_like(B, memory_format=torch.contiguous_format)
    for first in range(0, A.shape[0], strip):
        last = first + strip
        torch.mm(B[:, first:], A[first:, first:last], out=out[:, first:last])
    return out


def lower_multiply_into(C: Tensor, B: Tensor, out: Tensor, strip: int) -> None:
    """out = -C B for a lower triangular C, without most of the products with its zeros."""
    for first in range(0, C.shape[0], strip):
        last = first + strip
        out[first:last].addmm_(C[first:last, :last], B[:last], beta=0, alpha=-1)


def damped(H: Tensor, damp: float, order: Tensor | None = None) -> Tensor:
    """H + damp · mean(diag H) · I, its rows and columns in `order`.  H (d_in, d_in), or without order diagonal blocks (b, k, k),
    whose mean is over all blocks."""
    amount = damp * H.diagonal(dim1=-2, dim2=-1).mean()
    A = H.clone() if order is None else H.index_select(0, order).index_select(1, order)
    A.diagonal(dim1=-2, dim2=-1).add_(amount)
    return A


def inverse_factor(A: Tensor, *, name: str = "H", remedy: str = "more calibration tokens or more damping help") -> Tensor:
    """U, upper triangular with A⁻¹ = Uᵀ U.  A (d_in, d_in) symmetric positive definite, in A's dtype.

    U = flip(inv(chol(flip A))) instead of Cholesky, inverse and Cholesky again, and the Cholesky factor and its
    inverse together.  Raises NotPositiveDefiniteError with the pivot that failed, the `name` of what was damped
    and the `remedy`.
    """
    inverse, failed = inverse_cholesky(A.flip(0, 1))
    diagonal = inverse.diagonal()
    if failed or not ((diagonal > 0) & diagonal.isfinite()).all():  # 0 where A holds an infinity
        pivot = A.shape[0] - failed
        raise NotPositiveDefiniteError(f"{name} + damping is not positive definite (pivot {pivot} of {len(A)}); {remedy}")
    return inverse.flip(0, 1)


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
