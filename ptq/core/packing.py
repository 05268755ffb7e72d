"""Codes and scales of one quantized weight, and two codes a byte."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ptq.core.formats import Format


@dataclass(frozen=True)
class Quantized:
    """A weight in few bits.

    codes (..., d_in) uint8.  scales (..., d_in / block) float32, on the format's grid.  tensor_scale () float32, or (e,) of
    a batch of weights (e, d_out, d_in).
    `dim`: where the quantized dimension stood in the tensor; here it is the last.  `input_scale` () float32: the global
    scale of its linear's inputs, where their format has one (ptq.core.activations).
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor
    format: Format
    dim: int = -1
    input_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """Q like the tensor that was quantized, float32 = value(code) · (scale · tensor_scale)."""
        table = torch.tensor(self.format.elements.values, device=self.codes.device)
        values = rearrange(table[self.codes.int()], "... (b k) -> ... b k", b=self.scales.shape[-1])
        steps = self.scales * self.tensor_scale.view(
            *self.tensor_scale.shape, *[1] * (self.scales.dim() - self.tensor_scale.dim())
        )
        return rearrange(values * steps[..., None], "... b k -> ... (b k)").movedim(-1, self.dim)

    def rows(self, number: int, start: int, stop: int) -> "Quantized":
        """Output rows start … stop - 1 of weight `number` of a batch, sharing its tensor_scale."""
        own = slice(start, stop)
        return Quantized(self.codes[number, own], self.scales[number, own], self.tensor_scale[number], self.format)


def pack(codes: Tensor) -> Tensor:
    """Codes (..., n) -> bytes (..., n/2): even columns in the low nibble, odd columns in the high one."""
    if codes.shape[-1] % 2:
        raise ValueError(f"cannot pack an odd number of codes: shape {tuple(codes.shape)}")
    pairs = rearrange(codes, "... (n two) -> ... n two", two=2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return rearrange(torch.stack((packed & 15, packed >> 4), dim=-1), "... n two -> ... (n two)")


def pack_int32(codes: Tensor) -> Tensor:
    """Codes (..., n) -> int32 (..., n/8): eight codes a word, the first in the lowest nibble."""
    if codes.shape[-1] % 8:
        raise ValueError(f"cannot pack a number of codes that 8 does not divide: shape {tuple(codes.shape)}")
    return pack(codes).contiguous().view(torch.int32)
