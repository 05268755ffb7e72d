"""A mixture's experts as plain linears.

transformers keeps the experts of a layer in 3-D parameters; checkpoints and serving engines name one 2-D weight an expert
and projection.  Here they are that: modules whose linears can be observed, quantized and stored like any other.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ptq.models.families import Stacking
from ptq.runtime.hooks import routed, together

Combine = Callable[[Tensor, Tensor], Tensor]
"""(gate(x), up(x)) -> what the last projection is given."""


def gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


def clamped_swiglu(alpha: float, limit: float, gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss's.  Source: its published model code."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


class ProductLinear(nn.Linear):
    """x Wᵀ, and then the bias added, where nn.Linear does both at once and rounds once."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Expert(nn.Module):
    """down(combine(gate(x), up(x))), the projections under the names that checkpoints have for them.

    `tensors`: weight, and bias where they have one, of each.
    """

    def __init__(self, names: tuple[str, str, str], tensors: Mapping[str, Tensor], combine: Combine):
        super().__init__()
        self.names, self.combine = names, combine
        for name in names:
            weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
            kind = nn.Linear if bias is None else ProductLinear
            linear = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
            if bias is not None:
                linear.bias = nn.Parameter(bias, requires_grad=bias.requires_grad)
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.inner(x))

    def inner(self, x: Tensor) -> Tensor:
        """What the last projection is given."""
        gate, up, _ = self.names
        return self.combine(getattr(self, gate)(x), getattr(self, up)(x))

    def down(self, inner: Tensor) -> Tensor:
        return getattr(self, self.names[2])(inner)


class LinearExperts(nn.ModuleList):
    """Of fused experts (ptq.models.stacked); the same function to the bit as transformers' loop.

    First all experts' gates and ups run, then all their downs.  `routing`: of the last batch, the tokens each expert was given.
    `watched`: if set, observers see each expert's answer to these tokens instead of those it is given; the output stays what it
    is.
    """

    def __init__(self, fused: nn.Module, stacking: Stacking):
        tensors: dict[str, Tensor] = {}
        for parameter, stacked in fused.named_parameters():
            tensors |= stacking.parts(parameter, stacked)
        each = [dict(zip(tensors, one, strict=True)) for one in zip(*tensors.values(), strict=True)]
        super().__init__(Expert(stacking.names, own, combine_of(fused)) for own in each)
        self.routing: dict[int, Tensor] = {}
        self.watched: Mapping[int, Tensor] | None = None

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """x (t, d); index (t, k): the experts of each token; weights (t, k): what their answers count for."""
        if index.is_meta:  # no routing is known: every expert is given all tokens, as a tensor of its own
            return torch.stack([expert(x.clone()) for expert in self]).sum(0)
        chosen, watched = by_expert(index, len(self)), self.watched
        self.routing = {number: tokens for number, (tokens, _) in chosen.items()}

        def inner(of: Mapping[int, Tensor], *, observed: bool = True) -> dict[int, Tensor]:
            found = {}
            for number, tokens in of.items():
                with routed(tokens, observed=observed):
                    found[number] = self[number].inner(x[tokens])
            return found

        def output() -> Tensor:
            for number, tokens in (watched or {}).items():
                with routed(tokens):
                    self[number].down(asked[number])
            total = torch.zeros_like(x)
            for number, (tokens, place) in chosen.items():
                with routed(tokens, observed=watched is None):
                    answer = self[number].down(given[number]) * weights[tokens, place, None]
                total.index_add_(0, tokens, answer.to(total.dtype))
            return total

        routing = self.routing  # another batch has its own before this one goes on
        asked, given = together(lambda: (inner(watched or {}), inner(routing, observed=watched is None)))
        return together(output)


def combine_of(fused: nn.Module) -> Combine:
    if hasattr(fused, "limit"):
        return partial(clamped_swiglu, fused.alpha, fused.limit)  # type: ignore[arg-type]
    return partial(gated, fused.act_fn)  # type: ignore[arg-type]


def by_expert(index: Tensor, experts: int) -> dict[int, tuple[Tensor, Tensor]]:
    """For each expert that index (t, k) names: the tokens that name it, ascending, and in which place.  Waits for the device
    once."""
    order = index.flatten().argsort(stable=True)
    counts = index.flatten().bincount(minlength=experts).tolist()
    tokens, places = order // index.shape[1], order % index.shape[1]
    parts = zip(tokens.split(counts), places.split(counts), strict=True)
    return {number: part for number, part in enumerate(parts) if len(part[0]) and number < experts}


def linearize(model: nn.Module, stacking: Stacking) -> None:
    """Puts plain linears in the place of every fused experts module of the model."""
    for name in fused_experts(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LinearExperts(model.get_submodule(name), stacking))


def fused_experts(model: nn.Module) -> list[str]:
    """Names of the modules that keep a layer's experts stacked."""
    return [name for name, part in model.named_modules() if isinstance(getattr(part, "gate_up_proj", None), nn.Parameter)]


def experts_of(module: nn.Module) -> list[LinearExperts]:
    return [part for part in module.modules() if isinstance(part, LinearExperts)]
