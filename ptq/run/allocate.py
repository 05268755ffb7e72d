"""Which format each linear gets when all of them may take so many bits a weight on average (`--target-bits`).

The sum of what the linears cost in KL (ptq.run.sensitivity) is minimized under the bits, exactly, as an integer program
(scipy's HiGHS).  What must have one recipe is one unit: linears that read the same input, so engines' fused ones too, and all
experts of a layer.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from ptq.calibrate.importance import token_importance
from ptq.run.recipe import Choice, OpenRules, Recipe, Rules, bits_of, matches, open_choices, settled
from ptq.run.recipe_file import parse_recipe, recipe_text
from ptq.run.sensitivity import Sensitivity
from ptq.runtime.adapter import Adapter

SEQUENCES = 32
"""As many of the calibration's are measured on."""


@dataclass(frozen=True)
class Unit:
    """Linears that get one recipe.  `names`: full.  `firsts`: of each fused set among them the first.  `rule`: the number of the
    rule that leaves the choice."""

    layer: str
    names: tuple[str, ...]
    firsts: tuple[str, ...]
    weights: int
    rule: int


@dataclass(frozen=True)
class Allocation:
    """`rules` with every choice made.  `bits`: a weight, on average over the linears there was a choice for; `predicted`: their KL,
    and `uniform` what each of the recipes by itself would give: (what, bits, predicted KL), nats a token."""

    rules: Rules
    target: float
    bits: float
    predicted: float
    uniform: tuple[tuple[str, float, float], ...]

    @property
    def about(self) -> dict[str, object]:
        """For a report, in JSON's types."""
        known: dict[str, object] = {
            "target_bits": self.target,
            "bits": self.bits,
            "predicted_kl": self.predicted,
            "uniform": self.uniform,
        }
        return known | {"recipe": recipe_text(self.rules)}

    @staticmethod
    def restored(about: Mapping[str, Any]) -> "Allocation":
        uniform = tuple((str(what), float(bits), float(kl)) for what, bits, kl in about["uniform"])
        rules = settled(parse_recipe(about["recipe"], "of the unfinished run"))
        return Allocation(rules, about["target_bits"], about["bits"], about["predicted_kl"], uniform)

    def __str__(self) -> str:
        lines = [
            f"{self.bits:.3f} bits a weight of {self.target:g} allowed, predicted KL {self.predicted:.5f} nats; all alike:",
            *(f"  {what:24} {bits:6.3f} bits, predicted KL {kl:.5f}" for what, bits, kl in self.uniform),
            "as a recipe:",
            recipe_text(self.rules).rstrip(),
        ]
        return "\n".join(lines)


def allocate(
    adapter: Adapter,
    rules: OpenRules,
    tokens: Tensor,
    batch: int,
    seed: int = 0,
    progress: Callable[[str], object] = lambda layer: None,
) -> Allocation:
    """Makes the choice of `rules` by what is measured on `tokens` (n, length), on the model's device, `batch` sequences at once.

    Raises ValueError as `measure`.
    """
    units, costs = measure(adapter, rules, tokens, batch, seed, progress)
    return assigned(rules, units, costs, open_choices(rules)[0])


def measure(
    adapter: Adapter,
    rules: OpenRules,
    tokens: Tensor,
    batch: int,
    seed: int = 0,
    progress: Callable[[str], object] = lambda layer: None,
) -> tuple[list[Unit], np.ndarray]:
    """What there is a choice for, and (units, recipes) the KL that each recipe is predicted to cost, in nats a token.

    Raises ValueError for several choices, which share one prediction, for several processes, and where none has a linear.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("target bits are measured by one process; run ptq plan in one, and give what it prints as --recipe")
    choices = open_choices(rules)
    if len(choices) != 1:
        raise ValueError(f"{len(choices)} rules have target_bits; one can")
    units = units_of(adapter, rules)
    if not units:
        raise ValueError("the rule with target_bits is the last to match no linear; put it after the others, or leave it out")
    recipes = {name: choices[0].recipes for unit in units for name in unit.names}
    sensitivity = Sensitivity(adapter, recipes)
    token_importance(adapter, tokens.split(batch), seed=seed, watcher=sensitivity, progress=progress)
    energies = [torch.stack([sensitivity.energies[name] for name in unit.firsts]).sum(0).cpu() for unit in units]
    return units, torch.stack(energies).numpy() / (tokens.shape[0] * (tokens.shape[1] - 1))


def assigned(rules: OpenRules, units: Sequence[Unit], costs: np.ndarray, choice: Choice) -> Allocation:
    """The least predicted KL in the choice's bits; costs (units, recipes) as `measure` returns them."""
    chosen = solve(costs, [unit.weights for unit in units], [bits_of(recipe) for recipe in choice.recipes], choice.bits)
    weights = np.array([unit.weights for unit in units]) / sum(unit.weights for unit in units)
    bits = np.array([bits_of(recipe) for recipe in choice.recipes])
    uniform = [(describe(recipe), float(bits[k]), float(costs[:, k].sum())) for k, recipe in enumerate(choice.recipes)]
    by_unit = {unit: choice.recipes[k] for unit, k in zip(units, chosen, strict=True)}
    return Allocation(
        rules=written(rules, by_unit),
        target=choice.bits,
        bits=float(weights @ bits[chosen]),
        predicted=float(costs[np.arange(len(units)), chosen].sum()),
        uniform=tuple(uniform),
    )


def units_of(adapter: Adapter, rules: OpenRules) -> list[Unit]:
    """Of the linears for which the last rule that matches leaves a choice."""
    found: list[Unit] = []
    for layer in adapter.skeleton():
        plan = adapter.plan(layer)
        experts = tuple(name for group in plan.groups for name in group if name in plan.experts)
        others = [group for group in plan.groups if not plan.experts.intersection(group)]
        for group in [*others, experts]:
            numbers = {name: rule_number(layer.full_name(name), rules) for name in group}
            for rule in sorted({n for n in numbers.values() if n is not None and isinstance(rules[n][1], Choice)}):
                names = [name for name in group if numbers[name] == rule]
                firsts = dict.fromkeys(plan.fused_with(name)[0] for name in names)
                size = sum(layer.linear(name).weight.numel() for name in names)
                full = tuple(map(layer.full_name, names))
                found.append(Unit(layer.name, full, tuple(map(layer.full_name, firsts)), size, rule))
    return found


def rule_number(name: str, rules: OpenRules) -> int | None:
    return next((n for n in reversed(range(len(rules))) if matches(name, rules[n][0])), None)


def solve(costs: np.ndarray, weights: Sequence[int], bits: Sequence[float], target: float) -> np.ndarray:
    """For each unit the number of its recipe: least Σ cost under Σ weights · bits ≤ target · Σ weights.

    costs (units, recipes) of any scale.  An optimum to within 1e-4 of it.
    """
    units, recipes = costs.shape
    takes = np.outer(np.asarray(weights) / sum(weights), bits).ravel()
    one_each = LinearConstraint(np.kron(np.eye(units), np.ones(recipes)), 1, 1)
    in_reach = LinearConstraint(takes[None], -np.inf, target * (1 + 1e-9))
    scale = costs.max() or 1.0
    found = milp(
        costs.ravel() / scale, constraints=[one_each, in_reach], integrality=np.ones(costs.size), bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4},
    )  # fmt: skip
    assert found.x is not None, found.message  # all units in the smallest format are a solution
    return found.x.reshape(units, recipes).argmax(1)


def written(rules: OpenRules, chosen: Mapping[Unit, Recipe | None]) -> Rules:
    """The rules with those of the units, in few patterns, in the place of the choice; first what most weights get."""
    number = next(iter(chosen)).rule
    total: dict[Recipe | None, int] = {}
    layers: dict[tuple[Recipe | None, str], list[str]] = {}
    for unit, recipe in chosen.items():
        total[recipe] = total.get(recipe, 0) + unit.weights
        for kind in dict.fromkeys(kind_of(name, unit.layer) for name in unit.names):
            layers.setdefault((recipe, kind), []).append(unit.layer)
    usual = max(total, key=lambda recipe: total[recipe])
    kinds: dict[tuple[Recipe | None, tuple[str, ...]], list[str]] = {}
    for (recipe, kind), names in layers.items():
        kinds.setdefault((recipe, tuple(names)), []).append(kind)
    exceptions = [(pattern(names, found), recipe) for (recipe, names), found in kinds.items() if recipe != usual]
    return [*settled(rules[:number]), (rules[number][0], usual), *exceptions, *settled(rules[number + 1 :])]


def kind_of(name: str, layer: str) -> str:
    """A pattern for the part of a linear's name after its layer's, for all experts the same."""
    return re.sub(r"(?<=\.)\d+(?=\\?\.)", r"\\d+", re.escape(name.removeprefix(f"{layer}.")))


def pattern(layers: Sequence[str], kinds: Sequence[str]) -> str:
    stem = layers[0].rpartition(".")[0]
    assert all(name.rpartition(".")[0] == stem for name in layers)
    return f"re:{re.escape(stem)}\\.({'|'.join(name.rpartition('.')[2] for name in layers)})\\.({'|'.join(kinds)})$"


def describe(recipe: Recipe | None) -> str:
    if recipe is None:
        return "kept in bfloat16"
    return f"{recipe.format.name} on {recipe.activation.name}" if recipe.activation else recipe.format.name
