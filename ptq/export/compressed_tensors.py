"""The compressed-tensors layout, which vLLM, SGLang and transformers load.  Written by our own code.

For a linear `<name>` of shape (d_out, d_in), weights only, activations untouched:

    nvfp4-pack-quantized   weight_packed U8 (d_out, d_in/2), even column in the low nibble, code = sign << 3 | rank
                           weight_scale F8_E4M3 (d_out, d_in/16);  weight_global_scale F32 [1] = 1 / tensor_scale, a divisor
    mxfp4-pack-quantized   weight_packed as above;  weight_scale U8 (d_out, d_in/32), the exponent plus 127
    pack-quantized         weight_packed I32 (d_out, d_in/8), code = q + 8, first column lowest
                           weight_scale BF16 (d_out, d_in/block);  weight_shape I64 [2]

Sources: the compressed-tensors package 0.20 (its files and its loader were the test).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ptq.core.formats import Format, decode_scales, encode_scales
from ptq.core.packing import Quantized, pack, pack_int32, unpack
from ptq.export.index import write_index


def pack_nvfp4(quantized: Quantized) -> dict[str, Tensor]:
    return pack_mxfp4(quantized) | {"weight_global_scale": (1 / quantized.tensor_scale).reshape(1)}


def pack_mxfp4(quantized: Quantized) -> dict[str, Tensor]:
    scales = encode_scales(quantized.scales, quantized.format.grid)
    return {"weight_packed": pack(quantized.codes), "weight_scale": scales}


def pack_int4(quantized: Quantized) -> dict[str, Tensor]:
    scales = encode_scales(quantized.scales, quantized.format.grid)
    shape = torch.tensor(quantized.codes.shape, dtype=torch.int64)
    return {"weight_packed": pack_int32(quantized.codes), "weight_scale": scales, "weight_shape": shape}


FLOAT = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
SCHEMES = {
    "nvfp4-pack-quantized": (pack_nvfp4, FLOAT | {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}),
    "mxfp4-pack-quantized": (pack_mxfp4, FLOAT | {"strategy": "group", "scale_dtype": "torch.uint8"}),
    "pack-quantized": (pack_int4, FLOAT | {"type": "int", "strategy": "group"}),
}


class CompressedTensors:
    """The layout (ptq.export.layout) of that name."""

    name = "compressed-tensors"

    def pack(self, name: str, quantized: Quantized) -> dict[str, Tensor]:
        tensors = SCHEMES[quantized.format.scheme][0](quantized)
        return {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}

    def unpack(self, name: str, tensors: Mapping[str, Tensor], format: Format) -> Quantized | None:
        """Exact, since a tensor_scale is a power of two."""
        packed = tensors.get(f"{name}.weight_packed")
        if packed is None:
            return None
        scale, divisor = tensors[f"{name}.weight_scale"], tensors.get(f"{name}.weight_global_scale")
        scales = decode_scales(scale, format.grid) if scale.dtype == torch.uint8 else scale.float()
        tensor_scale = torch.ones((), device=packed.device) if divisor is None else 1 / divisor[0]
        return Quantized(unpack(packed.view(torch.uint8)), scales, tensor_scale, format)

    def config_files(self, formats: Mapping[str, Format], ignored: tuple[str, ...]) -> dict[str, dict]:
        return {"config.json": {"quantization_config": quantization_config(formats, ignored)}}

    def finish(self, folder: Path) -> None:
        write_index(folder)


def quantization_config(formats: Mapping[str, Format], ignored: tuple[str, ...]) -> dict:
    """The `quantization_config` of config.json: a group for each format, of all linears where there is one format only.

    Keys inside `weights` are checked by the readers; extra ones are refused.
    """
    distinct = list(dict.fromkeys(formats.values()))
    groups = {}
    for number, format in enumerate(distinct):
        named = ["Linear"] if len(distinct) == 1 else [name for name, its in formats.items() if its == format]
        weights = SCHEMES[format.scheme][1] | {"group_size": format.block}
        rest = {"input_activations": None, "output_activations": None, "format": format.scheme}
        groups[f"group_{number}"] = {"targets": named, "weights": weights, **rest}
    return {
        "quant_method": "compressed-tensors",
        "format": distinct[0].scheme if len(distinct) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *ignored],
        "kv_cache_scheme": None,
    }
