"""Activation formats: the reference against compressed-tensors, the kernel against the reference."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationStatus, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize

from ptq.core.activations import (
    ACTIVATIONS,
    FP8_INPUT,
    FP8_TOKEN_INPUT,
    MXFP4_INPUT,
    NVFP4_INPUT,
    fake_quantize,
    get_activation,
    global_scale_of,
)
from ptq.kernels.activations import fake_quantize_fused

PRESETS = {"nvfp4": "NVFP4", "mxfp4": "MXFP4", "fp8": "FP8", "fp8-token": "FP8_DYNAMIC"}
FORMATS = pytest.mark.parametrize("format", ACTIVATIONS.values(), ids=list(ACTIVATIONS))
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
PATTERNS = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def scale_for(format, value=16.0):
    return torch.tensor(value) if format.calibrated else None


def like_activations(dtype):
    """(2, 32, 96): magnitudes that differ from token to token as those of real models do, and a token of zeros."""
    x = torch.randn(2, 32, 96) * torch.exp(2 * torch.randn(2, 32, 1))
    x[0, 0] = 0
    return x.to(dtype)


def theirs(x, format, global_scale):
    """What compressed-tensors makes of the input of a linear with its preset of that format."""
    module = torch.nn.Linear(2, 2)
    module.quantization_status = QuantizationStatus.COMPRESSED  # type: ignore[assignment]
    if format is NVFP4_INPUT:
        module.register_buffer("input_global_scale", global_scale.view(1))
    if format is FP8_INPUT:
        module.register_buffer("input_scale", (1 / global_scale).view(1).to(x.dtype))
    args = preset_name_to_scheme(PRESETS[format.name], ["Linear"]).input_activations
    assert args is not None
    return forward_quantize(module, x, "input", args)


@FORMATS
@DTYPES
@pytest.mark.parametrize("global_scale", [1.0, 64.0, 2.0**-5, 2688 / 3.7])
def test_equals_compressed_tensors_bit_for_bit(format, dtype, global_scale):
    if format is FP8_INPUT and global_scale == 2688 / 3.7:
        pytest.skip("its stored scale is rounded to the model's dtype; ours are powers of two")
    x, scale = like_activations(dtype), scale_for(format, global_scale)
    assert torch.equal(fake_quantize(x, format, scale), theirs(x, format, scale))


@FORMATS
def test_equals_compressed_tensors_on_every_bfloat16_of_normal_size(format):
    """Further out compressed-tensors leaves E8M0's range: 2^-127 is a subnormal number."""
    normal = PATTERNS[PATTERNS.isfinite() & (PATTERNS.abs() > 2.0**-100) & (PATTERNS.abs() < 2.0**100)]
    x = normal[torch.randperm(len(normal))][: len(normal) // 96 * 96].view(1, -1, 96)
    assert torch.equal(fake_quantize(x, format, scale_for(format)), theirs(x, format, scale_for(format)))


def test_sixteen_bit_amax_gives_the_block_scale_of_float32():
    """So transformers and vLLM, which divides by 6 in float32, agree: for each of bfloat16's mantissas, 0 of 128 differ."""
    amax = PATTERNS[(PATTERNS >= 1) & (PATTERNS < 2)]
    scale = torch.tensor(64.0)
    assert len(amax) == 128 and torch.equal(NVFP4_INPUT.step(amax, scale), NVFP4_INPUT.step(amax.float(), scale))  # type: ignore[arg-type]


@FORMATS
def test_the_kernel_equals_the_reference_on_every_bfloat16(format, poisoned_empty):
    """NaN and infinity included: what shares its scale with them is NaN."""
    x = PATTERNS[torch.randperm(65536)].view(-1, 32)
    ours, wanted = fake_quantize_fused(x, format, scale_for(format)), fake_quantize(x, format, scale_for(format))
    assert torch.equal(ours.isnan(), wanted.isnan()) and torch.equal(ours.nan_to_num(), wanted.nan_to_num())


@FORMATS
@DTYPES
def test_the_kernel_equals_the_reference(format, dtype, poisoned_empty):
    """Of a width that is no power of two, and a number of blocks that fills no program."""
    x, scale = like_activations(dtype)[:, :21], scale_for(format, 2688 / 3.7)
    assert torch.equal(fake_quantize_fused(x, format, scale), fake_quantize(x, format, scale))


def test_a_value_that_is_not_finite_shows():
    x = torch.ones(2, 64)
    x[0, 3] = torch.inf
    assert fake_quantize(x, NVFP4_INPUT, torch.tensor(1.0)).isnan().sum() == 16
    assert fake_quantize(x, FP8_TOKEN_INPUT).isnan().sum() == 64


@pytest.mark.parametrize("amax", [1e-3, 1.0, 2688.0, 2689.0, 5e4])
def test_the_global_scale_is_the_largest_power_of_two_that_fits(amax):
    scale = float(global_scale_of(torch.tensor(amax), NVFP4_INPUT))
    assert scale * amax <= 2688 < 2 * scale * amax and torch.frexp(torch.tensor(scale)).mantissa == 0.5


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(ValueError, match="activation format nvfp4 needs a global scale"):
        fake_quantize(torch.ones(1, 16), NVFP4_INPUT)
    with pytest.raises(ValueError, match="activation format mxfp4 has no global scale"):
        fake_quantize(torch.ones(1, 32), MXFP4_INPUT, torch.ones(()))
    with pytest.raises(ValueError, match="inputs of 48 features do not divide into blocks of 32"):
        fake_quantize(torch.ones(1, 48), MXFP4_INPUT)
    with pytest.raises(ValueError, match="float64"):
        fake_quantize_fused(torch.ones(1, 32, dtype=torch.float64), MXFP4_INPUT)
    with pytest.raises(ValueError, match="unknown activations 'int8'; there are none, nvfp4, mxfp4, fp8, fp8-token"):
        get_activation("int8")
