"""Linear algebra that torch does not have, for any device and dtype."""

import math

import torch
from einops import rearrange
from torch import Tensor


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


def damped(H: Tensor, damp: float) -> Tensor:
    """H + damp · mean(diag H) · I.  H (d_in, d_in), or diagonal blocks (b, k, k), whose mean is over all blocks."""
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    A = H.clone()
    A.diagonal(dim1=-2, dim2=-1).add_(damp * diagonal.mean())
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


def pack_symmetric(A: Tensor) -> Tensor:
    """The lower triangle of A (n, n), row after row: (n (n + 1) / 2,).  What is above the diagonal is not looked at."""
    return torch.cat([A[row, : row + 1] for row in range(len(A))])


def unpack_symmetric(packed: Tensor, strip: int = 1024) -> Tensor:
    """The symmetric matrix (n, n) of which `pack_symmetric` gave `packed`."""
    n = math.isqrt(2 * len(packed))
    A = packed.new_zeros(n, n)
    for row, part in enumerate(packed.split(list(range(1, n + 1)))):
        A[row, : row + 1] = part
    for start in range(0, n, strip):  # nearly all of what is above the diagonal, without another matrix of that size
        stop = start + strip
        A[start:stop, stop:] = A[stop:, start:stop].T
        A[start:stop, start:stop] += A[start:stop, start:stop].tril(-1).T
    return A
