"""A transformers decoder as a chain of layers, by recording.

The model makes its own masks, rotary embeddings and positions: its forward pass is run over layers that only note what
they are given, and a layer is later run by itself with just that.  So an architecture needs no code here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from ptq.models.experts import LinearExperts, experts_of, fused_experts, linearize
from ptq.models.families import HEAD, family_of, layer_plan
from ptq.runtime.adapter import Group, Layer, LayerPlan
from ptq.runtime.hooks import StopForward, observe_inputs

Call = tuple[tuple, dict[str, Any]]
TRACE_LENGTH = 8


class ModelAdapter:
    """The adapter (ptq.runtime.adapter) of a loaded model.  Sequences are of one length, without padding."""

    def __init__(self, model: PreTrainedModel):
        self.family = family_of(model.config, type(model).__name__)
        self.model, self.config = model, model.config
        if self.family.experts:
            linearize(model, self.family.experts)
        elif found := fused_experts(model):
            raise ValueError(f"{found[0]}: of model type {model.config.model_type!r} only dense layers are supported")
        decoder: Any = model.get_decoder()
        self._body = decoder if hasattr(decoder, "layers") else decoder.model  # Llama 4's decoder is the whole
        self.prefix = next(name for name, module in model.named_modules() if module is self._body) + ".layers."
        self.names = tuple(f"{self.prefix}{index}" for index in range(model.config.num_hidden_layers))
        self._head_name = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        self._embedding_name = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
        self._calls: dict[tuple[int, torch.dtype, torch.device], list[Call]] = {}
        self._plans: dict[tuple, LayerPlan] = {}

    @property
    def has_experts(self) -> bool:
        return self.family.experts is not None

    def parameters(self) -> int:
        """How many there are."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def embed(self, tokens: Tensor, embedding: Layer | None = None) -> Tensor:
        first: list[Tensor] = []
        own = self.model.get_input_embeddings()

        def note(index: int, hidden: Tensor, call: Call) -> Tensor:
            first.append(hidden)
            raise StopForward

        self.model.set_input_embeddings(embedding.module if embedding else own)
        try:
            self._run_body(note, input_ids=tokens, attention_mask=no_mask(tokens))
        finally:
            self.model.set_input_embeddings(own)
        return first[0]

    def skeleton(self) -> Iterator[Layer]:
        yield from self.layers()

    def layers(self, order: Sequence[int] | None = None) -> Iterator[Layer]:
        for index in range(len(self.names)) if order is None else order:
            yield self._layer(index, self._module(index))

    def head(self) -> Layer:
        return self._layer(len(self.names), self._module(len(self.names)))

    def embedding(self) -> Layer:
        return self._layer(-1, self._module(-1))

    def _module(self, index: int) -> nn.Module:
        if index < 0:
            return self.model.get_input_embeddings()
        return self._body.layers[index] if index < len(self.names) else self.model.get_output_embeddings()  # type: ignore[return-value]

    def _layer(self, index: int, module: nn.Module) -> Layer:
        return Layer(index, (*self.names, self._head_name, self._embedding_name)[index], module, self.family.renamed)

    def forward(self, layer: Layer, hidden: Tensor) -> Tensor:
        if layer.index == len(self.names):
            return layer.module(self._after_layers(hidden))
        args, kwargs = self._recorded(hidden)[layer.index]
        return first_of(layer.module(hidden, *args, **kwargs))

    def logits(self, hidden: Tensor, head: Layer | None = None) -> Tensor:
        own = self.model.get_output_embeddings()
        self.model.set_output_embeddings(head.module if head else own)
        try:
            with replaced_forward(self._body.layers, lambda _index, _hidden, _call: hidden):
                return self.model(inputs_embeds=hidden, attention_mask=no_mask(hidden), use_cache=False).logits
        finally:
            self.model.set_output_embeddings(own)

    def _after_layers(self, hidden: Tensor) -> Tensor:
        """What the model makes of the last layer's output before it comes to the head."""
        with replaced_forward(self._body.layers, lambda _index, _hidden, _call: hidden):
            return self._body(inputs_embeds=hidden, attention_mask=no_mask(hidden), use_cache=False).last_hidden_state

    def untie(self) -> None:
        if self.config.tie_word_embeddings:
            head: Any = self.model.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            self.config.tie_word_embeddings = False

    def watch(self, layer: Layer, tokens: Mapping[int, Tensor] | None) -> None:
        for experts in experts_of(layer.module):
            experts.watched = tokens

    def routing(self, layer: Layer) -> dict[int, Tensor]:
        return next((experts.routing for experts in experts_of(layer.module)), {})

    def plan(self, layer: Layer) -> LayerPlan:
        """Found by running the layer on the meta device, once for all layers of its structure."""
        if layer.index == len(self.names):
            return HEAD
        modules = dict(layer.module.named_modules())
        keep = tuple(name for name in self.family.keep if name in modules)
        linears = {name: part for name, part in modules.items() if isinstance(part, nn.Linear) and name not in keep}
        structure = tuple((name, linear.weight.shape) for name, linear in linears.items())
        if structure not in self._plans:
            mixture = [name for name, part in modules.items() if isinstance(part, LinearExperts)]
            share = self.config.num_experts_per_tok / len(modules[mixture[0]]) if mixture else 1.0  # type: ignore[arg-type]
            experts = tuple(f"{part}." for part in mixture)
            self._plans[structure] = layer_plan(self.family, self.config, self._trace(layer, linears), keep, experts, share)
        return self._plans[structure]

    def ends(self) -> dict[str, Tensor]:
        tied = {f"{self._head_name}.weight"} if self.config.tie_word_embeddings else set()
        tensors = self.model.state_dict()
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(self.prefix) and name not in tied}

    def in_dtype(self, dtype: torch.dtype) -> "ModelAdapter":
        """The same with parameters of another dtype; the model's own change.  (Buffers do not: rotary frequencies stay float32.)"""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    @torch.no_grad()
    def _recorded(self, hidden: Tensor) -> list[Call]:
        """What the model gives each layer beside hidden states like `hidden`; it does not depend on what is in them."""
        key = hidden.shape[1], hidden.dtype, hidden.device
        if key not in self._calls:
            calls: list[Call] = []

            def note(index: int, hidden: Tensor, call: Call) -> Tensor:
                calls.append(call)
                if index == len(self.names) - 1:
                    raise StopForward
                return hidden

            self._run_body(note, inputs_embeds=hidden.new_zeros((1, *hidden.shape[1:])))
            self._calls[key] = calls
        return self._calls[key]

    def _run_body(self, note: Callable[[int, Tensor, Call], Tensor], **inputs: Tensor) -> None:
        """The decoder's own forward pass over layers that do what `note` does, until it raises StopForward."""
        with replaced_forward(self._body.layers, note), suppress(StopForward):
            self._body(**inputs, use_cache=False)

    @torch.no_grad()
    def _trace(self, layer: Layer, linears: dict[str, nn.Module]) -> list[Group]:
        """The linears that are given the same tensor, group by group in the order they run."""
        names = {linear: name for name, linear in linears.items()}
        inputs: list[Tensor] = []  # held, so that no identity is used twice
        groups: dict[int, list[str]] = {}

        def observe(linear: nn.Module, x: Tensor, _tokens: Tensor | None) -> None:
            inputs.append(x)
            groups.setdefault(id(x), []).append(names[linear])

        weight = next(layer.module.parameters())
        like = torch.zeros(1, TRACE_LENGTH, self.config.hidden_size, dtype=weight.dtype, device=self._buffers_on())
        hidden, (args, kwargs) = tree_map_only(Tensor, lambda t: t.to("meta"), (like, self._recorded(like)[layer.index]))
        tensors = dict(layer.module.named_parameters()) | dict(layer.module.named_buffers())
        on_meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
        observe_inputs(names, observe, None, lambda: functional_call(layer.module, on_meta, (hidden, *args), kwargs))
        return [tuple(group) for group in groups.values()]

    def _buffers_on(self) -> torch.device:
        return next(self.model.parameters()).device


def no_mask(like: Tensor) -> Tensor:
    """Stands for a finished mask where no layer runs: the model makes none then, nor looks at the device for it."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=like.device)


def first_of(output: Any) -> Tensor:
    """A layer's hidden states, also where it returns more."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def replaced_forward(layers: nn.ModuleList, forward: Callable[[int, Tensor, Call], Tensor]) -> Iterator[None]:
    """Inside the block layer number i returns forward(i, hidden, (other arguments, keyword arguments))."""
    for index, layer in enumerate(layers):
        layer.forward = lambda hidden, *args, index=index, **kwargs: forward(index, hidden, (args, kwargs))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
