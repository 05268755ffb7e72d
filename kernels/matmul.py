"""float32 products on the matrix units of a GPU, by splitting each operand into bfloat16 pieces.

A float32 has 24 significant bits, a bfloat16 eight: A = A₁ + A₂ + A₃ exactly, each piece the rounding of what is left.  Of
the nine products of pieces the six that matter (the others are below 2⁻²⁴ of the first) are summed in float32.  With two pieces
of each, three of four products matter, the others are below 2⁻¹⁶.

Source: Henry, Tang, Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
computations".
"""

import torch
from torch import Tensor

from ptq.core.linalg import add_product

# By the number of pieces: piece of the left and of the right operand in each product, smallest products first.
PRODUCTS = {2: ((1, 0), (0, 1), (0, 0)), 3: ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0))}


def split(A: Tensor, pieces: int) -> list[Tensor]:
    """So many bfloat16 tensors like A (float32); three add up to it."""
    found = []
    for _ in range(pieces):
        piece = A.bfloat16()
        found.append(piece)
        A = A - piece
    return found


def product(A: Tensor, B: Tensor, *, pieces: int = 2) -> Tensor:
    """A (..., m, k) B (..., k, n) float32; on a GPU by bfloat16 pieces, one product after the other."""
    if not A.is_cuda or A.dtype != torch.float32:
        return A @ B
    C = A.new_zeros(*A.shape[:-1], B.shape[-1])
    left, right, add = split(A, pieces), split(B, pieces), torch.addmm if C.dim() == 2 else torch.baddbmm
    for i, j in PRODUCTS[pieces]:
        add(C, left[i], right[j], out_dtype=torch.float32, out=C)
    return C


def subtract_product(C: Tensor, A: Tensor, B: Tensor) -> None:
    """C (..., m, n) -= A (..., m, k) B (..., k, n), in place, all float32; on a GPU by bfloat16 pieces."""
    if not C.is_cuda:
        add_product(C, A, B, alpha=-1)
        return
    if C.shape[-1] == 0:
        return
    left, right = split(A, 3), split(B, 3)
    A = torch.cat([left[i] for i, _ in PRODUCTS[3]], dim=-1)
    B = torch.cat([right[j] for _, j in PRODUCTS[3]], dim=-2)
    add = torch.addmm if C.dim() == 2 else torch.baddbmm
    add(C, A, B, alpha=-1, out_dtype=torch.float32, out=C)
