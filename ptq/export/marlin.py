"""What vLLM's Marlin kernel, its path for NVFP4 on GPUs before Blackwell, makes of block scales.

It keeps a scale in eight bits without a sign, five of exponent and three of mantissa, and takes the top bit for granted when
it widens them to bfloat16: only scales of 2^-6 and more survive.  First all of a fused layer are multiplied by the largest power
of two that leaves the largest at 448 or below; what is then below 2^-6 is set to zero, and its 16 weights with it.  In float16
models nothing is multiplied first.

Source: vLLM 0.26.0, layers/quantization/utils/marlin_utils_fp4.py (nvfp4_marlin_process_scales).  Versions before set
nothing to zero but widened the small ones wrongly, to about 2^-112 of their value; a later one multiplies until the smallest
survives and lets the largest overflow.
"""

import torch
from torch import Tensor

LARGEST, SMALLEST = 448.0, 2.0**-6


def factor(scales: Tensor) -> Tensor:
    """The power of two (0-d) that the scales of a fused layer are multiplied by in a bfloat16 model; 1 where all are zero."""
    largest = scales.max()
    exponent = torch.frexp(LARGEST / largest.clamp(min=2.0**-9)).exponent - 1
    return torch.where(largest > 0, torch.ldexp(torch.ones(()), exponent), torch.ones(()))


def smallest_kept(scales: Tensor, model: str = "bfloat16") -> float:
    """The scale below which those of a fused layer (any shape, float32) are set to zero, in a model of that dtype."""
    return SMALLEST / (1.0 if model == "float16" else factor(scales).item())


def flushed(scales: Tensor, model: str = "bfloat16") -> Tensor:
    """Which scales (any shape, float32, not negative) of a fused layer are set to zero."""
    return (scales > 0) & (scales < smallest_kept(scales, model))
