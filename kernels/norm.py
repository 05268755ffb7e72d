"""RMSNorm in one pass over memory; torch takes nine.  The reference is ptq.calibrate.norms.rms_norm, which is also the CPU path."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.kernels.activations import as_stored, load_float, round_like, store_float

VALUES_PER_PROGRAM = 4096


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, rows, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """Each row of x over the root of its mean square, rounded; times weight, rounded.  ROWS rows at once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    own = (row < rows) & (column < width)
    x = load_float(x_ptr + row * width + column, own, DTYPE)
    mean = tl.sum(x * x, axis=1, keep_dims=True) / width
    y = round_like(x * tl.rsqrt(mean + eps), DTYPE)
    weight = load_float(weight_ptr + column, column < width, DTYPE)
    store_float(out_ptr + row * width + column, round_like(weight * y, DTYPE), own, DTYPE)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Like x (..., d), of weight's (d,) dtype: float32, bfloat16 or float16."""
    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    padded = triton.next_power_of_2(width)
    rows = max(1, VALUES_PER_PROGRAM // padded)
    rms_norm_kernel[(triton.cdiv(x.numel() // width, rows),)](
        as_stored(x), as_stored(weight), as_stored(out), x.numel() // width, width, eps, ROWS=rows, WIDTH=padded,
        DTYPE=str(x.dtype), num_warps=4 if padded <= VALUES_PER_PROGRAM else 8,
    )  # fmt: skip
    return out
