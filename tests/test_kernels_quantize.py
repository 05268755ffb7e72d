"""Block quantize, Hessians and what the drop-in functions do on a GPU, against plain torch."""

from dataclasses import replace

import pytest
import torch
from einops import rearrange

from ptq.calibrate.hessian import add_blocks
from ptq.core.formats import MXFP4, MXFP4_ROUND, NVFP4, choose_tensor_scale, encode_scales
from ptq.core.packing import pack
from ptq.functional import by_kernels, by_torch
from ptq.kernels.hessian import block_hessian
from ptq.kernels.quantize import quantize_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [NVFP4, replace(NVFP4, block=32), MXFP4, replace(MXFP4, block=16), MXFP4_ROUND]


def reference(W, format, ts):
    """(codes, scales) by ptq.core.formats; NaN counts as 0, infinity as the largest float32."""
    x = W.float().nan_to_num(0.0, 3.4028235e38, -3.4028235e38) / ts
    x = rearrange(x, "r (b k) -> r b k", k=format.block)
    scales = format.absmax(x.abs().amax(-1))
    codes = format.elements.encode(format.elements.round(x / scales[..., None]))
    return rearrange(codes, "r b k -> r (b k)"), scales


def every_bfloat16(shuffled, ordered):
    """All 65,536 patterns, shuffled so that a block holds a mixture of magnitudes, and sorted so that it does not; or one."""
    order = torch.randperm(2**16, generator=torch.Generator().manual_seed(0))
    patterns = torch.cat([order] * shuffled + [torch.arange(2**16)] * ordered)
    W = patterns.to(torch.int32).to(torch.int16).view(torch.bfloat16).view(-1, 1024).to(DEVICE)
    # Triton's interpreter widens bfloat16 subnormals wrongly.
    return W if W.is_cuda else torch.where(W.float().abs() < 2.0**-126, 0, W)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f.name}-{f.block}")
@pytest.mark.parametrize(
    "tensor_scale", [1.0, 2.0**-7, *(pytest.param(s, marks=pytest.mark.gpu) for s in (2.0**-100, 2.0**100, 2.0**-60 / 3))]
)
def test_every_bfloat16(format, tensor_scale):
    if not format.tensor_scale and tensor_scale != 1:
        pytest.skip("a format without tensor_scale")
    ts = torch.tensor(tensor_scale, device=DEVICE)
    both = DEVICE == "cuda" or not format.tensor_scale  # interpreted, NVFP4's kernel takes seconds: one at each tensor_scale
    W = every_bfloat16(both or tensor_scale == 1, both or tensor_scale < 1)
    codes, scales = reference(W, format, ts)
    stored, packed = quantize_blocks(W, format, ts)
    assert torch.equal(stored.view(torch.uint8), encode_scales(scales, format.grid).view(torch.uint8))
    assert torch.equal(pack(codes), packed)
    if W.is_cuda:
        portable = quantize_blocks(W.T.contiguous().T, format, ts)
        assert torch.equal(portable[0].view(torch.uint8), stored.view(torch.uint8)) and torch.equal(portable[1], packed)
    assert torch.equal(quantize_blocks(W, format, ts, scales=scales, out="codes")[1], codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (37, 352)])
def test_odd_shapes_and_strides(shape, dtype):
    W = torch.randn(shape[1], shape[0], device=DEVICE).to(dtype).T
    ts = choose_tensor_scale(W, NVFP4)
    codes, scales = reference(W, NVFP4, ts)
    found, values = quantize_blocks(W, NVFP4, ts, out="values")
    assert torch.equal(found, scales) and torch.equal(NVFP4.elements.encode(values), codes)
    assert torch.equal(quantize_blocks(W[:, :16], NVFP4, ts, out="codes")[1], codes[:, :16])


@pytest.mark.parametrize("tokens,columns,block", [(1, 16, 16), (70, 96, 32), (1100, 80, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_hessian(tokens, columns, block, dtype):
    X = torch.randn(tokens, columns, device=DEVICE).to(dtype)
    expected = torch.zeros(columns // block, block, block, dtype=torch.float64, device=DEVICE)
    add_blocks(expected, X)
    found = block_hessian(X, block)
    scale = expected.diagonal(dim1=1, dim2=2).amax()
    assert (found - expected).abs().max() <= 1e-6 * tokens**0.5 * scale


@pytest.mark.slow
@pytest.mark.parametrize("format", [NVFP4, MXFP4], ids=lambda f: f.name)
@pytest.mark.parametrize("rule", ["absmax", "mse", "local"])
def test_the_drop_in_functions_do_the_same_by_kernels(format, rule):
    W, X = torch.randn(4, 2 * format.block, device=DEVICE), torch.randn(40, 2 * format.block, device=DEVICE)
    W[2, : format.block] = 0
    H = block_hessian(X, format.block) if rule == "local" else None
    for scale in (1.0, 2.0**-9) if format.tensor_scale else (1.0,):
        ts = torch.tensor(scale, device=DEVICE)
        for ours, plain in zip(by_kernels(W, format, rule, H, ts), by_torch(W, format, rule, H, ts), strict=True):
            assert torch.equal(ours, plain)
