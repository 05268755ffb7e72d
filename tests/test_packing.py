import pytest
import torch

from ptq.core.formats import FORMATS, NVFP4, choose_tensor_scale
from ptq.core.packing import pack, pack_int32, unpack
from ptq.methods.rtn import quantize, rtn


def test_every_byte_survives():
    packed = torch.arange(256, dtype=torch.uint8).view(2, 128)
    assert torch.equal(pack(unpack(packed)), packed)


def test_even_columns_are_the_low_nibble():
    assert pack(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]
    assert pack_int32(torch.arange(8, dtype=torch.uint8)[None]).tolist() == [[0x76543210]]


@pytest.mark.parametrize("packer, columns", [(pack, 3), (pack_int32, 12)])
def test_columns_that_do_not_fill_a_word_are_refused(packer, columns):
    with pytest.raises(ValueError, match=rf"\(2, {columns}\)"):
        packer(torch.zeros(2, columns, dtype=torch.uint8))


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda f: f.name)
def test_dequantized_weights_are_exact_in_bfloat16_for_float_formats(format):
    W = torch.randn(8, 256) * 0.02
    Q = rtn(W, None, format, rule="absmax", tensor_scale=choose_tensor_scale(W, format)).quantized.dequantize()
    if format.elements.name == "e2m1":
        assert torch.equal(Q, Q.bfloat16().float())
    assert (W - Q).norm() < 0.15 * W.norm()


def test_rows_of_one_of_a_batch_share_its_tensor_scale():
    W = torch.randn(3, 8, 64) * torch.tensor([1.0, 1e-3, 1e3])[:, None, None]
    scales = torch.stack([choose_tensor_scale(one, NVFP4) for one in W])
    quantized = rtn(W, None, NVFP4, rule="absmax", tensor_scale=scales).quantized
    for number in range(3):
        assert torch.equal(quantized.rows(number, 2, 5).dequantize(), quantized.dequantize()[number, 2:5])


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("rule", ["absmax", "mse"])
def test_any_dimension_can_be_quantized(format, dim, rule):
    """Like quantizing each line along the dimension by itself, under one tensor_scale."""
    shape = [3, 2, 4]
    shape[dim] = 256
    W = torch.randn(shape)
    scale = choose_tensor_scale(W, format)
    Q = quantize(W, format, dim=dim, rule=rule).dequantize()
    assert Q.shape == W.shape
    lines, expected = Q.movedim(dim, -1).flatten(0, 1), W.movedim(dim, -1).flatten(0, 1)
    for line, w in zip(lines, expected, strict=True):
        assert torch.equal(line, quantize(w, format, rule=rule, tensor_scale=scale).dequantize())


def test_shapes_and_values_that_cannot_be_quantized_are_refused():
    with pytest.raises(ValueError, match=r"dimension 0 of \(15, 16\) does not divide into blocks of 16"):
        quantize(torch.zeros(15, 16), NVFP4, dim=0)
    with pytest.raises(ValueError, match="non-finite"):
        quantize(torch.full((16,), float("inf")), NVFP4)
