"""The functional API of qwantize 0.1.1, drop-in: the same names, arguments and returns, with searches that are exact.

A tensor on a GPU goes through Triton kernels, so that qwantize's Triton functions are here the same ones by another name.

Every function takes W whose dimension `dim` is one block (16 or 32 weights), and returns (scales, quants), with
`return_dequant=True` also the dequantized tensor: scales float32 with `dim` removed, quants the signed E2M1 values like W,
dequant = quants · scales · tensor_scale.

Additions: `H`, the block Hessians (d_in/block, block, block), in place of the activations X (tokens, d_in); and `tensor_scale`,
NVFP4's second scale (default 1, as in qwantize; then weights of ordinary size have subnormal block scales).

Where it differs from qwantize: ties between codes go to the even mantissa, not to zero; ties between scales to the smaller one;
a block whose absmax scale would round to zero gets the smallest positive scale.
"""

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from ptq.calibrate.hessian import add_blocks
from ptq.core.formats import MXFP4, NVFP4, Format
from ptq.core.scales import choose_scales
from ptq.kernels import quantize, search

Result = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


def nvfp4_naive(W: Tensor, dim: int = -1, return_dequant: bool = False, *, tensor_scale: float | Tensor = 1.0) -> Result:
    """Scale E4M3(max|w| / 6) for each block."""
    return quantize_blocks(W, dim, return_dequant, NVFP4, "absmax", None, tensor_scale)


def nvfp4_optimal(W: Tensor, dim: int = -1, return_dequant: bool = False, *, tensor_scale: float | Tensor = 1.0) -> Result:
    """The E4M3 scale of smallest squared error for each block."""
    return quantize_blocks(W, dim, return_dequant, NVFP4, "mse", None, tensor_scale)


def nvfp4_optimal_hessian(
    W: Tensor,
    dim: int = -1,
    return_dequant: bool = False,
    X: Tensor | None = None,
    *,
    H: Tensor | None = None,
    tensor_scale: float | Tensor = 1.0,
) -> Result:
    """The E4M3 scale of smallest rᵀ H r for each block, equal to trying all 126.  Needs X or H."""
    return quantize_blocks(W, dim, return_dequant, NVFP4, "local", block_hessians(W, dim, X, H), tensor_scale)


def mxfp4_naive(W: Tensor, dim: int = -1, return_dequant: bool = False) -> Result:
    """Scale 2^(⌊log2 max|w|⌋ - 2) for each block."""
    return quantize_blocks(W, dim, return_dequant, MXFP4, "absmax", None, 1.0)


def mxfp4_optimal(W: Tensor, dim: int = -1, return_dequant: bool = False) -> Result:
    """The power-of-two scale of smallest squared error for each block."""
    return quantize_blocks(W, dim, return_dequant, MXFP4, "mse", None, 1.0)


def mxfp4_optimal_hessian(
    W: Tensor, dim: int = -1, return_dequant: bool = False, X: Tensor | None = None, *, H: Tensor | None = None
) -> Result:
    """The power-of-two scale of smallest rᵀ H r for each block, equal to trying all.  Needs X or H."""
    return quantize_blocks(W, dim, return_dequant, MXFP4, "local", block_hessians(W, dim, X, H), 1.0)


def nvfp4_dequantize(scales: Tensor, quants: Tensor, dim: int = -1, *, tensor_scale: float | Tensor = 1.0) -> Tensor:
    """quants · scales · tensor_scale, like quants."""
    return quants * (scales * tensor_scale).unsqueeze(dim)


def mxfp4_dequantize(scales: Tensor, quants: Tensor, dim: int = -1) -> Tensor:
    """quants · scales, like quants."""
    return nvfp4_dequantize(scales, quants, dim)


def compute_metrics(W: Tensor, W_dq: Tensor, X: Tensor | None = None) -> dict[str, float]:
    """Errors of W_dq (d_out, d_in) against W: `weight_error` ‖W_dq - W‖ and `weight_error_pct` of ‖W‖; with X (tokens, d_in) also
    `output_error` ‖(W_dq - W) Xᵀ‖ and `output_error_pct` of ‖W Xᵀ‖.  Frobenius norms."""
    W, delta = W.float(), W_dq.float() - W.float()
    error, whole = float(delta.norm()), float(W.norm())
    metrics = {"weight_error": error, "weight_error_pct": 100 * error / whole}
    if X is not None:
        squares = torch.zeros(2, dtype=torch.float64, device=W.device)
        for x in X.split(4096):
            outputs = torch.stack((x.float() @ delta.T, x.float() @ W.T))
            squares += outputs.square().sum((1, 2), dtype=torch.float64)
        error, whole = squares.sqrt().tolist()
        metrics |= {"output_error": error, "output_error_pct": 100 * error / whole}
    return metrics


def block_hessians(W: Tensor, dim: int, X: Tensor | None, H: Tensor | None) -> Tensor:
    """H as given, or Xᵀ X block by block.  Raises ValueError where both or neither are given, or where they do not fit W."""
    if (X is None) == (H is None):
        raise ValueError("give either the activations X (tokens, d_in) or the block Hessians H (d_in/block, block, block)")
    block = check_block(W, dim)
    if H is None:
        assert X is not None
        if X.dim() != 2 or X.shape[1] % block:
            raise ValueError(f"X {tuple(X.shape)} must be (tokens, d_in) with d_in a multiple of the block, {block}")
        H = torch.zeros(X.shape[1] // block, block, block, device=W.device)
        add_blocks(H, X.to(W.device))
    if H.dim() != 3 or H.shape[1:] != (block, block) or W.numel() // block % H.shape[0]:
        raise ValueError(
            f"block Hessians {tuple(H.shape)} do not fit W {tuple(W.shape)} with blocks of {block} along dim {dim}"
        )
    return H


def check_block(W: Tensor, dim: int) -> int:
    block = W.shape[dim]
    if block not in (16, 32):
        raise ValueError(
            f"W.shape[{dim}] is {block}; it must be one block, 16 or 32: reshape W to (…, d_in/block, block) first"
        )
    return block


def quantize_blocks(
    W: Tensor, dim: int, return_dequant: bool, format: Format, rule: str, H: Tensor | None, tensor_scale: float | Tensor
) -> Result:
    """The common body.  Blocks are numbered row-major over W without `dim`; block i belongs to H[i mod len(H)]."""
    format = replace(format, block=check_block(W, dim))
    if not torch.isfinite(W).all():
        raise ValueError("W holds non-finite values")
    last = W.movedim(dim, -1)
    x = last.reshape(-1, format.block * (1 if H is None else len(H)))
    how = by_kernels if W.is_cuda else by_torch
    scales, quants = how(x, format, rule, H, torch.as_tensor(tensor_scale, dtype=torch.float32, device=W.device))
    scales, quants = scales.reshape(last.shape[:-1]), quants.reshape(last.shape).movedim(-1, dim)
    if not return_dequant:
        return scales, quants
    return scales, quants, nvfp4_dequantize(scales, quants, dim, tensor_scale=tensor_scale)


def by_torch(x: Tensor, format: Format, rule: str, H: Tensor | None, tensor_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(scales (r, n/block), quants (r, n)) of x (r, n); blocks of zeros report scale 0 for NVFP4, as in qwantize."""
    blocks = rearrange(x.float() / tensor_scale, "r (b k) -> b r k", k=format.block)
    scales = choose_scales(blocks, format, rule, H)
    quants = format.elements.round(blocks / scales[..., None]) + 0.0  # turns -0 into 0
    if format.tensor_scale:
        scales = torch.where((blocks == 0).all(-1), 0.0, scales)
    return rearrange(scales, "b r -> r b"), rearrange(quants, "b r k -> r (b k)")


def by_kernels(x: Tensor, format: Format, rule: str, H: Tensor | None, tensor_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same on a GPU, in two passes over x."""
    prepared = None if H is None else search.prepare(H)
    scales = None if rule == "absmax" else search.search_scales(x, format, tensor_scale, prepared)
    return quantize.quantize_blocks(x, format, tensor_scale, scales=scales, out="values", zero=format.tensor_scale)


nvfp4_naive_triton = nvfp4_naive
nvfp4_optimal_triton = nvfp4_optimal
nvfp4_optimal_hessian_triton = nvfp4_optimal_hessian
mxfp4_naive_triton = mxfp4_naive
mxfp4_optimal_triton = mxfp4_optimal
mxfp4_optimal_hessian_triton = mxfp4_optimal_hessian
