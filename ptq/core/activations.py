"""The formats of activations as data, and the plain-torch reference that rounds to them as engines do where they run.

    x ≈ value · step,   one step for the features that share a scale

    NVFP4      16 features   step = E4M3(global_scale · amax / 6) / global_scale
    MXFP4      32 features   step = 2^(⌊log2 amax⌋ - 2), one more where amax has a mantissa of 1.75 or more
    FP8        the tensor    step = 1 / global_scale
    FP8, token the token     step = amax / 448

`global_scale`, a divisor as checkpoints store it, is calibrated; ours are powers of two (`global_scale_of`).  Then every product
and quotient by it is exact, and engines that multiply by reciprocals find the same block scales.

Arithmetic is in the dtype of x where the steps are; those of NVFP4 are float32.  That is what compressed-tensors 0.20 does, and
so transformers: the results are equal bit for bit, zeros up to their sign.  vLLM's NVFP4 kernels divide amax in float32, as is
done here for a float32 x.  (Sources: compressed_tensors.quantization, lifecycle/forward.py and utils/helpers.py; vLLM's
nvfp4_emulation_utils.py.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core.formats import E2M1, FP8, Elements, round_e4m3, round_exponent

LARGEST_E4M3 = 448.0


def nvfp4_step(amax: Tensor, global_scale: Tensor) -> Tensor:
    return round_e4m3((amax / 6).float() * global_scale) / global_scale


def mxfp4_step(amax: Tensor, global_scale: None) -> Tensor:
    return round_exponent(amax).to(amax.dtype)


def tensor_step(amax: Tensor, global_scale: Tensor) -> Tensor:
    return (1 / global_scale).to(amax.dtype).expand_as(amax)


def token_step(amax: Tensor, global_scale: None) -> Tensor:
    return amax / LARGEST_E4M3


@dataclass(frozen=True)
class ActivationFormat:
    """How the inputs of a linear are rounded: `block` consecutive features share a scale, None: all of a token.

    `step`: (amax of what shares a scale, global scale) -> the step.  `reach`: the largest magnitude at global scale 1; 0 for
    formats that have no global scale.  `schemes`: of the weights that engines run on it (ptq.core.formats).
    """

    name: str
    block: int | None
    elements: Elements
    step: Callable[[Tensor, Tensor], Tensor] | Callable[[Tensor, None], Tensor]
    schemes: tuple[str, ...]
    reach: float = 0.0

    @property
    def calibrated(self) -> bool:
        """Whether there is a global scale."""
        return self.reach > 0


NVFP4_INPUT = ActivationFormat("nvfp4", 16, E2M1, nvfp4_step, ("nvfp4-pack-quantized",), reach=6 * LARGEST_E4M3)
MXFP4_INPUT = ActivationFormat("mxfp4", 32, E2M1, mxfp4_step, ("mxfp4-pack-quantized",))
FP8_INPUT = ActivationFormat("fp8", None, FP8, tensor_step, ("float-quantized",), reach=LARGEST_E4M3)
FP8_TOKEN_INPUT = ActivationFormat("fp8-token", None, FP8, token_step, ("float-quantized",))

ACTIVATIONS = {format.name: format for format in (NVFP4_INPUT, MXFP4_INPUT, FP8_INPUT, FP8_TOKEN_INPUT)}


def get_activation(name: str) -> ActivationFormat | None:
    """The format of that name, None for "none".  Raises ValueError that lists them."""
    if name != "none" and name not in ACTIVATIONS:
        raise ValueError(f"unknown activations {name!r}; there are none, {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS.get(name)


def fake_quantize(x: Tensor, format: ActivationFormat, global_scale: Tensor | None = None) -> Tensor:
    """x (..., d_in), float32 or 16-bit, rounded to the format's values and back, in its dtype.

    global_scale: () float32, for formats that have one.  What shares its scale with a value that is not finite is NaN, so that
    it shows.  Raises ValueError for a missing or superfluous global scale and a block that does not divide d_in.
    """
    check(x, format, global_scale)
    values = x.unflatten(-1, (-1, format.block)) if format.block else x
    amax = values.abs().amax(-1, keepdim=True)
    step = format.step(amax, global_scale)  # type: ignore[arg-type]  # its second argument is None where there is none
    units = torch.where(step > 0, values / step, 0.0)
    limit = format.elements.saturation
    rounded = format.elements.round(units.clamp(-limit, limit)) * step
    return torch.where(amax.isfinite(), rounded, torch.nan).to(x.dtype).view(x.shape)


def check(x: Tensor, format: ActivationFormat, global_scale: Tensor | None) -> None:
    """Raises ValueError where `fake_quantize` cannot work."""
    if format.calibrated != (global_scale is not None):
        said = "needs a global scale" if format.calibrated else "has no global scale"
        raise ValueError(f"activation format {format.name} {said}")
    if format.block and x.shape[-1] % format.block:
        raise ValueError(f"inputs of {x.shape[-1]} features do not divide into blocks of {format.block} ({format.name})")


def global_scale_of(amax: Tensor, format: ActivationFormat) -> Tensor:
    """() float32: the largest power of two with amax · global_scale ≤ `reach`; 1 where amax is 0.

    It costs at most one of E4M3's binades at the small end.
    """
    mantissa, exponent = torch.frexp(amax.float() / format.reach)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    one = torch.ones_like(mantissa)
    return torch.where(mantissa > 0, torch.ldexp(one, -exponent.clamp(-100, 100)), one)
