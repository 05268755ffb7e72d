"""Two pieces of linear algebra that torch does not have, for any device and dtype."""

import torch
from einops import rearrange
from torch import Tensor


def block_diagonal(H: Tensor, block: int) -> Tensor:
    """The diagonal blocks (d/block, block, block) of H (d, d)."""
    blocks = rearrange(H, "(a i) (b j) -> a b i j", i=block, j=block)
    return blocks.diagonal(dim1=0, dim2=1).permute(2, 0, 1).contiguous()


def inverse_lower(L: Tensor, smallest: int = 1024) -> Tensor:
    """L⁻¹ of a lower triangular L (n, n), by halves:  [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [-C⁻¹ B A⁻¹, C⁻¹]].

    Nearly all of it is matmul, which a GPU does at several times the speed of a triangular solve.
    """
    out = torch.zeros_like(L, memory_format=torch.contiguous_format)
    invert_lower_into(L, out, smallest)
    return out


def invert_lower_into(L: Tensor, out: Tensor, smallest: int) -> None:
    n = L.shape[0]
    if n <= smallest:
        identity = torch.eye(n, dtype=L.dtype, device=L.device)
        out.copy_(torch.linalg.solve_triangular(L, identity, upper=False))
        return
    half = (n // 2 + 127) // 128 * 128
    invert_lower_into(L[:half, :half], out[:half, :half], smallest)
    invert_lower_into(L[half:, half:], out[half:, half:], smallest)
    left = multiply_by_lower(L[half:, :half], out[:half, :half], smallest)
    lower_multiply_into(out[half:, half:], left, out[half:, :half], smallest)


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
