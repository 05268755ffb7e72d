"""The compressed-tensors layout, which vLLM, SGLang and transformers load.  Written by our own code.

For a linear `<name>` of shape (d_out, d_in):

    nvfp4-pack-quantized   weight_packed U8 (d_out, d_in/2), even column in the low nibble, code = sign << 3 | rank
                           weight_scale F8_E4M3 (d_out, d_in/16);  weight_global_scale F32 [1] = 1 / tensor_scale, a divisor
    mxfp4-pack-quantized   weight_packed as above;  weight_scale U8 (d_out, d_in/32), the exponent plus 127
    pack-quantized         weight_packed I32 (d_out, d_in/8), code = q + 8, first column lowest
                           weight_scale BF16 (d_out, d_in/block);  weight_shape I64 [2]
    float-quantized        weight F8_E4M3 (d_out, d_in);  weight_scale BF16 (d_out, 1)

Where its inputs are quantized (ptq.core.activations), with a global scale: input_global_scale F32 [1], a divisor; of FP8
input_scale F32 [1], its reciprocal.

Sources: the compressed-tensors package 0.20 (its files and its loader were the test).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ptq.core.activations import FP8_INPUT, FP8_TOKEN_INPUT, MXFP4_INPUT, NVFP4_INPUT
from ptq.core.formats import Format, decode_scales, encode_scales
from ptq.core.packing import Quantized, pack, pack_int32, unpack
from ptq.export.index import write_index


def pack_nvfp4(quantized: Quantized) -> dict[str, Tensor]:
    return pack_mxfp4(quantized) | {"weight_global_scale": (1 / quantized.tensor_scale).reshape(1)}


def pack_mxfp4(quantized: Quantized) -> dict[str, Tensor]:
    scales = encode_scales(quantized.scales, quantized.format.grid)
    return {"weight_packed": pack(quantized.codes), "weight_scale": scales}


def pack_fp8(quantized: Quantized) -> dict[str, Tensor]:
    return {
        "weight": quantized.codes.view(torch.float8_e4m3fn),
        "weight_scale": encode_scales(quantized.scales, quantized.format.grid),
    }


def pack_int4(quantized: Quantized) -> dict[str, Tensor]:
    scales = encode_scales(quantized.scales, quantized.format.grid)
    shape = torch.tensor(quantized.codes.shape, dtype=torch.int64)
    return {"weight_packed": pack_int32(quantized.codes), "weight_scale": scales, "weight_shape": shape}


FLOAT = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
SCHEMES = {
    "nvfp4-pack-quantized": (pack_nvfp4, FLOAT | {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}),
    "mxfp4-pack-quantized": (pack_mxfp4, FLOAT | {"strategy": "group", "scale_dtype": "torch.uint8"}),
    "pack-quantized": (pack_int4, FLOAT | {"type": "int", "strategy": "group"}),
    "float-quantized": (pack_fp8, FLOAT | {"num_bits": 8, "strategy": "channel"}),
}
E4M3_SCALES, E8M0_SCALES = (dict.fromkeys(("scale_dtype", "zp_dtype"), f"torch.{name}") for name in ("float8_e4m3fn", "uint8"))
INPUTS = {
    NVFP4_INPUT: FLOAT
    | E4M3_SCALES
    | {"strategy": "tensor_group", "group_size": 16, "dynamic": "local", "observer": "static_minmax"},
    MXFP4_INPUT: FLOAT | E8M0_SCALES | {"strategy": "group", "group_size": 32, "dynamic": True},
    FP8_INPUT: FLOAT | {"num_bits": 8, "strategy": "tensor", "observer": "static_minmax"},
    FP8_TOKEN_INPUT: FLOAT | {"num_bits": 8, "strategy": "token", "dynamic": True},
}
"""What the configuration says of quantized inputs: the presets' own words."""


class CompressedTensors:
    """The layout (ptq.export.layout) of that name."""

    name = "compressed-tensors"

    def pack(self, name: str, quantized: Quantized) -> dict[str, Tensor]:
        tensors = SCHEMES[quantized.format.scheme][0](quantized)
        if quantized.input_scale is not None:
            tensors |= pack_input_scale(quantized.input_scale, quantized.format)
        return {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}

    def unpack(self, name: str, tensors: Mapping[str, Tensor], format: Format) -> Quantized | None:
        """Exact, since a tensor_scale and an input_scale are powers of two."""
        scale, divisor = tensors.get(f"{name}.weight_scale"), tensors.get(f"{name}.weight_global_scale")
        if scale is None:
            return None
        packed = tensors.get(f"{name}.weight_packed")
        codes = tensors[f"{name}.weight"].view(torch.uint8) if packed is None else unpack(packed.view(torch.uint8))
        scales = decode_scales(scale, format.grid) if scale.dtype == torch.uint8 else scale.float()
        tensor_scale = torch.ones((), device=codes.device) if divisor is None else 1 / divisor[0]
        return Quantized(codes, scales, tensor_scale, format, input_scale=unpack_input_scale(name, tensors))

    def config_files(self, formats: Mapping[str, Format], ignored: tuple[str, ...]) -> dict[str, dict]:
        return {"config.json": {"quantization_config": quantization_config(formats, ignored)}}

    def finish(self, folder: Path) -> None:
        write_index(folder)


def pack_input_scale(input_scale: Tensor, format: Format) -> dict[str, Tensor]:
    if format.activation is FP8_INPUT:
        return {"input_scale": (1 / input_scale).reshape(1)}
    return {"input_global_scale": input_scale.reshape(1)}


def unpack_input_scale(name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    divisor, factor = (tensors.get(f"{name}.{key}") for key in ("input_global_scale", "input_scale"))
    if factor is not None:
        return 1 / factor[0]
    return None if divisor is None else divisor[0]


def quantization_config(formats: Mapping[str, Format], ignored: tuple[str, ...]) -> dict:
    """The `quantization_config` of config.json: a group for each format, of all linears where there is one format only.  The head
    is no linear to vLLM, and embeddings are none to anyone, and so are named.

    Keys inside `weights` are checked by the readers; extra ones are refused.
    """
    distinct = list(dict.fromkeys(formats.values()))
    ends = [name for name in formats if name == "lm_head" or name.endswith("embed_tokens")]
    groups = {}
    for number, format in enumerate(distinct):
        named = ["Linear", *ends] if len(distinct) == 1 else [name for name, its in formats.items() if its == format]
        weights = SCHEMES[format.scheme][1] | ({"group_size": format.block} if format.block else {})
        inputs = INPUTS[format.activation] if format.activation else None
        rest = {"input_activations": inputs, "output_activations": None, "format": format.scheme}
        groups[f"group_{number}"] = {"targets": named, "weights": weights, **rest}
    return {
        "quant_method": "compressed-tensors",
        "format": distinct[0].scheme if len(distinct) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in ("lm_head", *ignored) if name not in formats],
        "kv_cache_scheme": None,
    }
