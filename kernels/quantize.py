"""Block quantize, pack, unpack and dequantize: each one pass over memory.

The reference of each is plain torch: ptq.core.formats (absmax rules, round, encode), ptq.core.packing
(pack, unpack, Quantized).  Two
things are defined here that torch leaves open: a NaN weight counts as 0, an infinite one as the largest there is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.core.formats import E4M3, Format
from ptq.kernels.pairs import block_scale, encode_pairs, is_exact, largest_magnitude, twice
from ptq.kernels.rounding import (
    absmax_scale,
    decode_e2m1,
    decode_scale,
    encode_e2m1,
    encode_scale,
    in_units,
    quantize_e2m1,
    quotient,
    round_e2m1,
)

WEIGHTS_PER_PROGRAM = 4096
# One a thread.
BLOCKS_OF_PAIRS_PER_PROGRAM = 128


@triton.jit
def larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantize_tile(
    w_ptr, tensor_scale, scales_ptr, out_ptr, products_ptr, block, inside, blocks_per_row, row_stride, column_stride,
    K: tl.constexpr, BLOCKS: tl.constexpr, E4M3: tl.constexpr, ABSMAX: tl.constexpr, OUT: tl.constexpr, ZERO: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """The blocks `block` of `quantize_kernel`, in portable float32 arithmetic."""
    k = tl.arange(0, K)
    inverse = tl.div_rn(1.0, tensor_scale)
    if FLAT:
        corner = block * K
    else:
        corner = block // blocks_per_row * row_stride + block % blocks_per_row * K * column_stride
    w = tl.load(w_ptr + (corner[:, None] + k[None, :] * column_stride), mask=inside[:, None], other=0.0).to(tl.float32)
    usual = 0
    if ABSMAX == "nearest_e4m3":
        # Finite, a normal scale, nothing saturates: then |x / s| < 7 and no weight needs a clamp.  A NaN fails the comparison.
        amax = tl.reduce(tl.abs(w), 1, larger_or_nan) * inverse
        usual = tl.min(((amax >= 0.125) & (amax <= 2688.0) | ~inside).to(tl.int32), axis=0)
    if usual == 1:
        x = quotient(w, tensor_scale, inverse)
        s = absmax_scale(tl.max(tl.abs(x), axis=1), "nearest_e4m3")
        q = round_e2m1(quotient(x, s[:, None], tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)[:, None]))
    else:
        x = in_units(w, tensor_scale, inverse, E4M3)
        if ABSMAX is None:
            s = tl.load(scales_ptr + block, mask=inside, other=1.0)
        else:
            s = absmax_scale(tl.max(tl.abs(x), axis=1), ABSMAX)
        q = quantize_e2m1(x, s[:, None], tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)[:, None])
    if OUT == "packed" and ABSMAX is not None:
        tl.store(scales_ptr + block, encode_scale(s, E4M3).to(tl.uint8), mask=inside)
    elif ZERO:
        tl.store(scales_ptr + block, tl.where(tl.max(tl.abs(w), axis=1) == 0, 0.0, s), mask=inside)
    elif ABSMAX is not None:
        tl.store(scales_ptr + block, s, mask=inside)
    place = block[:, None] * K + k[None, :]
    if OUT == "packed":
        low, high = tl.split(tl.reshape(encode_e2m1(q), (BLOCKS, K // 2, 2)))
        half = block[:, None] * (K // 2) + tl.arange(0, K // 2)[None, :]
        tl.store(out_ptr + half, (low | (high << 4)).to(tl.uint8), mask=inside[:, None])
    elif OUT == "codes":
        tl.store(out_ptr + place, encode_e2m1(q).to(tl.uint8), mask=inside[:, None])
    else:
        tl.store(out_ptr + place, q, mask=inside[:, None])
        if OUT == "products":
            tl.store(products_ptr + place, q * (s * tensor_scale)[:, None], mask=inside[:, None])


@triton.jit
def quantize_kernel(
    w_ptr, tensor_scale_ptr, scales_ptr, out_ptr, products_ptr, blocks_per_row, total, row_stride, column_stride,
    K: tl.constexpr, BLOCKS: tl.constexpr, E4M3: tl.constexpr, ABSMAX: tl.constexpr, OUT: tl.constexpr, ZERO: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """Some blocks of a matrix, numbered along its rows.  ABSMAX names the rule, or is None and float32 scales are read.

    OUT: `packed` (two codes a byte; scales stored as codes), `codes` (uint8), `values` (float32), `products` (values, and times
    their scale).  FLAT: the matrix is contiguous.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    quantize_tile(
        w_ptr, tl.load(tensor_scale_ptr), scales_ptr, out_ptr, products_ptr, block, block < total, blocks_per_row, row_stride,
        column_stride, K, BLOCKS, E4M3, ABSMAX, OUT, ZERO, FLAT,
    )  # fmt: skip


@triton.jit
def quantize_pairs_kernel(
    w_ptr, tensor_scale_ptr, scales_ptr, out_ptr, total,
    K: tl.constexpr, BLOCKS: tl.constexpr, E4M3: tl.constexpr, ABSMAX: tl.constexpr,
):  # fmt: skip
    """The same for OUT = `packed` and a contiguous bfloat16 matrix, by ptq.kernels.pairs where tensor_scale allows it."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < total
    tensor_scale = tl.load(tensor_scale_ptr)
    if is_exact(tensor_scale):
        place = block[:, None] * (K // 2) + tl.arange(0, K // 2)[None, :]
        x = tl.load(w_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + place, mask=inside[:, None], other=0)
        s = block_scale(largest_magnitude(x), tensor_scale, ABSMAX)
        tl.store(scales_ptr + block, encode_scale(s, E4M3).to(tl.uint8), mask=inside)
        tl.store(out_ptr + place, encode_pairs(x, twice(s * tensor_scale)[:, None]).to(tl.uint8), mask=inside[:, None])
    else:
        quantize_tile(
            w_ptr, tensor_scale, scales_ptr, out_ptr, out_ptr, block, inside, 1, K, 1,
            K, BLOCKS, E4M3, ABSMAX, "packed", False, True,
        )  # fmt: skip


def quantize_blocks(
    W: Tensor, format: Format, tensor_scale: Tensor, *, scales: Tensor | None = None, out: str = "packed", zero: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(scales (r, n/block), result, products) of W (r, n): round to nearest under the format's absmax scales or those given.

    W: float32, bfloat16 or float16, any strides.  tensor_scale: () float32 on W's device.  scales: float32, contiguous.
    out: `packed` -> result (r, n/2) uint8, and scales as stored (float8_e4m3fn or uint8) if chosen here;
    `codes` -> (r, n) uint8;
    `values` -> (r, n) float32 in units of scale · tensor_scale; `products` -> values, and the dequantized weights as the third.
    zero: blocks of zeros report scale 0 (float32 scales only).
    Raises ValueError for elements other than E2M1 or a width that the block does not divide.
    """
    check(W, format)
    rows, columns = W.shape
    blocks = columns // format.block
    absmax = None if scales is not None else format.absmax.__name__
    stored = format.grid.dtype if out == "packed" else torch.float32
    scales = W.new_empty((rows, blocks), dtype=stored) if scales is None else scales.contiguous()
    width, dtype = (
        (columns // 2, torch.uint8) if out == "packed" else (columns, torch.uint8 if out == "codes" else torch.float32)
    )
    result = W.new_empty((rows, width), dtype=dtype)
    products = torch.empty_like(result) if out == "products" else None
    total = rows * blocks
    stores = scales.view(torch.uint8) if stored.itemsize == 1 and absmax else scales
    if out == "packed" and absmax and takes_pairs(W):
        tile = BLOCKS_OF_PAIRS_PER_PROGRAM
        quantize_pairs_kernel[(triton.cdiv(total, tile),)](
            W, tensor_scale, stores, result, total, K=format.block, BLOCKS=tile, E4M3=format.grid is E4M3, ABSMAX=absmax
        )
    else:
        tile = WEIGHTS_PER_PROGRAM // format.block
        quantize_kernel[(triton.cdiv(total, tile),)](
            W, tensor_scale, stores, result, result if products is None else products, blocks, total, W.stride(0), W.stride(1),
            K=format.block, BLOCKS=tile, E4M3=format.grid is E4M3, ABSMAX=absmax, OUT=out, ZERO=zero, FLAT=W.is_contiguous(),
        )  # fmt: skip
    return scales, result, products


def takes_pairs(W: Tensor) -> bool:
    """Whether ptq.kernels.pairs can read W: bfloat16, contiguous, on an NVIDIA GPU that has its instructions (Hopper and later)."""
    if W.dtype != torch.bfloat16 or not W.is_cuda or torch.version.hip or not W.is_contiguous() or W.data_ptr() % 4:
        return False
    return torch.cuda.get_device_capability(W.device) >= (9, 0)


def check(W: Tensor, format: Format) -> None:
    if format.elements.name != "e2m1":
        raise ValueError(f"these kernels round to E2M1; format {format.name!r} has {format.elements.name} elements")
    if W.dim() != 2 or W.shape[1] % format.block:
        raise ValueError(f"a weight (d_out, d_in) with d_in divisible by {format.block} is needed, not {tuple(W.shape)}")


@triton.jit
def unpack_kernel(packed_ptr, codes_ptr, total, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    byte = tl.load(packed_ptr + at, mask=at < total, other=0).to(tl.int32)
    pair = tl.join(byte & 15, byte >> 4)
    place = at[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(codes_ptr + place, pair.to(tl.uint8), mask=(at < total)[:, None])


def unpack(packed: Tensor) -> Tensor:
    """Bytes (..., n/2) -> codes (..., n) uint8: the low nibble is the even column."""
    packed = packed.contiguous()
    codes = packed.new_empty((*packed.shape[:-1], 2 * packed.shape[-1]))
    unpack_kernel[(triton.cdiv(packed.numel(), 4096),)](packed, codes, packed.numel(), SIZE=4096)
    return codes


@triton.jit
def pack_kernel(codes_ptr, packed_ptr, total, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    place = at[:, None] * 2 + tl.arange(0, 2)[None, :]
    low, high = tl.split(tl.load(codes_ptr + place, mask=(at < total)[:, None], other=0).to(tl.int32))
    tl.store(packed_ptr + at, (low | (high << 4)).to(tl.uint8), mask=at < total)


def pack(codes: Tensor) -> Tensor:
    """Codes (..., n) uint8 -> bytes (..., n/2), the inverse of `unpack`.  Raises ValueError where n is odd."""
    if codes.shape[-1] % 2:
        raise ValueError(f"cannot pack an odd number of codes: shape {tuple(codes.shape)}")
    codes = codes.contiguous()
    packed = codes.new_empty((*codes.shape[:-1], codes.shape[-1] // 2))
    pack_kernel[(triton.cdiv(packed.numel(), 4096),)](codes, packed, packed.numel(), SIZE=4096)
    return packed


@triton.jit
def dequantize_kernel(
    packed_ptr, scales_ptr, tensor_scale_ptr, out_ptr, total, K: tl.constexpr, BLOCKS: tl.constexpr, E4M3: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < total
    half = block[:, None] * (K // 2) + tl.arange(0, K // 2)[None, :]
    byte = tl.load(packed_ptr + half, mask=inside[:, None], other=0).to(tl.int32)
    s = decode_scale(tl.load(scales_ptr + block, mask=inside, other=1).to(tl.int32), E4M3) * tl.load(tensor_scale_ptr)
    values = tl.join(decode_e2m1(byte & 15), decode_e2m1(byte >> 4))
    out = tl.reshape(values * s[:, None, None], (BLOCKS, K))
    place = block[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])


def dequantize(packed: Tensor, scales: Tensor, tensor_scale: Tensor, format: Format, dtype: torch.dtype) -> Tensor:
    """Q (r, n) in `dtype` from bytes (r, n/2) and stored scales (r, n/block): value(code) · (scale · tensor_scale)."""
    packed, scales = packed.contiguous(), scales.contiguous()
    Q = packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=dtype)
    tile = WEIGHTS_PER_PROGRAM // format.block
    dequantize_kernel[(triton.cdiv(scales.numel(), tile),)](
        packed, scales.view(torch.uint8), tensor_scale, Q, scales.numel(), K=format.block, BLOCKS=tile, E4M3=format.grid is E4M3
    )
    return Q
