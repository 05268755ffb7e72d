"""Round to nearest: each weight on its own, once the block scales are chosen."""

import torch
from einops import rearrange
from torch import Tensor

from ptq.formats import Format
from ptq.hessian import block_diagonal, damped
from ptq.methods.solution import Solution
from ptq.packing import Quantized
from ptq.scales import choose_scales

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
    """W (d_out, d_in) rounded to the nearest codes under scales chosen by `rule` (absmax, mse or local).

    H: for `local` the full Hessian (d_in, d_in) or its diagonal blocks (d_in/block, block, block), else ignored.
    """
    W = W if W.dtype == torch.float64 else W.float()
    blocks = None
    if rule == "local" and H is not None:
        H = damped(H, damp).to(W.dtype)
        blocks = H if H.dim() == 3 else block_diagonal(H, format.block)
    x = rearrange(W / tensor_scale, "r (b k) -> b r k", k=format.block)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=W.device)
    scales = torch.empty(x.shape[:2], dtype=torch.float32, device=W.device)
    for start in range(0, x.shape[0], BLOCKS_AT_ONCE):
        part = slice(start, start + BLOCKS_AT_ONCE)
        s = choose_scales(x[part], format, rule, None if blocks is None else blocks[part])
        scales[part] = s
        codes[part] = format.elements.encode(format.elements.round(x[part] / s[..., None]))
    return Solution(
        Quantized(rearrange(codes, "b r k -> r (b k)"), rearrange(scales, "b r -> r b").contiguous(), tensor_scale, format)
    )
