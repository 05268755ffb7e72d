"""The proof that a checkpoint reads back: transformers and compressed-tensors load it, and its logits are compared."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ptq.calibrate.inputs import quantized_inputs
from ptq.export.checkpoint import DTYPE, Formats, ReadBackError, layers_of, restore_layer, shard_name
from ptq.export.layout import Layout
from ptq.models.streaming import StreamingAdapter
from ptq.runtime.adapter import Adapter, Layer


@torch.no_grad()
def verify(
    folder: Path, adapter: Adapter, tokens: Tensor, formats: Formats, layout: Layout, layers: int | None = None
) -> float:
    """Max |logit difference| on `tokens` (n, length) between the checkpoint as the peers load it and the original with the
    stored weights in its linears and their inputs quantized where they are to be, in bfloat16.  `layers`: only so
    many, where the whole model is too large to load.

    `adapter` is of the original.  Raises ReadBackError where a tensor is missing from the checkpoint or
    unexpected in it.
    """
    config = AutoConfig.from_pretrained(folder)
    layers = len(adapter.names) if layers is None else min(layers, len(adapter.names))
    whole = layers == len(adapter.names)
    if not whole:
        config.num_hidden_layers = layers
        config.layer_types = config.layer_types[:layers] if getattr(config, "layer_types", None) else None
    loaded, missing, unexpected = loader(adapter.has_experts)(folder, config, adapter.model.config._attn_implementation)
    problems = {"missing_keys": missing, "unexpected_keys": unexpected if whole else set()}
    found = [f"{kind}: {sorted(names)[:3]}" for kind, names in problems.items() if names]
    if found:
        raise ReadBackError(f"the checkpoint does not read back: {'; '.join(found)}")
    ours = restored_logits(folder, adapter.in_dtype(DTYPE), tokens, formats, layout, layers)
    theirs = loaded.to(ours.device).eval()(tokens.to(ours.device)).logits
    return float((ours.float() - theirs.float()).abs().max())


Loaded = tuple[Any, set[str], set[str]]
"""A model, the names of tensors it needs and the files lack, and of those for which it has no place."""


@torch.no_grad()
def load_checkpoint(folder: Path, *, experts: bool, attention: str, device: str | torch.device, dtype: torch.dtype) -> Any:
    """The model of a checkpoint of ours, its weights unpacked and in `dtype`.

    What is not in bfloat16, scales and buffers, stays as it is: `model.to(bfloat16)` would round rotary frequencies.
    """
    model = loader(experts)(folder, AutoConfig.from_pretrained(folder), attention)[0].eval().to(device)
    model(torch.zeros(1, 2, dtype=torch.int64, device=device))  # weights are unpacked at the first forward
    for parameter in model.parameters():
        if parameter.dtype == DTYPE:
            parameter.data = parameter.data.to(dtype)
    return model


def loader(experts: bool) -> Callable[[Path, PretrainedConfig, str], Loaded]:
    return load_with_experts if experts else load_dense


def load_dense(folder: Path, config: PretrainedConfig, attention: str) -> Loaded:
    """As transformers does."""
    loaded, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair, with output_loading_info
        str(folder), config=config, dtype=DTYPE, attn_implementation=attention, output_loading_info=True
    )
    return loaded, set(info["missing_keys"]) | set(info["mismatched_keys"]), set(info["unexpected_keys"])


def load_with_experts(folder: Path, config: PretrainedConfig, attention: str) -> Loaded:
    """transformers' model with experts as plain linears, which compressed-tensors unpacks.

    transformers 5.23 itself makes one 3-D tensor of a layer's experts and leaves their weight_global_scale out: a mixture
    in NVFP4 or MXFP4 comes out wrong there, without a word.
    """
    from compressed_tensors.compressors import ModelCompressor
    from transformers import CompressedTensorsConfig

    about = CompressedTensorsConfig(**config.__dict__.pop("quantization_config"))
    config._attn_implementation = attention
    tensors = {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    skeleton = StreamingAdapter(config, lambda names: {name: tensors[name] for name in names}, dtype=DTYPE, device="cpu")
    compressor = ModelCompressor.from_compression_config(about)
    quantize_skeleton(skeleton.model, compressor)
    names = skeleton.checkpoint_names()
    needed = {name for name in names if name in tensors}
    skeleton.model.load_state_dict({names[name]: tensors[name] for name in needed}, strict=False, assign=True)
    skeleton.tie()
    return skeleton.model, names.keys() - needed, tensors.keys() - names.keys()


def quantize_skeleton(model: nn.Module, compressor: object) -> None:
    """Gives the model's linears the places for packed weights that the checkpoint's config asks for."""
    from compressed_tensors.quantization import apply_quantization_config

    apply_quantization_config(model, compressor.quantization_config, run_compressed=False, show_progress=False)  # type: ignore[attr-defined]
    compressor.compress_model(model=model)  # type: ignore[attr-defined]


def layers_that_fit(layers: int, parameters: int, device: torch.device) -> int:
    """How many of a model's layers take no more than half of the memory in bfloat16: all, or enough to see that they read back."""
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        room = min(room, torch.cuda.mem_get_info(device)[0])
    size = DTYPE.itemsize * parameters
    return layers if size < room / 2 else min(layers, max(2, int(layers * room / 2 / size)))


def restored_logits(folder: Path, adapter: Adapter, tokens: Tensor, formats: Formats, layout: Layout, layers: int) -> Tensor:
    if adapter.embedding().name in formats:
        (embedding,) = adapter.layers([-1])
        with restored(folder, adapter, embedding, formats, layout):
            hidden = adapter.embed(tokens, embedding)
    else:
        hidden = adapter.embed(tokens)
    for layer in adapter.layers(range(layers)):
        with restored(folder, adapter, layer, formats, layout):
            hidden = adapter.forward(layer, hidden)
    if adapter.head().name not in formats:
        return adapter.logits(hidden)
    (head,) = adapter.layers([len(adapter.names)])
    with restored(folder, adapter, head, formats, layout):
        return adapter.logits(hidden, head)


@contextmanager
def restored(folder: Path, adapter: Adapter, layer: Layer, formats: Formats, layout: Layout) -> Iterator[None]:
    """Inside the block the layer is, and runs on, what the checkpoint says."""
    tensors = load_file(folder / shard_name(layer.index, layers_of(adapter, formats)))
    with quantized_inputs(layer.module, restore_layer(layer, tensors, formats, layout)):
        yield
