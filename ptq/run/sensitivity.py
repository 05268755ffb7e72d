"""What each way to quantize a linear would cost in KL, to second order, from one backward pass over a few sequences.

A change δy_t of a linear's output at token t changes the log likelihood of the labels by d_t = ⟨g_t, δy_t⟩, g = ∂L/∂y.  For labels
that are drawn from the model itself, half the mean of d² is the KL that the change causes, to second order: the Hessian of KL is
the Fisher information.  δy is that of the quantized weight, found as the recipe says, on inputs rounded as it says.  Left out is
how changes at different tokens, and of different linears, add to each other.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq.calibrate.activations import Activations, each_batch
from ptq.calibrate.hessian import Hessian
from ptq.calibrate.importance import Gradient
from ptq.core.activations import ActivationFormat, global_scale_of
from ptq.core.formats import choose_tensor_scale
from ptq.kernels.activations import fake_quantize
from ptq.methods import METHODS
from ptq.methods.rtn import rtn
from ptq.run.recipe import Recipe
from ptq.runtime.adapter import Adapter, Layer, LayerPlan
from ptq.runtime.hooks import observe_inputs

Recipes = tuple[Recipe | None, ...]


class Sensitivity:
    """Watches a backward pass (ptq.calibrate.importance.token_importance) whose labels are sampled.

    `recipes`: by full name, the ways to quantize a linear, those of fused linears the same.  `energies` afterwards: by the full
    name of the first of each fused set, ½ Σ d² for each recipe (recipes,) float64; 0 for one that keeps the linear.
    """

    def __init__(self, adapter: Adapter, recipes: Mapping[str, Recipes]):
        self.adapter, self.recipes = adapter, recipes
        self.energies: dict[str, Tensor] = {}
        self._first: dict[nn.Module, str] = {}
        self._changes: dict[nn.Module, list[Tensor | None]] = {}
        self._largest: dict[nn.Module, Tensor] = {}

    def begin(self, part: Sequence[Layer], inputs: Activations) -> None:
        """Quantizes these layers' linears in every way, on H of their inputs as they are."""
        self._first, self._changes, self._largest = {}, {}, {}
        hidden = inputs.copy()
        for layer in part:
            plan = self.adapter.plan(layer)
            hessians = self._collect(layer, plan, hidden)
            for group, hessian in hessians.items():
                H = hessian.mean() if hessian.tokens else None
                for names in dict.fromkeys(map(plan.fused_with, group)):
                    if layer.full_name(names[0]) in self.recipes:
                        self._quantize(layer, names, H)

    def _collect(self, layer: Layer, plan: LayerPlan, hidden: Activations) -> dict[tuple[str, ...], Hessian]:
        """Turns the layer's input into its output; H by group, and the largest input of each."""
        groups = {layer.linear(group[0]): group for group in plan.groups}
        hessians = {group: Hessian(linear.in_features, device=linear.weight.device) for linear, group in groups.items()}

        def observe(linear: nn.Module, x: Tensor, _tokens: Tensor | None) -> None:
            group = groups[linear]  # type: ignore[index]
            hessians[group].add(x)
            amax = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
            for name in group:
                other = layer.linear(name)
                self._largest[other] = torch.maximum(self._largest[other], amax) if other in self._largest else amax

        def work(rows: slice) -> None:
            output = observe_inputs(groups, observe, None, lambda: self.adapter.forward(layer, hidden.load(rows)))
            assert output is not None
            hidden.store(rows, output)

        each_batch(hidden, "sensitivity", work)
        return hessians

    def _quantize(self, layer: Layer, names: tuple[str, ...], H: Tensor | None) -> None:
        linears = [layer.linear(name) for name in names]
        W = torch.cat([linear.weight.float() for linear in linears])
        first = layer.full_name(names[0])
        for recipe in self.recipes[first]:
            change = None if recipe is None else quantized(W, H, recipe) - W
            sizes = [linear.out_features for linear in linears]
            parts = [None] * len(linears) if change is None else change.to(linears[0].weight.dtype).split(sizes)
            for linear, own in zip(linears, parts, strict=True):
                self._changes.setdefault(linear, []).append(own)
        self._first |= dict.fromkeys(linears, first)
        self.energies[first] = torch.zeros(len(self.recipes[first]), dtype=torch.float64, device=W.device)

    def see(self, gradients: Sequence[Gradient]) -> None:
        """Adds a batch's ½ Σ d², d over linears that are fused together."""
        found: dict[str, list[Tensor | None]] = {}
        for linear, x, g in gradients:
            if linear in self._first:
                first = self._first[linear]
                before = found.setdefault(first, [None] * len(self.recipes[first]))
                found[first] = [add(d, own) for d, own in zip(before, self._effects(linear, x, g), strict=True)]
        for first, effects in found.items():
            for k, d in enumerate(effects):
                if d is not None:
                    self.energies[first][k] += d.double().square().sum() / 2

    def _effects(self, linear: nn.Linear, x: Tensor, g: Tensor) -> list[Tensor | None]:
        """For each recipe d (...), float32."""
        rounded = {}
        effects: list[Tensor | None] = []
        for recipe, change in zip(self.recipes[self._first[linear]], self._changes[linear], strict=True):
            if recipe is None or change is None:
                effects.append(None)
                continue
            if recipe.activation not in rounded:
                rounded[recipe.activation] = self._rounded(linear, x, recipe.activation)
            inputs, more = rounded[recipe.activation]
            effects.append(inner(F.linear(inputs, change), g) + (0.0 if more is None else inner(more, g)))
        return effects

    def _rounded(self, linear: nn.Linear, x: Tensor, activation: ActivationFormat | None) -> tuple[Tensor, Tensor | None]:
        """(x̂, W (x̂ - x)); (x, None) where inputs stay as they are."""
        if activation is None:
            return x, None
        scale = global_scale_of(self._largest[linear], activation) if activation.calibrated else None
        inputs = fake_quantize(x, activation, scale)
        return inputs, F.linear(inputs - x, linear.weight)


def quantized(W: Tensor, H: Tensor | None, recipe: Recipe) -> Tensor:
    """W (d_out, d_in) as the recipe's method rounds it, drift and row feedback aside; to nearest where no token came (H None)."""
    tensor_scale = choose_tensor_scale(W, recipe.format)
    if H is None:
        return rtn(W, None, recipe.format, tensor_scale=tensor_scale).quantized.dequantize()
    how = METHODS[recipe.method]
    solution = how(W, H, format=recipe.format, rule=recipe.rule, tensor_scale=tensor_scale, damp=recipe.damp)
    return solution.quantized.dequantize()


def inner(y: Tensor, g: Tensor) -> Tensor:
    return (y.float() * g.float()).sum(-1)


def add(before: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if before is None or more is None else before + more
