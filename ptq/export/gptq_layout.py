"""GPTQ's layout of symmetric INT4, which vLLM, SGLang, GPTQModel and ExLlama load.

For a linear `<name>` of shape (d_out, d_in):

    qweight  I32 (d_in/8, d_out): eight consecutive inputs a word, the first lowest;  code = q + 8
    qzeros   I32 (d_in/block, d_out/8): eight outputs a word;  version 1 stores zero - 1 = 7, version 2 stores zero = 8
    scales   F16 (d_in/block, d_out), BF16 where float16 cannot hold one of them
    g_idx    I32 (d_in): the block of each input, i // block here (ptq's block order leaves the columns in their places)

The name of a version is its `checkpoint_format`: "gptq" is 1, "gptq_v2" is 2.  Read the other way, all zeros are off by one;
vLLM does not look: for symmetric 4 bits it takes 8.

Our scales are bfloat16.  Float16 holds them exactly from 2^-17 to 65504; only blocks of nothing but zeros are smaller.
vLLM 0.26.0 copies scales into a parameter of the model's dtype and so takes either; the exact bfloat16 come back where the
model runs in bfloat16.  Other readers were not tried with bfloat16 scales.

Sources: AutoGPTQ and GPTQModel 7.7 (their files and loader); vLLM 0.26.0's layers/quantization/auto_gptq.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ptq.core.formats import INT4, Format
from ptq.core.packing import Quantized, pack_int32, unpack
from ptq.export.index import write_index

VERSION_1, VERSION_2 = "gptq", "gptq_v2"
STORED_ZERO = {VERSION_1: 7, VERSION_2: 8}


@dataclass(frozen=True)
class GPTQLayout:
    """The layout (ptq.export.layout).  `version`: what is written as `checkpoint_format`."""

    version: str = VERSION_1

    @property
    def name(self) -> str:
        return self.version.replace("_", "-")

    def pack(self, name: str, quantized: Quantized) -> dict[str, Tensor]:
        """Raises ValueError for other formats than INT4 and for shapes that do not fill words."""
        refuse_others(name, quantized.format)
        d_out, d_in = quantized.codes.shape
        if d_out % 8 or d_in % 8:
            raise ValueError(
                f"{name} has shape ({d_out}, {d_in}); GPTQ's layout packs eight a word both ways: leave it in 16 bits"
            )
        blocks = quantized.scales.shape[1]
        zeros = torch.full((blocks, d_out), STORED_ZERO[self.version], dtype=torch.uint8, device=quantized.codes.device)
        return {
            f"{name}.qweight": pack_int32(quantized.codes).T.contiguous(),
            f"{name}.qzeros": pack_int32(zeros),
            f"{name}.scales": narrow(quantized.scales).T.contiguous(),
            f"{name}.g_idx": block_index(d_in, quantized.format.block).to(quantized.codes.device),
        }

    def unpack(self, name: str, tensors: Mapping[str, Tensor], format: Format) -> Quantized | None:
        """Raises ValueError where zeros are not symmetric, or those of the other version, or inputs are out of order."""
        words = tensors.get(f"{name}.qweight")
        if words is None:
            return None
        self.check_zeros(name, tensors[f"{name}.qzeros"])
        codes = unpack(words.T.contiguous().view(torch.uint8))
        order = tensors.get(f"{name}.g_idx")
        if order is not None and not torch.equal(order.cpu(), block_index(codes.shape[1], format.block)):
            raise ValueError(f"{name} was quantized in activation order (desc_act): no other layout holds its g_idx")
        return Quantized(codes, tensors[f"{name}.scales"].T.float().contiguous(), torch.ones((), device=codes.device), format)

    def check_zeros(self, name: str, words: Tensor) -> None:
        zeros = unpack(words.contiguous().view(torch.uint8)).unique().tolist()
        if zeros != [STORED_ZERO[self.version]]:
            raise ValueError(
                f"{name} has stored zeros {zeros}; symmetric INT4 under checkpoint_format {self.version!r} has only "
                f"{STORED_ZERO[self.version]}: correct checkpoint_format, or quantize symmetrically"
            )

    def config_files(self, formats: Mapping[str, Format], ignored: tuple[str, ...]) -> dict[str, dict]:
        blocks = {format.block for format in formats.values()}
        for name, format in formats.items():
            refuse_others(name, format)
        if len(blocks) > 1:
            raise ValueError(
                f"blocks of {sorted(blocks)} in one model; GPTQ's layout holds one size: choose compressed-tensors"
            )
        config = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": blocks.pop(),
            "sym": True,
            "desc_act": False,
            "checkpoint_format": self.version,
            "pack_dtype": "int32",
            "lm_head": False,
            # GPTQModel's and vLLM's word for what is left alone: a pattern after "-:"
            "dynamic": {f"-:^{re.escape(name)}$": {} for name in ignored if name != "lm_head"},
        }
        return {"config.json": {"quantization_config": config}, "quantize_config.json": config}

    def finish(self, folder: Path) -> None:
        write_index(folder)


def block_index(d_in: int, block: int) -> Tensor:
    """The block of each input (d_in,) int32."""
    return torch.arange(d_in, dtype=torch.int32) // block


def narrow(scales: Tensor) -> Tensor:
    """Scales in float16 where that is exact for all, else in bfloat16 (whose rounding a caller must look for)."""
    half = scales.half()
    return half if torch.equal(half.float(), scales) else scales.to(torch.bfloat16)


def refuse_others(name: str, format: Format) -> None:
    if format.elements is not INT4:
        raise ValueError(f"{name} is {format.name}; GPTQ's layout holds INT4: choose compressed-tensors or modelopt")
