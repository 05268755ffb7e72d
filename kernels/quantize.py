"""Block quantize, and pack in the same pass over memory.

The reference is plain torch: ptq.core.formats (absmax rules, round, encode), ptq.core.packing.  Two things are defined here that
torch leaves open: a NaN weight counts as 0, an infinite one as the largest there is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.core.formats import E4M3, Format
from ptq.kernels.pairs import block_scale, encode_pairs, is_exact, largest_magnitude, twice
from ptq.kernels.rounding import absmax_scale, encode_e2m1, encode_scale, in_units, quantize_e2m1, quotient, round_e2m1

WEIGHTS_PER_PROGRAM = 4096
# One a thread.
BLOCKS_OF_PAIRS_PER_PROGRAM = 128


@triton.jit
def larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantize_tile(
    w_ptr, tensor_scale, scales_ptr, out_ptr, block, inside, blocks_per_row, row_stride, column_stride,
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


@triton.jit
def quantize_kernel(
    w_ptr, tensor_scale_ptr, scales_ptr, out_ptr, blocks_per_row, total, row_stride, column_stride,
    K: tl.constexpr, BLOCKS: tl.constexpr, E4M3: tl.constexpr, ABSMAX: tl.constexpr, OUT: tl.constexpr, ZERO: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """Some blocks of a matrix, numbered along its rows.  ABSMAX names the rule, or is None and float32 scales are read.

    OUT: `packed` (two codes a byte; scales stored as codes), `codes` (uint8), `values` (float32).  FLAT: the
    matrix is contiguous.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    quantize_tile(
        w_ptr, tl.load(tensor_scale_ptr), scales_ptr, out_ptr, block, block < total, blocks_per_row, row_stride,
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
            w_ptr, tensor_scale, scales_ptr, out_ptr, block, inside, 1, K, 1, K, BLOCKS, E4M3, ABSMAX, "packed", False, True,
        )  # fmt: skip


def quantize_blocks(
    W: Tensor, format: Format, tensor_scale: Tensor, *, scales: Tensor | None = None, out: str = "packed", zero: bool = False
) -> tuple[Tensor, Tensor]:
    """(scales (r, n/block), result) of W (r, n): round to nearest under the format's absmax scales or those given.

    W: float32, bfloat16 or float16, any strides.  tensor_scale: () float32 on W's device.  scales: float32, contiguous.
    out: `packed` -> result (r, n/2) uint8, and scales as stored (float8_e4m3fn or uint8) if chosen here;
    `codes` -> (r, n) uint8; `values` -> (r, n) float32 in units of scale · tensor_scale.
    zero: blocks of zeros report scale 0 (float32 scales only).
    Raises ValueError for elements other than E2M1 or a width that the block does not divide.
    """
    check(W, format)
    rows, columns = W.shape
    blocks = columns // format.block
    absmax = None if scales is not None else format.absmax.__name__
    stored = format.grid.dtype if out == "packed" else torch.float32
    scales = W.new_empty((rows, blocks), dtype=stored) if scales is None else scales.contiguous()
    width = columns // 2 if out == "packed" else columns
    result = W.new_empty((rows, width), dtype=torch.float32 if out == "values" else torch.uint8)
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
            W, tensor_scale, stores, result, blocks, total, W.stride(0), W.stride(1),
            K=format.block, BLOCKS=tile, E4M3=format.grid is E4M3, ABSMAX=absmax, OUT=out, ZERO=zero, FLAT=W.is_contiguous(),
        )  # fmt: skip
    return scales, result


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
