"""Checkpoints in the compressed-tensors layout, which vLLM, SGLang and transformers load.  Written by our own code.

For a linear `<name>` of shape (d_out, d_in), weights only, activations untouched:

    nvfp4-pack-quantized   weight_packed U8 (d_out, d_in/2), even column in the low nibble, code = sign << 3 | rank
                           weight_scale F8_E4M3 (d_out, d_in/16);  weight_global_scale F32 [1] = 1 / tensor_scale, a divisor
    mxfp4-pack-quantized   weight_packed as above;  weight_scale U8 (d_out, d_in/32), the exponent plus 127
    pack-quantized         weight_packed I32 (d_out, d_in/8), code = q + 8, first column lowest
                           weight_scale BF16 (d_out, d_in/block);  weight_shape I64 [2]

One file a layer and one for the tensors outside of the layers, so that a layer can be stored for good as soon as it is finished.
Every other tensor keeps its name and is stored in bfloat16, the dtype compressed-tensors decompresses FP4 weights to: a bfloat16
model's are bit-identical.  Sources: the compressed-tensors package 0.20 (its files and its loader were the test).
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ptq.core.formats import Format, decode_scales, encode_scales
from ptq.core.packing import Quantized, pack, pack_int32, unpack
from ptq.runtime.adapter import Adapter

DTYPE = torch.bfloat16


class ReadBackError(RuntimeError):
    """A written checkpoint does not load as the model it was made of."""


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


def checkpoint_tensors(name: str, quantized: Quantized) -> dict[str, Tensor]:
    """What the checkpoint stores for the linear `name`, on the weight's device."""
    tensors = SCHEMES[quantized.format.scheme][0](quantized)
    return {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}


def quantization_config(format: Format, ignored: tuple[str, ...]) -> dict:
    """The `quantization_config` of config.json.  Keys inside `weights` are checked by the readers; extra ones are refused."""
    weights = SCHEMES[format.scheme][1] | {"group_size": format.block}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format.scheme,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"format": format.scheme}},
        "ignore": ["lm_head", *ignored],
        "kv_cache_scheme": None,
    }


def check_output(output: Path, needed_bytes: int) -> None:
    """Raises ValueError where `output` exists already, cannot be made, or does not fit on its disk."""
    if output.exists():
        raise ValueError(f"output {output} exists already; remove it or name another folder")
    parent = existing_parent(output)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"output {output} cannot be made: {parent} is not a folder one may write to")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise ValueError(f"output {output} needs about {needed_bytes / 1e9:.2f} GB; {parent} has {free / 1e9:.2f} GB free")


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    return next(p for p in path.absolute().parents if p.exists())


def shard_name(index: int, layers: int) -> str:
    """File of layer `index`, which depends on nothing else, or with -1 of the tensors outside of the layers."""
    return f"model-{index + 2:05}-of-{layers + 1:05}.safetensors"


def layer_tensors(prefix: str, layer: nn.Module, quantized: Mapping[str, Quantized]) -> dict[str, Tensor]:
    """What the checkpoint stores of a layer, on its device: the quantized linears packed, all else in bfloat16."""
    tensors: dict[str, Tensor] = {}
    for name, weight in quantized.items():
        tensors |= checkpoint_tensors(name, weight)
    for key, tensor in layer.state_dict().items():
        if f"{prefix}.{key.removesuffix('.weight')}" not in quantized:
            tensors[f"{prefix}.{key}"] = stored(tensor)
    return tensors


def stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to(DTYPE if tensor.is_floating_point() else tensor.dtype)


def restore_layer(prefix: str, layer: nn.Module, tensors: Mapping[str, Tensor], format: Format) -> None:
    """Puts the weights that `layer_tensors` stored as quantized back into the layer's linears."""
    for name, linear in layer.named_modules():
        if f"{prefix}.{name}.weight_packed" in tensors:
            assert isinstance(linear, nn.Linear), name
            linear.weight.data.copy_(stored_weight(f"{prefix}.{name}", tensors, format).dequantize())


def check_layer(path: Path, prefix: str, layer: nn.Module, format: Format) -> None:
    """Raises ReadBackError where the file of a layer does not give back, bit for bit, the weights that the layer holds."""
    tensors = load_file(path, device=str(next(layer.parameters()).device))
    for name, linear in layer.named_modules():
        full = f"{prefix}.{name}"
        if f"{full}.weight_packed" in tensors:
            assert isinstance(linear, nn.Linear), name
            if not torch.equal(stored_weight(full, tensors, format).dequantize().to(linear.weight.dtype), linear.weight):
                raise ReadBackError(f"{path} does not read back as written: {full} differs; is the disk sound?")


def stored_weight(name: str, tensors: Mapping[str, Tensor], format: Format) -> Quantized:
    """The inverse of `checkpoint_tensors`; exact, since a tensor_scale is a power of two."""
    packed, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
    divisor = tensors.get(f"{name}.weight_global_scale")
    scales = decode_scales(scale, format.grid) if scale.dtype == torch.uint8 else scale.float()
    tensor_scale = torch.ones((), device=packed.device) if divisor is None else 1 / divisor[0]
    return Quantized(unpack(packed.view(torch.uint8)), scales, tensor_scale, format)


def save_durably(path: Path, write: Callable[[Path], object]) -> None:
    """write(temporary path), then the file gets its name once its content is on the disk.  An OSError leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_durably(path, lambda temporary: save_file(on_cpu, temporary, metadata={"format": "pt"}))


def save_text(path: Path, text: str) -> None:
    save_durably(path, lambda temporary: temporary.write_text(text))


def write_rest(
    folder: Path,
    adapter: Adapter,
    tokenizer: PreTrainedTokenizerBase,
    format: Format,
    ignored: tuple[str, ...] = (),
) -> None:
    """All but the layers, whose files are in the folder: tensors outside of them, index, config, generation config, tokenizer.

    `adapter` is one of ptq.models.
    """
    model: PreTrainedModel = adapter.model  # type: ignore[attr-defined]
    layers = len(adapter.names)
    save_tensors(folder / shard_name(-1, layers), {name: stored(tensor) for name, tensor in adapter.ends().items()})
    save_text(folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(make_index(folder, layers), indent=2, sort_keys=True) + "\n")
    config = model.config.to_diff_dict() | {
        "architectures": [type(model).__name__],
        "dtype": str(DTYPE).removeprefix("torch."),
        "quantization_config": quantization_config(format, ignored),
    }
    save_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def make_index(folder: Path, layers: int) -> dict:
    """The index that names each tensor's file."""
    files: dict[str, str] = {}
    size = 0
    for index in range(-1, layers):
        name = shard_name(index, layers)
        with safe_open(folder / name, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), name)
        with (folder / name).open("rb") as raw:  # what follows the header is the tensors
            size += (folder / name).stat().st_size - 8 - int.from_bytes(raw.read(8), "little")
    return {"metadata": {"total_size": size}, "weight_map": files}


@torch.no_grad()
def verify(folder: Path, adapter: Adapter, tokens: Tensor, format: Format, layers: int | None = None) -> float:
    """Max |logit difference| on `tokens` (n, length) between the checkpoint as transformers loads it and the original with the
    stored weights in its linears, in bfloat16.  `layers`: only so many, where the whole model is too large to load.

    `adapter` is one of ptq.models, of the original.  Raises ReadBackError where a tensor is missing from the checkpoint or
    unexpected in it.
    """
    config = AutoConfig.from_pretrained(folder)
    whole = layers is None or layers >= config.num_hidden_layers
    if not whole:
        config.num_hidden_layers = layers
        config.layer_types = config.layer_types[:layers] if getattr(config, "layer_types", None) else None
    loaded, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair, with output_loading_info
        str(folder), config=config, dtype=DTYPE, attn_implementation="sdpa", output_loading_info=True
    )
    kinds = ("missing_keys", "mismatched_keys", *(["unexpected_keys"] if whole else []))
    problems = [f"{kind}: {sorted(info[kind])[:3]}" for kind in kinds if info[kind]]
    if problems:
        raise ReadBackError(f"the checkpoint does not read back: {'; '.join(problems)}")
    ours = restored_logits(folder, adapter.in_dtype(DTYPE), tokens, format, config.num_hidden_layers)  # type: ignore[attr-defined]
    theirs = loaded.to(ours.device).eval()(tokens.to(ours.device)).logits
    return float((ours.float() - theirs.float()).abs().max())


def layers_that_fit(layers: int, parameters: int, device: torch.device) -> int:
    """How many of a model's layers take no more than half of the memory in bfloat16: all, or enough to see that they read back."""
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        room = min(room, torch.cuda.mem_get_info(device)[0])
    size = DTYPE.itemsize * parameters
    return layers if size < room / 2 else min(layers, max(2, int(layers * room / 2 / size)))


def restored_logits(folder: Path, adapter: Adapter, tokens: Tensor, format: Format, layers: int) -> Tensor:
    hidden = adapter.embed(tokens)
    for index, (prefix, layer) in enumerate(adapter.layers(range(layers))):
        restore_layer(prefix, layer, load_file(folder / shard_name(index, len(adapter.names))), format)
        hidden = adapter.forward(layer, hidden)
    return adapter.logits(hidden)
