"""The bytes of llama.cpp's 4-bit blocks, from codes and scales and back.

    MXFP4  32 weights: 1 byte, the E8M0 exponent; 16 bytes of codes
    NVFP4  64 weights: 4 bytes, the E4M3 scales of four blocks of 16; 4 times 8 bytes of codes; tensor_scale is a tensor apart
    Q4_0   32 weights: 2 bytes, the scale in float16; 16 bytes of codes, code = q + 8

The codes of a block of k: byte j holds code j in its low nibble and code j + k/2 in its high one.  An INT4 block of 32 n
weights is n blocks of Q4_0 with one scale.

Sources: ggml's block_mxfp4, block_nvfp4 and block_q4_0, and gguf 0.19's quants.py (which is the test's oracle).
"""

import torch
from einops import rearrange, repeat
from torch import Tensor

from ptq.core.formats import E2M1, E8M0, Format, decode_scales, encode_scales
from ptq.core.packing import Quantized

MXFP4_BLOCK, NVFP4_BLOCK, Q4_0_BLOCK = 32, 64, 32


def kind_of(format: Format) -> str:
    """ggml's name of the type that holds a format."""
    if format.elements is not E2M1:
        return "Q4_0"
    return "NVFP4" if format.tensor_scale else "MXFP4"


def to_blocks(name: str, quantized: Quantized) -> Tensor:
    """A weight as ggml's bytes (d_out, bytes of a row) uint8.  Raises ValueError where the type cannot hold it."""
    kind, format = kind_of(quantized.format), quantized.format
    unit = NVFP4_BLOCK if kind == "NVFP4" else MXFP4_BLOCK
    d_in = quantized.codes.shape[-1]
    wrong_block = format.block % Q4_0_BLOCK if kind == "Q4_0" else format.block != (16 if kind == "NVFP4" else 32)
    if d_in % unit or wrong_block:
        raise ValueError(
            f"{name} has {d_in} inputs in blocks of {format.block}; GGUF's {kind} holds multiples of {unit} inputs: "
            "quantize to mxfp4 or int4 with --block 32, or leave this linear in 16 bits with --ignore"
        )
    if kind == "NVFP4":
        scales = encode_scales(quantized.scales, format.grid).view(torch.uint8)
        nibbles = rearrange(halves(quantized.codes, 16), "r (s four) b -> r s (four b)", four=4)
        return torch.cat([rearrange(scales, "r (s four) -> r s four", four=4), nibbles], -1).flatten(1)
    return torch.cat([scale_bytes(name, quantized, kind), halves(quantized.codes, 32)], -1).flatten(1)


def scale_bytes(name: str, quantized: Quantized, kind: str) -> Tensor:
    """Of each 32 weights (d_out, d_in/32, 1 or 2) uint8."""
    if kind == "MXFP4":
        return encode_scales(quantized.scales, quantized.format.grid)[..., None]
    half = quantized.scales.half()
    inexact = half.float() != quantized.scales
    if inexact.any():
        value = quantized.scales[inexact][0].item()
        raise ValueError(
            f"{name} has scale {value:.6g}, which float16 and so GGUF's Q4_0 cannot hold: choose compressed-tensors"
        )
    each = repeat(half, "r b -> r (b n)", n=quantized.format.block // Q4_0_BLOCK).contiguous()
    return each.view(torch.uint8).unflatten(-1, (-1, 2))


def from_blocks(blocks: Tensor, format: Format, tensor_scale: Tensor) -> Quantized:
    """The inverse of `to_blocks`; INT4 comes back with the scale of the first of each block's parts."""
    kind = kind_of(format)
    if kind == "NVFP4":
        parts = blocks.unflatten(-1, (-1, 36))
        scales = parts[..., :4].flatten(1).contiguous().view(format.grid.dtype).float()
        return Quantized(whole(rearrange(parts[..., 4:], "r s (four b) -> r (s four) b", four=4)), scales, tensor_scale, format)
    head = 1 if kind == "MXFP4" else 2
    parts = blocks.unflatten(-1, (-1, head + 16))
    stored, codes = parts[..., :head].contiguous(), whole(parts[..., head:])
    if kind == "MXFP4":
        return Quantized(codes, decode_scales(stored[..., 0], E8M0), tensor_scale, format)
    each = stored.view(torch.float16)[..., 0].float()
    return Quantized(codes, each[:, :: format.block // Q4_0_BLOCK].contiguous(), tensor_scale, format)


def halves(codes: Tensor, k: int) -> Tensor:
    """Codes (d_out, d_in) -> bytes (d_out, d_in/k, k/2)."""
    blocks = codes.unflatten(-1, (-1, k))
    return blocks[..., : k // 2] | (blocks[..., k // 2 :] << 4)


def whole(packed: Tensor) -> Tensor:
    """The inverse of `halves`."""
    return torch.cat([packed & 15, packed >> 4], -1).flatten(1)
