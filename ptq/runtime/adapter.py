"""What the loop needs to know of a model; ptq.models implements it for transformers' decoders."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Group = tuple[str, ...]
"""Names inside a layer of linears that read the same input, and so share one Hessian."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its number, its full name, and the module, whose tensors may be on the meta device.

    Or the output head, which comes after them: its module is a linear itself, and so the one named "" inside it.  Or, number -1,
    the embeddings before them, of which the same holds but that they are no linear.
    `renamed`: (in the model, in checkpoints) parts of names that differ.
    """

    index: int
    name: str
    module: nn.Module
    renamed: tuple[tuple[str, str], ...] = ()

    def full_name(self, name: str) -> str:
        """What checkpoints and serving engines call that which is called `name` inside the layer."""
        full = f"{self.name}.{name}" if name else self.name
        for ours, theirs in self.renamed:
            full = full.replace(ours, theirs)
        return full

    def linear(self, name: str) -> nn.Linear:
        module = self.module.get_submodule(name)
        assert isinstance(module, nn.Linear), name
        return module

    def weight(self, name: str) -> Tensor:
        """Of the linear `name`, or of the embeddings."""
        return self.module.get_submodule(name).weight  # type: ignore[return-value]


@dataclass(frozen=True)
class Scaling:
    """Channels that may be scaled without changing what the layer does: `maker`, a norm or a linear, makes them, and the linears
    `readers` are all that read them.  `width`: so many channels, a head's, may be read several times in a row; None: each once."""

    maker: str
    readers: Group
    width: int | None

    def outputs(self, layer: Layer) -> int:
        """How many channels the maker makes."""
        return len(next(layer.module.get_submodule(self.maker).parameters()))


@dataclass(frozen=True)
class LayerPlan:
    """How the linears of a layer hang together, by their names inside it.

    `waves`: the groups in the order they run; those of one wave (the experts of a mixture) do not depend on each other.
    `fused`: linears that serving engines fuse, which need one scheme and one tensor_scale; all of a set are in one group.
    `residual`: linears whose output is added to the residual stream, and the factor it is multiplied by first.
    `output`: the one of them whose sum is the layer's output, if any.  `keep`: modules that stay in high precision.
    `experts`: linears that see only the tokens routed to them, about `share` of all.  `scalings`: where channels may be scaled.
    `last`: no layer reads the output, which is as wide as the vocabulary.
    """

    waves: tuple[tuple[Group, ...], ...]
    fused: tuple[tuple[str, ...], ...]
    residual: Mapping[str, float]
    output: str | None
    keep: tuple[str, ...] = ()
    experts: frozenset[str] = frozenset()
    share: float = 1.0
    scalings: tuple[Scaling, ...] = ()
    last: bool = False

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(group for wave in self.waves for group in wave)

    def fused_with(self, name: str) -> tuple[str, ...]:
        """The set that `name` is fused into, itself included; alone where it is in none."""
        return next((names for names in self.fused if name in names), (name,))


class Skeleton(Protocol):
    """What a plan needs to know of a model as a chain of layers."""

    @property
    def model(self) -> Any:
        """transformers' model; its tensors may be on the meta device."""
        ...

    @property
    def has_experts(self) -> bool:
        """Whether layers hold a mixture of experts."""
        ...

    def parameters(self) -> int:
        """How many there are."""
        ...

    def skeleton(self) -> Iterator[Layer]:
        """The layers, whose tensors may be on the meta device."""
        ...

    def head(self) -> Layer:
        """The output head as one more layer, whose tensors may be on the meta device."""
        ...

    def embedding(self) -> Layer:
        """The embeddings as layer -1, whose tensors may be on the meta device."""
        ...

    def plan(self, layer: Layer) -> LayerPlan:
        """How the layer's linears hang together."""
        ...


class Adapter(Skeleton, Protocol):
    """A model as a chain of layers.  Layers come one by one, so an adapter may read each from disk when it is asked for."""

    names: tuple[str, ...]
    """Full names of the layers, first to last."""

    def embed(self, tokens: Tensor, embedding: Layer | None = None) -> Tensor:
        """Token ids (n, length) -> the first layer's input (n, length, d), by `embedding` in the place of the model's own."""
        ...

    def layers(self, order: Sequence[int] | None = None) -> Iterator[Layer]:
        """The layers numbered by `order`, the head being number len(names) and the embeddings -1; without, all layers first to
        last, and neither.

        Raises ValueError that names a weight that is not finite.
        """
        ...

    def forward(self, layer: Layer, hidden: Tensor) -> Tensor:
        """The layer's output (n, length, d) for input `hidden`; of the head, (n, length, vocabulary), with nothing after it."""
        ...

    def watch(self, layer: Layer, tokens: Mapping[int, Tensor] | None) -> None:
        """From now on observers of the layer's experts see their answers to these tokens, by the expert's number, instead of
        those routed to them; None: those again.  What the layer gives does not change."""
        ...

    def routing(self, layer: Layer) -> dict[int, Tensor]:
        """Of the layer's last batch, the tokens routed to each expert; empty where it has none."""
        ...

    def logits(self, hidden: Tensor, head: Layer | None = None) -> Tensor:
        """The last layer's output (n, length, d) -> logits (n, length, vocabulary), by `head` in the place of the model's own."""
        ...

    def untie(self) -> None:
        """Gives the head a weight of its own where it has the embedding's; the config says so from then on."""
        ...

    def ends(self) -> dict[str, Tensor]:
        """The tensors outside of the layers, by the names they have in a checkpoint."""
        ...

    def in_dtype(self, dtype: torch.dtype) -> "Adapter":
        """The same model with parameters of another dtype."""
        ...
