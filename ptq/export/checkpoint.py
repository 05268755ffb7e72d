"""A checkpoint, whatever its layout: tensors, configuration, tokenizer.

One file a layer and one for the tensors outside of the layers, so that a layer can be stored for good as soon as it is finished.
Every tensor that is not quantized keeps its name and is stored in bfloat16, the dtype compressed-tensors decompresses FP4 weights
to: a bfloat16 model's are bit-identical.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptq.calibrate.inputs import Input, inputs_of
from ptq.core.formats import Format
from ptq.core.packing import Quantized
from ptq.export.files import save_tensors, save_text
from ptq.export.layout import Layout
from ptq.runtime.adapter import Adapter, Layer

DTYPE = torch.bfloat16
Formats = Mapping[str, Format]
"""Of each quantized linear, by full name."""


class ReadBackError(RuntimeError):
    """A written checkpoint does not load as the model it was made of."""


def shard_name(index: int, layers: int) -> str:
    """File of layer `index`, which depends on nothing else, or with -1 of the tensors outside of the layers, the embeddings among
    them."""
    return f"model-{index + 2:05}-of-{layers + 1:05}.safetensors"


def layers_of(adapter: Adapter, formats: Formats) -> int:
    """How many the checkpoint has, counting the head where it is quantized."""
    return len(adapter.names) + (adapter.head().name in formats)


def layer_tensors(layer: Layer, quantized: Mapping[str, Quantized], layout: Layout) -> dict[str, Tensor]:
    """What the checkpoint stores of a layer, on its device: the quantized linears packed, all else in bfloat16."""
    tensors: dict[str, Tensor] = {}
    for name, weight in quantized.items():
        tensors |= layout.pack(name, weight)
    for key, tensor in layer.module.state_dict().items():
        full = layer.full_name(key)
        if full.removesuffix(".weight") not in quantized:
            tensors[full] = stored(tensor)
    return tensors


def stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to(DTYPE if tensor.is_floating_point() else tensor.dtype)


def stored_weights(layer: Layer, tensors: Mapping[str, Tensor], formats: Formats, layout: Layout) -> dict[str, Quantized]:
    """By name in the layer, the weights that `layer_tensors` stored as quantized."""
    found: dict[str, Quantized] = {}
    for name, _ in layer.module.named_modules():
        full = layer.full_name(name)
        weight = layout.unpack(full, tensors, formats[full]) if full in formats else None
        if weight is not None:
            found[name] = weight
    return found


def restore_layer(layer: Layer, tensors: Mapping[str, Tensor], formats: Formats, layout: Layout) -> dict[str, Input]:
    """Puts what `layer_tensors` stored back into the layer, where that differs: the quantized weights, and what scaled channels
    changed (ptq.run.smoothing).  Returns the linears' quantized inputs."""
    weights = stored_weights(layer, tensors, formats, layout)
    for name, weight in weights.items():
        held = layer.weight(name)
        held.data.copy_(weight.dequantize())
        if weight.input_scale is not None:
            weights[name] = replace(weight, input_scale=weight.input_scale.to(held.device))
    others = tensors.keys() - {f"{layer.full_name(name)}.weight" for name in weights}
    for key, held in layer.module.state_dict().items():
        full = layer.full_name(key)
        if full in others and not torch.equal(stored(held), tensors[full].to(held.device)):
            held.copy_(tensors[full])
    return inputs_of(weights)


def check_layer(path: Path, layer: Layer, formats: Formats, layout: Layout) -> None:
    """Raises ReadBackError where the file of a layer does not give back, bit for bit, the weights that the layer holds."""
    tensors = load_file(path, device=str(next(layer.module.parameters()).device))
    for name, weight in stored_weights(layer, tensors, formats, layout).items():
        held = layer.weight(name)
        if not torch.equal(weight.dequantize().to(held.dtype), held):
            raise ReadBackError(f"{path} does not read back as written: {layer.full_name(name)} differs; is the disk sound?")


def write_rest(
    folder: Path,
    adapter: Adapter,
    tokenizer: PreTrainedTokenizerBase,
    formats: Formats,
    layout: Layout,
    ignored: tuple[str, ...] = (),
) -> None:
    """All but the layers, whose files are in the folder: tensors outside of them, config, generation config, tokenizer, and
    what the layout adds."""
    model, path = adapter.model, folder / shard_name(-1, layers_of(adapter, formats))
    rest = {name: stored(tensor) for name, tensor in adapter.ends().items() if name.removesuffix(".weight") not in formats}
    save_tensors(path, rest | (load_file(path) if adapter.embedding().name in formats else {}))
    about = {"architectures": [type(model).__name__], "dtype": str(DTYPE).removeprefix("torch.")}
    files = {"config.json": model.config.to_diff_dict() | about}
    for name, content in layout.config_files(formats, ignored).items():
        files[name] = files.get(name, {}) | content
    for name, content in files.items():
        save_text(folder / name, json.dumps(content, indent=2, sort_keys=True) + "\n")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    layout.finish(folder)
