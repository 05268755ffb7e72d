"""A model of which one layer is in memory at a time, read from safetensors files while the one before is worked on."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ptq.models.adapter import ModelAdapter
from ptq.runtime.adapter import Layer
from ptq.runtime.checks import check_finite
from ptq.runtime.clock import phase

Read = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Tensors by their names in the checkpoint; called from another thread than the one that uses them."""


class StreamingAdapter(ModelAdapter):
    """The adapter (ptq.runtime.adapter) of a model whose tensors read(names) gives when they are needed.

    The skeleton's tensors are on the meta device.  What stands before and after the layers is there only while no layer is
    asked for.  Layers are fresh copies each time: what is changed in one is gone with it.
    """

    def __init__(self, config: PretrainedConfig, read: Read, *, dtype: torch.dtype, device: torch.device | str):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        super().__init__(model.eval().requires_grad_(False))
        self.dtype, self.device, self._read = dtype, torch.device(device), read
        self._loaded: set[str] = set()
        for module in self.model.modules():
            fill_buffers(self.model, module, self.device)

    def embed(self, tokens: Tensor) -> Tensor:
        self._load(name for name in self.ends_names() if not name.startswith("lm_head."))
        return super().embed(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        embedding = self.model.get_input_embeddings()
        unused = set() if self.config.tie_word_embeddings else {f"{self._name_of(embedding)}.weight"}
        self._load(name for name in self.ends_names() if name not in unused)
        return super().logits(hidden)

    def skeleton(self) -> Iterator[Layer]:
        yield from super().layers()

    def layers(self, order: Sequence[int] | None = None) -> Iterator[Layer]:
        waiting = list(range(len(self.names)) if order is None else order)
        with ThreadPoolExecutor(1) as reader:
            following: Future | None = None
            for position, index in enumerate(waiting):
                with phase("load"):
                    tensors = (following or self._begin(reader, index)).result()
                    following = self._begin(reader, waiting[position + 1]) if position + 1 < len(waiting) else None
                    self._unload()
                    layer = Layer(index, self.names[index], copy.deepcopy(self._body.layers[index]))
                    fill(layer.module, layer.name, self._to_device(tensors))
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
        prefix = self.names[index]
        return reader.submit(self._read, [f"{prefix}.{name}" for name in self._body.layers[index].state_dict()])

    def _to_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device, self.dtype, non_blocking=True) for name, tensor in tensors.items()}

    def _load(self, names: Iterable[str]) -> None:
        """Puts tensors outside of the layers into the skeleton."""
        missing = [name for name in names if name not in self._loaded]
        if missing:
            with phase("load"):
                fill(self.model, "", self._to_device(self._read(missing)))
            self._loaded |= set(missing)
            self._tie()

    def _unload(self) -> None:
        state = self.model.state_dict()
        self.model.load_state_dict({name: state[name].to("meta") for name in self._loaded}, strict=False, assign=True)
        self._loaded.clear()
        self._tie()

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.model.get_output_embeddings().weight = self.model.get_input_embeddings().weight  # type: ignore[union-attr]

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, other in self.model.named_modules() if other is module)

    def _buffers_on(self) -> torch.device:
        return self.device


def fill(module: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Puts `tensors` in the place of the module's own.  Raises ValueError for one of another shape, or with a value that is
    not finite."""
    state = {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}
    there = module.state_dict()
    for key, tensor in state.items():
        if tensor.shape != there[key].shape:
            full = f"{prefix}.{key}" if prefix else key
            raise ValueError(f"{full} has shape {tuple(tensor.shape)} where the config says {tuple(there[key].shape)}")
    module.load_state_dict(state, strict=False, assign=True)
    if not torch.stack([tensor.isfinite().all() for tensor in state.values()]).all():
        for name, tensor in tensors.items():
            check_finite(name, tensor)
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
