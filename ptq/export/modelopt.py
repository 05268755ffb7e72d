"""NVIDIA ModelOpt's layout of NVFP4, which vLLM, SGLang and TensorRT-LLM load.

For a linear `<name>` of shape (d_out, d_in):

    weight          U8 (d_out, d_in/2), even column in the low nibble, as in compressed-tensors
    weight_scale    F8_E4M3 (d_out, d_in/16), rows as they are: engines swizzle for themselves
    weight_scale_2  F32 (), = tensor_scale, a multiplier (compressed-tensors stores the divisor)
    input_scale     F32 (), a multiplier, only where activations are quantized too

What is quantized is said twice: in `hf_quant_config.json`, which older readers want, and in config.json's
`quantization_config`.  Weights alone are `W4A16_NVFP4`; vLLM 0.26.0 reads that with its Marlin kernel and needs no
input_scale.  Under `NVFP4` (activations too) vLLM leaves a missing input_scale as uninitialised memory, without a word.

Sources: ModelOpt 0.47's convert_hf_config.py and nvfp4_tensor.py; vLLM 0.26.0's layers/quantization/modelopt.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ptq.core.formats import NVFP4, Format, encode_scales
from ptq.core.packing import Quantized, pack, unpack
from ptq.export.index import write_index

PRODUCER = {"name": "modelopt", "version": "0.47.0"}  # the version whose files these are; readers look at the name


@dataclass(frozen=True)
class ModelOpt:
    """The layout (ptq.export.layout) of that name.  `activations`: whether the linears' inputs are quantized too."""

    activations: bool = False
    name: str = "modelopt"

    def pack(self, name: str, quantized: Quantized) -> dict[str, Tensor]:
        """Raises ValueError for any other format than NVFP4."""
        refuse_others(name, quantized.format)
        scales = encode_scales(quantized.scales, quantized.format.grid)
        return {
            f"{name}.weight": pack(quantized.codes).contiguous(),
            f"{name}.weight_scale": scales.contiguous(),
            f"{name}.weight_scale_2": quantized.tensor_scale.reshape(()).clone(),
        }

    def unpack(self, name: str, tensors: Mapping[str, Tensor], format: Format) -> Quantized | None:
        tensor_scale = tensors.get(f"{name}.weight_scale_2")
        if tensor_scale is None:
            return None
        packed, scales = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        return Quantized(unpack(packed), scales.float(), tensor_scale.reshape(()), format)

    def config_files(self, formats: Mapping[str, Format], ignored: tuple[str, ...]) -> dict[str, dict]:
        for name, format in formats.items():
            refuse_others(name, format)
        algorithm = "NVFP4" if self.activations else "W4A16_NVFP4"
        left_out = list(dict.fromkeys(["lm_head", *ignored]))
        kind = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4.block}
        group = {"targets": ["Linear"], "weights": kind, "input_activations": kind if self.activations else None}
        config = {"quant_method": "modelopt", "quant_algo": algorithm, "producer": PRODUCER, "ignore": left_out}
        about = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": left_out}
        return {
            "config.json": {"quantization_config": config | {"group_size": 16, "config_groups": {"group_0": group}}},
            "hf_quant_config.json": {"producer": PRODUCER, "quantization": about},
        }

    def finish(self, folder: Path) -> None:
        write_index(folder)


def refuse_others(name: str, format: Format) -> None:
    if format.scheme != NVFP4.scheme or format.block != NVFP4.block:
        raise ValueError(
            f"{name} is {format.name} in blocks of {format.block}; ModelOpt's layout holds NVFP4 in blocks of 16: "
            "choose compressed-tensors or gguf"
        )
