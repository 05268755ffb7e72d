"""A model and its tokenizer from a local folder, a hub id or a GGUF file."""

import io
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ptq.models.adapter import ModelAdapter
from ptq.models.configuration import one_line, remote_code
from ptq.models.families import family_of
from ptq.models.identity import ModelFiles
from ptq.models.location import fetch, locate
from ptq.models.shards import Shards, shard_paths
from ptq.models.stacked import UnstackedShards
from ptq.models.streaming import StreamingAdapter

OF_A_LAYER = re.compile(r"\blayers\.\d+\.")
HARMLESS = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")  # buffers of older releases, made anew


@contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """transformers parses a GGUF file for its config, its tokenizer and its weights, and makes the table of tensor names for every
    module, seconds each: inside the block once each."""
    names = {"GGUFReader": of_plain_array, "get_tensor_name_map": lambda make: make} if find_spec("gguf") else {}
    before = [(name, getattr(import_module("gguf"), name)) for name in names]
    for name, function in before:
        setattr(sys.modules["gguf"], name, cache(names[name](function)))
    try:
        yield
    finally:
        for name, function in before:
            setattr(sys.modules["gguf"], name, function)


def of_plain_array(reader: type) -> type:
    """The reader of a vocabulary makes slices by the million, which of np.memmap takes it thrice as long."""

    class PlainReader(reader):
        def _get(self, *arguments: Any, **options: Any) -> np.ndarray:
            self.data = np.asarray(self.data)
            return super()._get(*arguments, **options)

    return PlainReader


@gguf_parsed_once()
def load_model(
    source: str, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model in eval mode, tokenizer).  dtype None: as stored; for a GGUF file, float32.

    Raises ValueError, before weights are read, for a source that is not there, an unsupported model type, a damaged
    file and a model that is quantized already; and after, as `check_tensors`.  Code that a model brings is never run, and of
    pickles (.bin) only tensors are read.
    """
    where, extra = locate(source)
    where = str(fetch(where)[0])
    config = load_config(source, where, extra)
    tokenizer = load_tokenizer(source, where, extra)
    dtype = dtype or (torch.float32 if "gguf_file" in extra else "auto")  # type: ignore[assignment]
    pickled = Path(where).is_dir() and not extra and not shard_paths(Path(where))
    no_pickles = " (of .bin files only tensors are unpickled; take the model's safetensors files)" if pickled else ""
    with one_line(f"{source} cannot be loaded{no_pickles}"):
        model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair, with output_loading_info
            where,
            config=config,  # read from its place once more, config.json's own attention would win over the one asked for
            dtype=dtype,
            attn_implementation=family_of(config, source).attention,
            output_loading_info=True,
            trust_remote_code=False,
            **weight_arguments(extra),
        )
    check_tensors(source, info["missing_keys"], info["unexpected_keys"])
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def open_model(
    source: str, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[ModelAdapter, PreTrainedTokenizerBase, ModelFiles]:
    """(adapter, tokenizer, the model's files).  Layers are read when they are asked for, if the model is in
    safetensors files; one of another kind (GGUF, .bin) is loaded whole.  dtype and errors as for `load_model`."""
    where, extra = locate(source)
    folder, commit = fetch(where)
    where, paths = str(folder), [] if extra else shard_paths(folder)
    if not paths:
        own = [folder / extra["gguf_file"]] if extra else [*sorted(folder.glob("*.bin")), folder / "config.json"]
        files = ModelFiles.now(own, commit)
        model, tokenizer = load_model(files.place, dtype=dtype, device=device)
        return ModelAdapter(model.requires_grad_(False)), tokenizer, files
    files = ModelFiles.now((*paths, folder / "config.json"), commit)
    config = load_config(source, where, extra)
    tokenizer = load_tokenizer(source, where, extra)
    shards, experts = Shards(folder), family_of(config, source).experts
    if experts and experts.ends:
        shards = UnstackedShards(shards, experts)
    stored = getattr(config, "dtype", None) or shards.dtype
    pin = torch.device(device).type == "cuda"
    with one_line(f"{source} cannot be loaded"):
        adapter = StreamingAdapter(config, lambda names: shards.read(names, pin=pin), dtype=dtype or stored, device=device)
    check_names(adapter, shards)
    if (folder / "generation_config.json").is_file():
        with one_line(f"{folder / 'generation_config.json'} cannot be read"):
            adapter.model.generation_config = GenerationConfig.from_pretrained(where)
    return adapter, tokenizer, files


def check_names(adapter: StreamingAdapter, shards: Shards | UnstackedShards) -> None:
    """Raises ValueError as `check_tensors` for what the model needs and what the files hold, and for a tensor of another shape."""
    shapes, there = adapter.shapes(), shards.tensors.keys()
    check_tensors(str(shards.folder), shapes.keys() - there, there - shapes.keys())
    for name, shape in shapes.items():
        if tuple(shape) != shards.tensors[name].shape:
            found = shards.tensors[name].shape
            raise ValueError(f"{shards.folder}: {name} has shape {found} where the config says {tuple(shape)}")


def check_tensors(source: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises ValueError that names a tensor the model needs and the files lack, or one the files hold of a layer and the
    model has no place for: it would be another model without."""
    missing = sorted(missing)
    if missing:
        raise ValueError(f"{source} cannot be loaded: it lacks {missing[0]} ({len(missing)} tensors in all)")
    left = sorted(name for name in unexpected if OF_A_LAYER.search(name) and not HARMLESS.search(name))
    if left:
        raise ValueError(
            f"{source} cannot be loaded: it holds {left[0]} ({len(left)} such tensors), for which the model that its config "
            "describes has no place; the config disagrees with the weights (attention_bias, mlp_bias, num_hidden_layers, "
            "model_type): correct it, or take the files of one model"
        )


def load_config(source: str, where: str, extra: dict[str, str]) -> PretrainedConfig:
    with one_line(f"{source} cannot be loaded{remote_code(Path(where))}"):
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, **extra)
    family_of(config, source)
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(
            f"{source} is quantized already ({method}); give the original, or where that is it, dequantize it first"
        )
    return config


def load_tokenizer(source: str, where: str, extra: dict[str, str]) -> PreTrainedTokenizerBase:
    with one_line(f"{source} has no tokenizer that loads"):
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **extra)


def weight_arguments(extra: dict[str, str]) -> dict[str, Any]:
    """What from_pretrained needs besides the place: for a GGUF file, the order to unpack it where transformers would not."""
    return {**extra, "quantization_config": GgufConfig(dequantize=True)} if "gguf_file" in extra else dict(extra)


def check_fit(largest: int, model: PreTrainedModel, source: str) -> None:
    """Raises ValueError where the model has no embedding for token id `largest`."""
    embeddings: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment,union-attr]
    if largest >= embeddings:
        raise ValueError(
            f"{source}: its tokenizer gives token {largest}, but the model has {embeddings} embeddings; not its own?"
        )


def quiet() -> AbstractContextManager:
    """Keeps the progress bars that other libraries draw out of a log; a terminal may show them."""
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
