"""Inputs of linears rounded to an activation format and back, in one pass over memory.

The reference is ptq.core.activations.fake_quantize, which is also the CPU path.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.core import activations as reference
from ptq.core.activations import ActivationFormat, check
from ptq.core.formats import E2M1
from ptq.kernels.quantize import larger_or_nan
from ptq.kernels.rounding import E4M3_SHIFT, LARGEST, absmax_scale, round_e2m1, round_to_binade

VALUES_PER_PROGRAM = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BFLOAT16, FLOAT16 = (tl.constexpr(str(dtype)) for dtype in DTYPES[1:])


@triton.jit
def round_e4m3(x):
    """Nearest E4M3 value of float32 x, ties to the even mantissa; beyond 448 saturates."""
    return round_to_binade(tl.clamp(x, -448.0, 448.0), 0.015625, E4M3_SHIFT)


@triton.jit
def round_like(x, DTYPE: tl.constexpr):
    """float32 x rounded to the nearest number of DTYPE, still float32.  bfloat16 by integers: the interpreter's cast truncates."""
    if DTYPE == BFLOAT16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    if DTYPE == FLOAT16:
        return x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def load_float(ptr, mask, DTYPE: tl.constexpr):
    """float32 of what is stored there; bfloat16 as int16, since the interpreter misreads its subnormal numbers."""
    if DTYPE == BFLOAT16:
        return (tl.load(ptr, mask=mask, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_float(ptr, x, mask, DTYPE: tl.constexpr):
    """x, float32 numbers of DTYPE, as it is stored."""
    if DTYPE == BFLOAT16:
        tl.store(ptr, (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16), mask=mask)
    else:
        tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def quotient_like(a, b, DTYPE: tl.constexpr):
    return round_like(tl.div_rn(a, b), DTYPE)


@triton.jit
def fake_quantize_kernel(
    x_ptr, global_scale_ptr, out_ptr, total, SPAN: tl.constexpr, K: tl.constexpr, SPANS: tl.constexpr, STEP: tl.constexpr,
    FP4: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Some spans of SPAN contiguous values that share a step each.  STEP names the rule, as in ptq.core.activations."""
    span = tl.program_id(0).to(tl.int64) * SPANS + tl.arange(0, SPANS)
    k = tl.arange(0, K)
    inside = (span < total)[:, None] & (k < SPAN)[None, :]
    place = span[:, None] * SPAN + k[None, :]
    x = load_float(x_ptr + place, inside, DTYPE)
    amax = tl.reduce(tl.abs(x), 1, larger_or_nan)
    finite = amax <= LARGEST
    amax = tl.where(finite, amax, 0.0)
    if STEP == "nvfp4_step":
        global_scale = tl.load(global_scale_ptr) + tl.zeros_like(amax)
        step = tl.div_rn(
            round_e4m3(quotient_like(amax, tl.full(amax.shape, 6.0, tl.float32), DTYPE) * global_scale), global_scale
        )
    elif STEP == "mxfp4_step":
        step = round_like(absmax_scale(amax, "round_exponent"), DTYPE)
    elif STEP == "tensor_step":
        one = tl.full(amax.shape, 1.0, tl.float32)
        step = quotient_like(one, one * tl.load(global_scale_ptr), DTYPE)
    else:
        tl.static_assert(STEP == "token_step")
        step = quotient_like(amax, tl.full(amax.shape, 448.0, tl.float32), DTYPE)
    step = tl.broadcast_to(step[:, None], (SPANS, K))
    units = tl.div_rn(x, tl.where(step > 0, step, 1.0))
    if STEP != "nvfp4_step":  # whose steps are float32
        units = round_like(units, DTYPE)
    units = tl.where(step > 0, units, 0.0)
    q = round_e2m1(tl.clamp(units, -6.0, 6.0)) if FP4 else round_e4m3(units)
    out = tl.where(finite[:, None], round_like(q * step, DTYPE), float("nan"))
    store_float(out_ptr + place, out, inside, DTYPE)


def fake_quantize(x: Tensor, format: ActivationFormat, global_scale: Tensor | None = None) -> Tensor:
    """As ptq.core.activations.fake_quantize, which it is on a CPU."""
    return fake_quantize_fused(x, format, global_scale) if x.is_cuda else reference.fake_quantize(x, format, global_scale)


def fake_quantize_fused(x: Tensor, format: ActivationFormat, global_scale: Tensor | None = None) -> Tensor:
    """The same by the kernel.  Raises ValueError also for a dtype other than float32, bfloat16 and float16."""
    check(x, format, global_scale)
    if x.dtype not in DTYPES:
        raise ValueError(f"inputs of dtype {x.dtype} cannot be rounded; cast them to float32, bfloat16 or float16")
    x = x.contiguous()
    out = torch.empty_like(x)
    span = format.block or x.shape[-1]
    K = triton.next_power_of_2(span)
    spans, total = max(1, VALUES_PER_PROGRAM // K), x.numel() // span
    fake_quantize_kernel[(triton.cdiv(total, spans),)](
        as_stored(x), out if global_scale is None else global_scale, as_stored(out), total,
        SPAN=span, K=K, SPANS=spans, STEP=format.step.__name__, FP4=format.elements is E2M1, DTYPE=str(x.dtype),
    )  # fmt: skip
    return out


def as_stored(x: Tensor) -> Tensor:
    """bfloat16 as int16, for `load_float` and `store_float`."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x
