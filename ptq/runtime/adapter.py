"""What the runner needs to know of a model; models/ implements it, one file per family of architectures."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn


class Adapter(Protocol):
    """A model as a chain of layers.  Layers come one by one, so an adapter may read each from disk when it is asked for."""

    stages: tuple[tuple[str, ...], ...]
    """Names inside a layer of the linears that read the same input, in the order they run."""

    writers: tuple[str, str]
    """Names inside a layer of the linears whose output is added to the residual stream: the first adds to the layer's input, the
    last makes the layer's output."""

    names: tuple[str, ...]
    """Full names of the layers, first to last."""

    def parameters(self) -> int:
        """How many there are."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (n, length) -> the first layer's input (n, length, d)."""
        ...

    def skeleton(self) -> Iterator[tuple[str, nn.Module]]:
        """(full name, module) of each layer; its tensors may be on the meta device."""
        ...

    def layers(self, order: Sequence[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
        """(full name, module) of the layers numbered by `order`, all of them first to last without.

        Raises ValueError that names a weight that is not finite.
        """
        ...

    def forward(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The layer's output (n, length, d) for input `hidden`."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """The last layer's output (n, length, d) -> logits (n, length, vocabulary)."""
        ...

    def ends(self) -> dict[str, Tensor]:
        """The tensors outside of the layers, by the names they have in a checkpoint."""
        ...
