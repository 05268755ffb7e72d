"""float32 products on the matrix units of a GPU, by splitting each operand into bfloat16 pieces.

A float32 has 24 significant bits, a bfloat16 eight: A = A₁ + A₂ + A₃ exactly, each piece the rounding of what is left.  Of
the nine products of pieces the six that matter (the others are below 2⁻²⁴ of the first) are summed in float32.  With two pieces
of each, three of four products matter, the others are below 2⁻¹⁶.  One piece is the operand itself.

Source: Henry, Tang, Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
computations".
"""

import torch
from torch import Tensor

Pieces = list[Tensor]
# By the number of pieces: piece of the left and of the right operand in each product, smallest products first.
PRODUCTS = {1: ((0, 0),), 2: ((1, 0), (0, 1), (0, 0)), 3: ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0))}


def split(A: Tensor, pieces: int) -> Pieces:
    """So many bfloat16 tensors like A (float32); three add up to it.  One: A."""
    if pieces == 1:
        return [A]
    found = []
    for _ in range(pieces):
        piece = A.bfloat16()
        found.append(piece)
        A = A - piece
    return found


def add_product(C: Tensor, A: Tensor, B: Tensor, *, alpha: float = 1, beta: float = 1) -> None:
    """C = beta C + alpha A B, in place; of each of a batch, where there are three dimensions.  A and B may be bfloat16 where C is
    float32; the sum is float32."""
    if A.dtype == C.dtype:
        (C.addmm_ if C.dim() == 2 else C.baddbmm_)(A, B, alpha=alpha, beta=beta)
    elif C.is_cuda:
        add = torch.addmm if C.dim() == 2 else torch.baddbmm
        add(C, A, B, alpha=alpha, beta=beta, out_dtype=torch.float32, out=C)
    else:  # a CPU's product of bfloat16 has no float32 result
        add_product(C, A.float(), B.float(), alpha=alpha, beta=beta)


def add_pieces(C: Tensor, left: Pieces, right: Pieces, *, alpha: float = 1, beta: float = 1) -> None:
    """C = beta C + alpha A B, in place, of operands in as many pieces each."""
    for i, j in PRODUCTS[len(left)]:
        add_product(C, left[i], right[j], alpha=alpha, beta=beta)
        beta = 1


def product(A: Tensor, B: Tensor, *, pieces: int = 2) -> Tensor:
    """A (..., m, k) B (..., k, n) float32; on a GPU by bfloat16 pieces, one product after the other."""
    if not A.is_cuda or A.dtype != torch.float32:
        return A @ B
    C = A.new_empty(*A.shape[:-1], B.shape[-1])
    add_pieces(C, split(A, pieces), split(B, pieces), beta=0)
    return C


def subtract_product(C: Tensor, A: Tensor, B: Tensor) -> None:
    """C (..., m, n) -= A (..., m, k) B (..., k, n), in place, all float32; on a GPU by bfloat16 pieces, all products as one."""
    if not C.is_cuda:
        add_product(C, A, B, alpha=-1)
    elif C.shape[-1]:
        left, right = split(A, 3), split(B, 3)
        A = torch.cat([left[i] for i, _ in PRODUCTS[3]], dim=-1)
        B = torch.cat([right[j] for _, j in PRODUCTS[3]], dim=-2)
        add_product(C, A, B, alpha=-1)
