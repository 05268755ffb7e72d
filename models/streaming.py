"""A model of which one layer is in memory at a time, read from safetensors files while the one before is worked on."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ptq.models.adapter import ModelAdapter
from ptq.models.families import family_of
from ptq.runtime.adapter import Layer
from ptq.runtime.checks import check_finite
from ptq.runtime.clock import phase
from ptq.runtime.heartbeat import may_wait

Read = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Tensors by their names in the checkpoint; called from another thread than the one that uses them."""


class StreamingAdapter(ModelAdapter):
    """The adapter (ptq.runtime.adapter) of a model whose tensors read(names) gives when they are needed.

    The skeleton's tensors are on the meta device.  What stands before and after the layers is there only while no layer is
    asked for.  Layers are fresh copies each time: what is changed in one is gone with it.
    """

    def __init__(self, config: PretrainedConfig, read: Read, *, dtype: torch.dtype, device: torch.device | str):
        with torch.device("meta"):
            attention = family_of(config, "config.json").attention
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        super().__init__(model.eval().requires_grad_(False))
        self.dtype, self.device, self._read = dtype, torch.device(device), read
        self._loaded: set[str] = set()
        for module in self.model.modules():
            fill_buffers(self.model, module, self.device)

    def embed(self, tokens: Tensor, embedding: Layer | None = None) -> Tensor:
        self._load(but={f"{self._head_name}.weight"} | ({f"{self._embedding_name}.weight"} if embedding else set()))
        return super().embed(tokens, embedding)

    def logits(self, hidden: Tensor, head: Layer | None = None) -> Tensor:
        self._load(but=set() if self.config.tie_word_embeddings else {f"{self._embedding_name}.weight"})
        return super().logits(hidden, head)

    def _after_layers(self, hidden: Tensor) -> Tensor:
        self._load(but={f"{self._embedding_name}.weight", f"{self._head_name}.weight"})
        return super()._after_layers(hidden)

    def untie(self) -> None:
        if self.config.tie_word_embeddings:
            self._unload()
            self._read = renaming(self._read, f"{self._head_name}.weight", f"{self._embedding_name}.weight")
        super().untie()

    def skeleton(self) -> Iterator[Layer]:
        yield from super().layers()

    def layers(self, order: Sequence[int] | None = None) -> Iterator[Layer]:
        waiting = list(range(len(self.names)) if order is None else order)
        with ThreadPoolExecutor(1) as reader:
            following: Future | None = None
            for position, index in enumerate(waiting):
                with phase("load"), may_wait():
                    tensors = (following or self._begin(reader, index)).result()
                    following = self._begin(reader, waiting[position + 1]) if position + 1 < len(waiting) else None
                    self._unload()
                    layer = self._layer(index, copy.deepcopy(self._module(index)))
                    fill(layer.module, self._names_of(index), self._to_device(tensors))
                    del tensors
                yield layer
                del layer

    def ends_names(self) -> list[str]:
        return list(super().ends())

    def ends(self) -> dict[str, Tensor]:
        return {name: tensor.to(self.dtype) for name, tensor in self._read(self.ends_names()).items()}

    def in_dtype(self, dtype: torch.dtype) -> "StreamingAdapter":
        """The same model with parameters of another dtype."""
        return StreamingAdapter(self.config, self._read, dtype=dtype, device=self.device)

    def _begin(self, reader: ThreadPoolExecutor, index: int) -> Future:
        return reader.submit(self._read, list(self._names_of(index)))

    def _names_of(self, index: int) -> dict[str, str]:
        """Of the layer's tensors, by their names in the checkpoint, those in the layer."""
        layer = self._layer(index, self._module(index))
        return {layer.full_name(name): name for name in layer.module.state_dict()}

    def checkpoint_names(self) -> dict[str, str]:
        """Of all tensors, by their names in the checkpoint, those in the model."""
        found = {name: name for name in self.ends_names()}
        for index, prefix in enumerate(self.names):
            found |= {full: f"{prefix}.{name}" for full, name in self._names_of(index).items()}
        return found

    def shapes(self) -> dict[str, torch.Size]:
        """Of all tensors, by their names in the checkpoint."""
        state = self.model.state_dict()
        return {full: state[name].shape for full, name in self.checkpoint_names().items()}

    def _to_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device, self.dtype, non_blocking=True) for name, tensor in tensors.items()}

    def _load(self, *, but: Collection[str]) -> None:
        """Puts the tensors outside of the layers into the skeleton, all `but` these."""
        missing = [name for name in self.ends_names() if name not in but and name not in self._loaded]
        if missing:
            with phase("load"), may_wait():
                fill(self.model, {name: name for name in missing}, self._to_device(self._read(missing)))
            self._loaded |= set(missing)
            self.tie()

    def _unload(self) -> None:
        state = self.model.state_dict()
        self.model.load_state_dict({name: state[name].to("meta") for name in self._loaded}, strict=False, assign=True)
        self._loaded.clear()
        self.tie()

    def tie(self) -> None:
        """Makes the output head's weight the embedding's, where the config says so."""
        if self.config.tie_word_embeddings:
            self.model.get_output_embeddings().weight = self.model.get_input_embeddings().weight  # type: ignore[union-attr]

    def _buffers_on(self) -> torch.device:
        return self.device


def renaming(read: Read, name: str, stored: str) -> Read:
    """Gives the tensor that is `stored` by that name under `name` too."""

    def renamed(names: Sequence[str]) -> Mapping[str, Tensor]:
        found = dict(read([stored if one == name else one for one in names if one != name or stored not in names]))
        if name in names:
            found[name] = found[stored] if stored in names else found.pop(stored)
        return found

    return renamed


def fill(module: nn.Module, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Puts `tensors` in the place of the module's own, whose `names` are given by those of the tensors.

    Raises ValueError for one of another shape, or with a value that is not finite.
    """
    there = module.state_dict()
    for full, tensor in tensors.items():
        if tensor.shape != there[names[full]].shape:
            expected = tuple(there[names[full]].shape)
            raise ValueError(f"{full} has shape {tuple(tensor.shape)} where the config says {expected}")
    module.load_state_dict({names[full]: tensor for full, tensor in tensors.items()}, strict=False, assign=True)
    if not torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).all():
        for full, tensor in tensors.items():
            check_finite(full, tensor)
    module.requires_grad_(False)


def fill_buffers(model: nn.Module, module: nn.Module, device: torch.device) -> None:
    """Gives the module those of its own buffers that no checkpoint holds (rotary frequencies, embedding factors), as the
    model's class initializes them."""
    names = [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]
    if names:
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        model._init_weights(module)  # type: ignore[operator]
        for name in names:
            module._buffers[name] = module._buffers[name].to(device)
