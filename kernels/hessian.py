"""Hessians on the GPU.  The references are in ptq.calibrate.hessian."""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS_PER_PROGRAM = 64
TOKENS_PER_PROGRAM = 1024
TOKENS_PER_STEP = 64


@triton.jit
def block_hessian_kernel(
    x_ptr, out_ptr, tokens, columns, row_stride, column_stride,
    K: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out[split] gets the diagonal K × K blocks of Xᵀ X over SPAN tokens, for COLUMNS columns.

    Whole COLUMNS × COLUMNS products are formed and only their diagonal blocks kept: the matrix units have the room, and the
    reads of X are 128 bytes wide.
    """
    split = tl.program_id(1)
    c = tl.arange(0, COLUMNS)
    column = tl.program_id(0) * COLUMNS + c
    total = tl.zeros([COLUMNS, COLUMNS], tl.float32)
    for first in range(split * SPAN, tl.minimum(split * SPAN + SPAN, tokens), STEP):
        t = first + tl.arange(0, STEP)
        pointers = x_ptr + t.to(tl.int64)[:, None] * row_stride + column[None, :] * column_stride
        x = tl.load(pointers, mask=(t < tokens)[:, None] & (column < columns)[None, :], other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
        total = tl.dot(tl.trans(x), x, total, input_precision="ieee")
    place = split.to(tl.int64) * columns * K + column[:, None] * K + c[None, :] % K
    own = (c[:, None] // K == c[None, :] // K) & (column < columns)[:, None]
    tl.store(out_ptr + place, total, mask=own)


def block_hessian(X: Tensor, block: int) -> Tensor:
    """The diagonal blocks (d/block, block, block) float32 of Xᵀ X; X (tokens, d) bfloat16, float16 or float32, read once.

    Products of 16-bit inputs are exact in float32 and sums are float32, over runs of tokens that are then added: deterministic.
    Raises ValueError where the block does not divide d.
    """
    tokens, columns = X.shape
    if columns % block:
        raise ValueError(f"{columns} input columns do not divide into blocks of {block}")
    splits = max(1, triton.cdiv(tokens, TOKENS_PER_PROGRAM))
    out = torch.empty((splits, columns // block, block, block), dtype=torch.float32, device=X.device)
    block_hessian_kernel[(triton.cdiv(columns, COLUMNS_PER_PROGRAM), splits)](
        X, out, tokens, columns, X.stride(0), X.stride(1), K=block, COLUMNS=COLUMNS_PER_PROGRAM, SPAN=TOKENS_PER_PROGRAM,
        STEP=TOKENS_PER_STEP, WIDEN=not X.is_cuda,  # Triton's interpreter multiplies bfloat16 wrongly
        num_warps=4,
    )  # fmt: skip
    return out.sum(0)


def add_lower(H: Tensor, X: Tensor, strip: int) -> None:
    """H (d, d) float32 += Xᵀ X, in place, but for what is above the `strip` × `strip` squares on its diagonal.  X (tokens, d)
    bfloat16 or float16 on a GPU.

    Products of 16-bit inputs are exact in float32, sums are float32.  With four strips 5/8 of the products.
    """
    for first in range(0, X.shape[1], strip):
        own = slice(first, first + strip)
        part = H[first:, own]
        torch.addmm(part, X[:, first:].T, X[:, own], out_dtype=torch.float32, out=part)
