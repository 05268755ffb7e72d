"""qwantize's Triton functions, same names, arguments and results: scales and values of blocks along any dimension.

What differs: the searches are exact (over all 126 E4M3 scales; over every E8M0 scale that can win), ties round to the even
mantissa as the format demands, blocks of zeros give values 0 instead of NaN, and there is `mxfp4_optimal_hessian_triton`.

Source: qwantize 0.1.1, whose signatures these are.  Without `tensor_scale` the scales carry the weights' whole magnitude, as
there; small weights then fall into E4M3's subnormal scales, so pass ptq.core.formats.choose_tensor_scale's for NVFP4.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ptq.core.formats import MXFP4, NVFP4, Format
from ptq.kernels.hessian import block_hessian
from ptq.kernels.quantize import quantize_blocks
from ptq.kernels.search import prepare, search_scales

Result = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


def nvfp4_naive_triton(W: Tensor, dim: int = -1, return_dequant: bool = False, *, tensor_scale: Tensor | None = None) -> Result:
    """E4M3 scales nearest to absmax / 6."""
    return run(W, NVFP4, dim, return_dequant, None, None, tensor_scale, search=False)


def nvfp4_optimal_triton(
    W: Tensor, dim: int = -1, return_dequant: bool = False, *, tensor_scale: Tensor | None = None
) -> Result:
    """E4M3 scales of smallest squared error."""
    return run(W, NVFP4, dim, return_dequant, None, None, tensor_scale, search=True)


def nvfp4_optimal_hessian_triton(
    W: Tensor,
    dim: int = -1,
    return_dequant: bool = False,
    X: Tensor | None = None,
    *,
    H: Tensor | None = None,
    tensor_scale: Tensor | None = None,
) -> Result:
    """E4M3 scales of smallest rᵀ H_b r; give activations X (tokens, K) or the diagonal blocks H (K/block, block, block)."""
    return run(W, NVFP4, dim, return_dequant, X, H, tensor_scale, search=True, weighted=True)


def mxfp4_naive_triton(W: Tensor, dim: int = -1, return_dequant: bool = False) -> Result:
    """E8M0 scales 2^(⌊log2 absmax⌋ - 2)."""
    return run(W, MXFP4, dim, return_dequant, None, None, None, search=False)


def mxfp4_optimal_triton(W: Tensor, dim: int = -1, return_dequant: bool = False) -> Result:
    """E8M0 scales of smallest squared error."""
    return run(W, MXFP4, dim, return_dequant, None, None, None, search=True)


def mxfp4_optimal_hessian_triton(
    W: Tensor, dim: int = -1, return_dequant: bool = False, X: Tensor | None = None, *, H: Tensor | None = None
) -> Result:
    """E8M0 scales of smallest rᵀ H_b r; X or H as for NVFP4."""
    return run(W, MXFP4, dim, return_dequant, X, H, None, search=True, weighted=True)


def run(
    W: Tensor,
    format: Format,
    dim: int,
    return_dequant: bool,
    X: Tensor | None,
    H: Tensor | None,
    tensor_scale: Tensor | None,
    *,
    search: bool,
    weighted: bool = False,
) -> Result:
    """(scales, values like W[, dequantized like W]), all float32, of W, whose dimension `dim` is one block of 16 or 32.

    `scales` has W's shape without `dim`.  The blocks, in order, go through the blocks of H in turn.  A block of zeros reports
    scale 0 for NVFP4.  Raises ValueError for another block size, or for a Hessian that is missing or does not fit.
    """
    block = W.shape[dim]
    if block not in (16, 32):
        raise ValueError(f"W.shape[dim] is the block and must be 16 or 32, not {block}")
    format = replace(format, block=block)
    last = W.movedim(dim, -1)
    one = torch.ones((), dtype=torch.float32, device=W.device) if tensor_scale is None else tensor_scale
    scales, prepared, width = None, None, block
    if weighted:
        H = block_hessians(X, H, block)
        prepared, width = prepare(H), H.shape[0] * block
        if last.numel() % width:
            raise ValueError(f"{last.numel() // block} blocks of W do not divide among {H.shape[0]} blocks of H")
    x = last.reshape(-1, width)
    if search:
        scales = search_scales(x, format, one, prepared)
    out = "products" if return_dequant else "values"
    scales, values, products = quantize_blocks(x, format, one, scales=scales, out=out, zero=format.tensor_scale)
    result = (scales.view(last.shape[:-1]), values.view(last.shape).movedim(-1, dim))
    return result if products is None else (*result, products.view(last.shape).movedim(-1, dim))


def block_hessians(X: Tensor | None, H: Tensor | None, block: int) -> Tensor:
    if (X is None) == (H is None):
        raise ValueError("give either activations X (tokens, K) or block Hessians H (K/block, block, block)")
    if X is not None:
        return block_hessian(X, block)
    if H.dim() != 3 or H.shape[1:] != (block, block):
        raise ValueError(f"H must be (K/{block}, {block}, {block}), not {tuple(H.shape)}")
    return H
