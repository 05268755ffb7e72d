"""What a method returns."""

from dataclasses import dataclass

from torch import Tensor

from ptq.packing import Quantized


@dataclass(frozen=True)
class Solution:
    """A quantized weight, and per output row (d_out,) float64 what GPTQ's loss identity compares.

    `accumulated`: Σ err² over the columns as the loop went.  `measured`: (Δ (H + damp) Δᵀ) of the result.  None for methods
    that feed no error forward.
    """

    quantized: Quantized
    accumulated: Tensor | None = None
    measured: Tensor | None = None
