"""GGUF, which llama.cpp and what builds on it load: one file with tensors, settings and tokenizer.

Linears are stored as ggml's MXFP4, NVFP4 (with `<tensor>.scale` F32 [1] = tensor_scale, a multiplier that llama.cpp applies to
the product) or Q4_0 for INT4; matrices that are not quantized in bfloat16, vectors in float32.  llama.cpp rotates pairs of
neighbouring rows where transformers rotates halves, so in its `llama` architecture the rows of q and k change places.

While layers are written each has its own safetensors file, of ggml's bytes; `finish` makes them one .gguf and removes them.
No other layout is read back from it.

Sources: llama.cpp's conversion/base.py and conversion/llama.py (as of llama-cpp-python 0.3.36), gguf 0.19.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from ptq.core.formats import Format
from ptq.core.packing import Quantized
from ptq.export.files import save_durably
from ptq.export.gguf_blocks import from_blocks, kind_of, to_blocks
from ptq.export.gguf_model import Architecture, add_settings, architecture_of, rope_factors
from ptq.export.gguf_tokenizer import add_tokenizer
from ptq.export.index import header, read_tensors, tensor_files

FILE = "model.gguf"
KINDS = ("MXFP4", "NVFP4", "Q4_0")


class GGUF:
    """The layout (ptq.export.layout) of that name."""

    name = "gguf"

    def pack(self, name: str, quantized: Quantized) -> dict[str, Tensor]:
        """Raises ValueError that names the linear where ggml's type cannot hold it."""
        kind = kind_of(quantized.format)
        tensors = {f"{name}.weight.{kind}": to_blocks(name, quantized).contiguous()}
        return tensors | ({f"{name}.scale": quantized.tensor_scale.reshape(1).clone()} if kind == "NVFP4" else {})

    def unpack(self, name: str, tensors: Mapping[str, Tensor], format: Format) -> Quantized | None:
        blocks = tensors.get(f"{name}.weight.{kind_of(format)}")
        if blocks is None:
            return None
        scale = tensors.get(f"{name}.scale")
        return from_blocks(blocks, format, torch.ones((), device=blocks.device) if scale is None else scale[0])

    def config_files(self, formats: Mapping[str, Format], ignored: tuple[str, ...]) -> dict[str, dict]:
        return {}

    def finish(self, folder: Path) -> None:
        """Makes the folder's safetensors files one .gguf, with what its config.json and tokenizer.json say.

        Raises ValueError where the package gguf is missing or llama.cpp has no word for the model or the tokenizer.
        """
        config = json.loads((folder / "config.json").read_text())
        architecture = architecture_of(config)
        files = tensor_files(folder)
        save_durably(folder / FILE, lambda path: write(path, folder, config, architecture, files))
        for path in set(files.values()):
            path.unlink()


def write(path: Path, folder: Path, config: dict, architecture: Architecture, files: dict[str, Path]) -> None:
    """One tensor at a time is in memory."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture.name)
    add_settings(writer, config, {name.rpartition(".")[2] for name in files if name.endswith(KINDS)})
    add_tokenizer(writer, folder, config["vocab_size"])
    factors = rope_factors(config)
    extra = [] if factors is None else [("rope_freqs.weight", "F32", factors)]
    shapes = {name: about["shape"] for file in set(files.values()) for name, about in header(file).items()}
    names = sorted(files)
    for name in names:
        stored, kind = ggml_name(name, architecture, config["num_hidden_layers"]), ggml_kind(name, len(shapes[name]))
        add_info(writer, stored, kind, shapes[name])
    for stored, kind, tensor in extra:
        add_info(writer, stored, kind, list(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in data(names, files, architecture, config):
        writer.write_tensor_data(tensor.numpy())
    for _, _, tensor in extra:
        writer.write_tensor_data(tensor.numpy())
    writer.close()


def data(names: list[str], files: dict[str, Path], architecture: Architecture, config: dict) -> Iterator[Tensor]:
    """The bytes of each tensor, or its float32."""
    for name in names:
        tensor = read_tensors(files, [name])[name]
        kind = ggml_kind(name, tensor.ndim)
        tensor = tensor.float() if kind == "F32" else tensor
        if architecture.permuted:
            tensor = permuted(name, tensor, config)
        yield tensor.to(torch.bfloat16).contiguous().view(torch.uint8) if kind == "BF16" else tensor.contiguous()


def permuted(name: str, tensor: Tensor, config: dict) -> Tensor:
    """Rows in llama.cpp's order where it is another: within each head row i of one half beside row i of the other."""
    heads = config["num_attention_heads"]
    count = {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}
    part = next((part for part in count if f".self_attn.{part}." in name), None)
    if part is None or name.endswith(".scale"):
        return tensor
    return rearrange(tensor, "(h two i) ... -> (h i two) ...", h=count[part], two=2)


def ggml_kind(name: str, dimensions: int) -> str:
    kind = name.rpartition(".")[2]
    return kind if kind in KINDS else "F32" if dimensions < 2 else "BF16"


def ggml_name(name: str, architecture: Architecture, layers: int) -> str:
    """Raises ValueError where llama.cpp's architecture has no such tensor."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.key], layers)
    module, _, suffix = name.rpartition(".")
    module, suffix = (module.removesuffix(".weight"), "weight") if suffix in KINDS else (module, suffix)
    found = table.get_name(module)
    if found is None:
        raise ValueError(f"{name} has no place in llama.cpp's architecture {architecture.name!r}: choose another layout")
    return f"{found}.{suffix}"


def add_info(writer, name: str, kind: str, shape: list[int]) -> None:
    """Announces a tensor whose bytes follow later; `shape` is of bytes where `kind` is one of KINDS, else of elements."""
    import gguf

    type = gguf.GGMLQuantizationType[kind]
    elements = gguf.quants.quant_shape_from_byte_shape(shape, type) if kind in KINDS else shape
    size = gguf.quants.quant_shape_to_byte_shape(elements, type)
    count = 1
    for length in size:
        count *= length
    writer.add_tensor_info(name, elements, gguf.np.dtype("float32"), count, raw_dtype=type)
