"""A model of which one layer is in memory at a time, read from safetensors files while the one before is worked on."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ptq.models.llama import LlamaAdapter
from ptq.runtime.checks import check_finite
from ptq.runtime.clock import phase

Read = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Tensors by their names in the checkpoint; called from another thread than the one that uses them."""


class StreamingAdapter(LlamaAdapter):
    """The adapter (ptq.runtime.adapter) of a model whose tensors read(names) gives when they are needed.

    The skeleton is on the meta device.  What stands before and after the layers is held only while no layer is asked for.
    Layers are fresh copies each time: what is changed in one is gone with it.
    """

    def __init__(self, config: PretrainedConfig, read: Read, *, dtype: torch.dtype, device: torch.device | str):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        super().__init__(model.eval().requires_grad_(False))
        self.dtype, self.device, self._read = dtype, torch.device(device), read
        self._rotary: Any = type(self._body.rotary_emb)(config).to(self.device)
        self._ends: dict[str, Any] = {}

    def embed(self, tokens: Tensor) -> Tensor:
        self.check_length(tokens)
        return self._end("model.embed_tokens", self._body.embed_tokens)(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        norm = self._end("model.norm", self._body.norm)
        if self.config.tie_word_embeddings:
            return nn.functional.linear(norm(hidden), self._end("model.embed_tokens", self._body.embed_tokens).weight)
        return self._end("lm_head", self._head)(norm(hidden))

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._rotary(hidden, position_ids=positions)

    def layers(self, order: Sequence[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
        waiting = list(range(len(self.names)) if order is None else order)
        with ThreadPoolExecutor(1) as reader:
            following: Future | None = None
            for position, index in enumerate(waiting):
                with phase("load"):
                    tensors = (following or self._begin(reader, index)).result()
                    following = self._begin(reader, waiting[position + 1]) if position + 1 < len(waiting) else None
                    self._ends.clear()
                    layer = self._fill(self._body.layers[index], self.names[index], tensors)
                    del tensors
                yield self.names[index], layer
                del layer

    def ends(self) -> dict[str, Tensor]:
        names = list(super().ends())
        return {name: tensor.to(self.dtype) for name, tensor in self._read(names).items()}

    def in_dtype(self, dtype: torch.dtype) -> "StreamingAdapter":
        """The same model with parameters of another dtype."""
        other = copy.copy(self)
        other.dtype, other._ends = dtype, {}
        return other

    def _begin(self, reader: ThreadPoolExecutor, index: int) -> Future:
        prefix = self.names[index]
        return reader.submit(self._read, [f"{prefix}.{name}" for name in self._body.layers[index].state_dict()])

    def _end(self, name: str, module: nn.Module) -> Any:
        if name not in self._ends:
            with phase("load"):
                tensors = self._read([f"{name}.{key}" for key in module.state_dict()])
                self._ends[name] = self._fill(module, name, tensors)
        return self._ends[name]

    def _fill(self, skeleton: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The module with its tensors.  Raises ValueError for one of another shape, or with a value that is not finite."""
        module = copy.deepcopy(skeleton)
        state: dict[str, Tensor] = {}
        for key, meta in skeleton.state_dict().items():
            tensor = tensors[f"{prefix}.{key}"].to(self.device, self.dtype, non_blocking=True)
            if tensor.shape != meta.shape:
                raise ValueError(f"{prefix}.{key} has shape {tuple(tensor.shape)} where the config says {tuple(meta.shape)}")
            state[key] = tensor
        module.load_state_dict(state, assign=True)
        if not torch.stack([tensor.isfinite().all() for tensor in state.values()]).all():
            for key, tensor in state.items():
                check_finite(f"{prefix}.{key}", tensor)
        return module.requires_grad_(False)
