"""The formats as data, and the plain-torch reference that rounds to them.

A format is a set of element values (E2M1, INT4, E4M3), a block of weights that share one scale, and a grid of scales that
can be stored (E4M3, E8M0, bfloat16).  NVFP4 adds one fp32 `tensor_scale` per tensor:

    w = value(code) · scale · tensor_scale

`tensor_scale` defaults to a power of two.  Then dividing by it is exact, a bfloat16 weight meets a rounding midpoint or it does
not, and Q = code · scale · tensor_scale has at most six significant bits: exact in bfloat16, whatever the order of the products.

Sources: OCP Microscaling Formats v1.0 (E2M1, E8M0, MXFP4); NVIDIA's NVFP4 (E4M3 scale for 16 weights, fp32 tensor scale).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ptq.core.activations import ActivationFormat


def round_e2m1(x: Tensor) -> Tensor:
    """Nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with the sign of x; ties to the even mantissa; beyond 6 saturates."""
    x = x.clamp(-6.0, 6.0)
    step = binade(x.abs().clamp_(min=1.0)).mul_(0.5)
    return x.div_(step).round_().mul_(step)


def binade(x: Tensor) -> Tensor:
    """The largest power of two that is not above x, for positive normal numbers: x without its mantissa's bits."""
    integers, exponent = EXPONENT_BITS[x.dtype]
    return (x.view(integers) & exponent).view(x.dtype)


def round_int4(x: Tensor) -> Tensor:
    """Nearest integer in [-8, 7], ties to even."""
    return x.round().clamp(-8, 7)


def round_e4m3(x: Tensor) -> Tensor:
    """Nearest E4M3 value in x's dtype, ties to the even mantissa; beyond 448 saturates."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


def encode_e2m1(values: Tensor) -> Tensor:
    """Codes (uint8) of E2M1 values: bit 3 is the sign, bits 0-2 the rank of the magnitude.  Negative zero becomes code 0."""
    ranks = torch.tensor(E2M1_RANKS, dtype=torch.uint8, device=values.device)
    return ranks[(2 * values.abs()).int()] + 8 * (values < 0).to(torch.uint8)


def encode_int4(values: Tensor) -> Tensor:
    """Codes (uint8) of the integers -8 … 7: the integer plus 8."""
    return (values + 8).to(torch.uint8)


def encode_e4m3(values: Tensor) -> Tensor:
    """Codes (uint8) of E4M3 values: their bits.  Negative zero becomes code 0."""
    return (values + 0.0).to(torch.float8_e4m3fn).view(torch.uint8)


E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_RANKS = (0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7)  # of the largest magnitude that is not above 0, .5, 1, 1.5, 2, 2.5 …
EXPONENT_BITS = {
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}


@dataclass(frozen=True)
class Elements:
    """The values of codes 0, 1, … of `bits` bits, and how a scaled weight becomes one of them.

    `saturation`: no value is larger in magnitude.  `dead_zone`: magnitudes up to here round to 0.
    `halving_range`: for |x| ≤ halving_range · s the grid of scale s/2 is at least as close to x as that of s (every value of
    the coarse grid within reach is also a value of the fine one).
    """

    name: str
    values: tuple[float, ...]
    round: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    saturation: float
    dead_zone: float
    halving_range: float
    bits: int = 4


E2M1 = Elements(
    "e2m1",
    values=E2M1_MAGNITUDES + tuple(-m for m in E2M1_MAGNITUDES),
    round=round_e2m1,
    encode=encode_e2m1,
    saturation=6.0,
    dead_zone=0.25,
    halving_range=3.0,
)
INT4 = Elements(
    "int4",
    values=tuple(float(i) for i in range(-8, 8)),
    round=round_int4,
    encode=encode_int4,
    saturation=8.0,
    dead_zone=0.5,
    halving_range=3.5,
)
FP8 = Elements(
    "e4m3",
    values=tuple(torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().tolist()),  # codes 127 and 255 are NaN
    round=round_e4m3,
    encode=encode_e4m3,
    saturation=448.0,
    dead_zone=2.0**-10,
    halving_range=224.0,
    bits=8,
)


@dataclass(frozen=True)
class ScaleGrid:
    """The positive scales that can be stored, ascending; the scale of rank i has the stored integer `first_code` + i.

    `halves_from`: every scale from here up has its half on the grid.  `stride`: a search tries every stride-th scale, counted
    from the absmax one; 1 is exhaustive.
    """

    dtype: torch.dtype
    first_code: int
    count: int
    halves_from: float
    stride: int = 1


E4M3 = ScaleGrid(torch.float8_e4m3fn, first_code=1, count=126, halves_from=2.0**-5)
# 2^-127 (code 0) is subnormal in fp32, which GPUs flush; code 255 is NaN.
E8M0 = ScaleGrid(torch.uint8, first_code=1, count=254, halves_from=2.0**-125)
# Normal bfloat16 numbers.  Thirty-two candidates an octave, 2.2 % apart, are as fine as INT4's usual shrink grids.
BF16 = ScaleGrid(torch.bfloat16, first_code=0x0080, count=0x7F80 - 0x0080, halves_from=2.0**-125, stride=4)


@lru_cache(maxsize=32)
def scale_values(grid: ScaleGrid, device: torch.device) -> Tensor:
    """The scales of `grid`, ascending (count,) float32."""
    codes = torch.arange(grid.first_code, grid.first_code + grid.count, device=device)
    return decode_scales(codes, grid)


def decode_scales(codes: Tensor, grid: ScaleGrid) -> Tensor:
    """Stored integers -> scales, float32."""
    if grid.dtype == torch.uint8:
        return (codes.to(torch.int32) << 23).view(torch.float32)
    integers = torch.uint8 if grid.dtype.itemsize == 1 else torch.int16
    return codes.to(integers).view(grid.dtype).float()


def encode_scales(scales: Tensor, grid: ScaleGrid) -> Tensor:
    """Scales (on the grid, float32) -> what a checkpoint stores, in `grid.dtype`.  Exact."""
    if grid.dtype == torch.uint8:
        return (scales.view(torch.int32) >> 23).to(torch.uint8)
    return scales.to(grid.dtype)


def nearest_e4m3(amax: Tensor) -> Tensor:
    """amax / 6 rounded to the nearest positive E4M3 value, at least 2⁻⁹, at most 448."""
    return (amax / 6).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).float()


def floor_exponent(amax: Tensor) -> Tensor:
    """2^(⌊log2 amax⌋ - 2), the rule of OCP MX v1.0 §6.3: magnitudes above 6 · scale saturate."""
    exponent = torch.frexp(amax.float().clamp(2.0**-126)).exponent - 3
    return torch.ldexp(torch.ones_like(amax, dtype=torch.float32), exponent.clamp(-126, 127))


def round_exponent(amax: Tensor) -> Tensor:
    """As `floor_exponent`, but one binade up where amax has a mantissa of 1.75 or more, as compressed-tensors does."""
    mantissa, exponent = torch.frexp(amax.float().clamp(2.0**-126))
    exponent = exponent - 3 + (mantissa >= 0.875).to(exponent.dtype)
    return torch.ldexp(torch.ones_like(amax, dtype=torch.float32), exponent.clamp(-126, 127))


def nearest_bf16(amax: Tensor) -> Tensor:
    """amax / 7.5 rounded to bfloat16, at least the smallest normal number."""
    return (amax / 7.5).clamp(2.0**-126).to(torch.bfloat16).float()


def nearest_bf16_for_e4m3(amax: Tensor) -> Tensor:
    """amax / 448 rounded to bfloat16, at least the smallest normal number."""
    return (amax / 448).clamp(2.0**-126).to(torch.bfloat16).float()


@dataclass(frozen=True)
class Format:
    """How a weight is stored: `block` consecutive weights share one scale, with 0 all of a row.  `absmax` maps a block's
    largest magnitude to a scale; `scheme` is the name of the layout in a compressed-tensors checkpoint.  `activation`: what the
    linear's inputs are rounded to where it runs; None, they are left as they are."""

    name: str
    block: int
    elements: Elements
    grid: ScaleGrid
    absmax: Callable[[Tensor], Tensor]
    tensor_scale: bool
    scheme: str
    activation: "ActivationFormat | None" = None

    @property
    def bits_per_weight(self) -> float:
        """Less the scales of whole rows, which are too few to count."""
        return self.elements.bits + (8 * self.grid.dtype.itemsize / self.block if self.block else 0)

    def span(self, d_in: int) -> int:
        """How many weights of a row of d_in share a scale."""
        return self.block or d_in


NVFP4 = Format("nvfp4", 16, E2M1, E4M3, nearest_e4m3, True, "nvfp4-pack-quantized")
MXFP4 = Format("mxfp4", 32, E2M1, E8M0, floor_exponent, False, "mxfp4-pack-quantized")
MXFP4_ROUND = Format("mxfp4-round", 32, E2M1, E8M0, round_exponent, False, "mxfp4-pack-quantized")
INT4_G128 = Format("int4", 128, INT4, BF16, nearest_bf16, False, "pack-quantized")
FP8_ROWS = Format("fp8", 0, FP8, BF16, nearest_bf16_for_e4m3, False, "float-quantized")

FORMATS = {format.name: format for format in (NVFP4, MXFP4, MXFP4_ROUND, INT4_G128, FP8_ROWS)}


def get_format(name: str) -> Format:
    """The format of that name.  Raises ValueError that lists them."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def choose_tensor_scale(W: Tensor, format: Format) -> Tensor:
    """The fp32 factor of W (0-d): the smallest power of two with max|W| ≤ 6 · 448 · tensor_scale; 1 where the format has none.

    A power of two loses at most one of the fifteen binades of E4M3 at the small end and makes every product exact.
    """
    return tensor_scale_of(W.abs().amax(), format)


def tensor_scale_of(amax: Tensor, format: Format) -> Tensor:
    """The same for tensors of which the largest magnitudes are known, float32 and of amax's shape."""
    one = torch.ones(amax.shape, dtype=torch.float32, device=amax.device)
    if not format.tensor_scale:
        return one
    largest = format.elements.saturation * scale_values(format.grid, amax.device)[-1]
    mantissa, exponent = torch.frexp(amax.float() / largest)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    return torch.where(mantissa > 0, torch.ldexp(one, exponent.clamp(-100, 120)), one)
