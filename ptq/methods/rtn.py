"""Round to nearest: each weight on its own, once the block scales are chosen."""

import torch
from einops import rearrange
from torch import Tensor

from ptq.core.formats import E2M1, Format, choose_tensor_scale
from ptq.core.linalg import block_diagonal, damped
from ptq.core.packing import Quantized
from ptq.core.scales import as_blocks, check_rule, choose_scales
from ptq.kernels.quantize import quantize_blocks
from ptq.kernels.search import prepare, search_scales
from ptq.methods.solution import Solution

BLOCKS_AT_ONCE = 64


def rtn(
    W: Tensor,
    H: Tensor | None,
    format: Format,
    *,
    rule: str = "absmax",
    tensor_scale: Tensor,
    damp: float = 0.01,
) -> Solution:
    """W (..., d_out, d_in) rounded to the nearest codes under scales chosen by `rule` (absmax, mse or local).

    tensor_scale (...).  H: for `local` the full Hessian (..., d_in, d_in) or, of one W, its diagonal blocks (d_in/block, block,
    block), else ignored.
    """
    W = W if W.dtype == torch.float64 else W.float()
    blocks = None
    if rule == "local" and H is not None:
        H = damped_blocks(H, damp) if H.dim() > W.dim() else block_diagonal(damped(H, damp), format.block)
        blocks = H.to(W.dtype).flatten(0, -3)
    if W.is_cuda and format.elements is E2M1 and W.dtype == torch.float32:
        return rtn_kernels(W, blocks, format, rule, tensor_scale)
    batch, rows = W.shape[:-2], W.shape[-2]
    x = as_blocks(W / tensor_scale[..., None, None], format.span(W.shape[-1]))
    codes = torch.empty(x.shape, dtype=torch.uint8, device=W.device)
    scales = torch.empty(x.shape[:2], dtype=torch.float32, device=W.device)
    for start in range(0, x.shape[0], BLOCKS_AT_ONCE):
        part = slice(start, start + BLOCKS_AT_ONCE)
        s = choose_scales(x[part], format, rule, None if blocks is None else blocks[part])
        scales[part] = s
        codes[part] = format.elements.encode(format.elements.round(x[part] / s[..., None]))
    codes, scales = codes.view(*batch, -1, rows, codes.shape[-1]), scales.view(*batch, -1, rows)
    return Solution(Quantized(rearrange(codes, "... b r k -> ... r (b k)"), scales.mT.contiguous(), tensor_scale, format))


def damped_blocks(blocks: Tensor, damp: float) -> Tensor:
    """Diagonal blocks (b, k, k) of H + damp · mean(diag H) · I."""
    amount = damp * blocks.diagonal(dim1=-2, dim2=-1).mean()
    return blocks + amount * torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)


def quantize(
    W: Tensor, format: Format, *, dim: int = -1, rule: str = "absmax", tensor_scale: Tensor | None = None
) -> Quantized:
    """A tensor of any shape rounded to nearest in blocks along `dim`, under scales chosen by `rule` (absmax or mse).

    tensor_scale () float32; by default the one `choose_tensor_scale` gives.  Raises ValueError where the block does not divide
    the dimension or a value is not finite.
    """
    if W.shape[dim] % format.span(W.shape[dim]):
        raise ValueError(f"dimension {dim} of {tuple(W.shape)} does not divide into blocks of {format.block}")
    if not torch.isfinite(W).all():
        raise ValueError("W holds non-finite values")
    rows = W.movedim(dim, -1)
    tensor_scale = choose_tensor_scale(W, format) if tensor_scale is None else tensor_scale
    result = rtn(
        rows.flatten(0, -2) if W.dim() > 1 else rows[None], None, format, rule=rule, tensor_scale=tensor_scale
    ).quantized
    scales = result.scales.view(*rows.shape[:-1], -1)
    return Quantized(result.codes.view(rows.shape), scales, tensor_scale, format, dim)


def rtn_kernels(W: Tensor, blocks: Tensor | None, format: Format, rule: str, tensor_scale: Tensor) -> Solution:
    """The same on a GPU for the E2M1 formats.  Raises ValueError as `choose_scales` does.

    A batch is one matrix, with the columns of all side by side.
    """
    check_rule(rule, blocks)
    if W.dim() == 3:
        wide = rearrange(W / tensor_scale[:, None, None], "e r n -> r (e n)")
        whole = rtn_kernels(wide, blocks, format, rule, torch.ones_like(tensor_scale[0])).quantized
        codes, scales = (rearrange(part, "r (e n) -> e r n", e=len(W)) for part in (whole.codes, whole.scales))
        return Solution(Quantized(codes.contiguous(), scales.contiguous(), tensor_scale, format))
    scales = None
    if rule != "absmax":
        scales = search_scales(W, format, tensor_scale, prepare(blocks) if blocks is not None and rule == "local" else None)
    scales, codes = quantize_blocks(W, format, tensor_scale, scales=scales, out="codes")
    return Solution(Quantized(codes, scales, tensor_scale, format))
