"""The model a run starts from: a path, a hub id, a GGUF file, or one of transformers in memory."""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ptq.models.adapter import ModelAdapter
from ptq.models.families import family_of
from ptq.models.loading import check_tensors, load_model, open_model
from ptq.models.streaming import StreamingAdapter


@dataclass(frozen=True)
class Source:
    """`name`: as people know the model.  `identity`: by part, what tells it from others.  `load`: the whole original in eval
    mode, the caller's to change."""

    name: str
    adapter: ModelAdapter
    tokenizer: PreTrainedTokenizerBase
    identity: Callable[[], dict[str, object]]
    load: Callable[[], PreTrainedModel]


def open_source(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Source:
    """Nothing that is given is changed: of a model in memory too, one layer at a time is copied to `device` and worked on.

    dtype None: as stored.  Raises ValueError as `open_model`; for a model in memory without a tokenizer, or with tensors that
    its config does not describe; and for anything else that is no model.
    """
    if isinstance(model, PreTrainedModel):
        return in_memory(model, tokenizer, dtype or model.dtype, device)
    if not isinstance(model, str | Path):
        raise ValueError(f"model is a {type(model).__name__}; give a folder, a hub id, a .gguf file or a transformers model")
    if tokenizer is not None:
        raise ValueError(
            "a tokenizer is given beside a path; the checkpoint's own is used: leave it out, or load the model too"
        )
    adapter, own, files = open_model(str(model), dtype=dtype, device=device)

    def load() -> PreTrainedModel:
        again, _ = load_model(files.place, dtype=dtype, device=device)
        files.check()  # a checkpoint is never scored against another model
        return again

    return Source(str(model), adapter, own, files.identity, load)


def in_memory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype, device: str) -> Source:
    name = getattr(model, "name_or_path", "") or type(model).__name__
    family_of(model.config, name)
    if getattr(model.config, "quantization_config", None):
        raise ValueError(f"{name} is quantized already; give the original")
    state = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError(
            f"{name} has tensors on the meta device (offloaded); give its folder or hub id instead, which is streamed"
        )
    adapter = StreamingAdapter(
        copy.deepcopy(model.config), lambda names: {n: state[n].detach().clone() for n in names}, dtype=dtype, device=device
    )
    needed = adapter.model.state_dict().keys()
    check_tensors(name, needed - state.keys(), state.keys() - needed)
    if model.generation_config is not None:
        adapter.model.generation_config = copy.deepcopy(model.generation_config)

    def load() -> PreTrainedModel:
        return copy.deepcopy(model).to(device=device, dtype=dtype).eval()  # type: ignore[arg-type,call-overload]

    return Source(name, adapter, tokenizer or tokenizer_of(model), lambda: {"in memory": digest(state)}, load)


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Of the checkpoint that a model in memory was loaded from."""
    name = getattr(model, "name_or_path", "")
    if not name:
        raise ValueError("no tokenizer is given, and the model was not loaded from anywhere; give tokenizer=")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer is given, and none is found at {name!r}: {str(error).splitlines()[0]}") from None


def digest(state: dict[str, Tensor]) -> str:
    """Of all tensors, with their names and dtypes."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
