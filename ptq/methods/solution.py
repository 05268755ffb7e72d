"""What a method returns."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core.packing import Quantized


@dataclass(frozen=True)
class Solution:
    """A quantized weight or a batch of them, and per output row (..., d_out) float64 what GPTQ's loss identity compares.

    `accumulated`: Σ err² over the columns as the loop went.  `measured`: (Δ (H + damp) Δᵀ) of the result.  None for methods
    that feed no error forward.
    """

    quantized: Quantized
    accumulated: Tensor | None = None
    measured: Tensor | None = None


def join(parts: Sequence[Solution]) -> Solution:
    """One solution of the rows of all, in order; they share tensor_scale and format."""
    first = parts[0].quantized
    codes, scales = (torch.cat([getattr(part.quantized, name) for part in parts], -2) for name in ("codes", "scales"))
    sides = [[part.accumulated for part in parts], [part.measured for part in parts]]
    known = [torch.cat([one for one in side if one is not None], -1) if None not in side else None for side in sides]
    return Solution(Quantized(codes, scales, first.tensor_scale, first.format), *known)
