"""What will be done to a model, and everything about it that can be known to fail, before any long work."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain

from torch import Tensor

from ptq.core.activations import ActivationFormat
from ptq.core.formats import Format, get_format
from ptq.run.recipe import Recipe, Rules, as_rules, matches, recipe_of
from ptq.runtime.adapter import Group, Layer, LayerPlan, Skeleton
from ptq.runtime.checks import check_finite

BLOCKS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Matrix:
    """Linears that are solved as one matrix, one below the other: they read the same input, and engines fuse them.

    `names`: inside the layer.  `rows`: output features of each.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    d_in: int
    recipe: Recipe

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of all."""
        return sum(self.rows), self.d_in


@dataclass(frozen=True)
class GroupPlan:
    """A group of linears with one Hessian, and the matrices that are solved with it."""

    names: Group
    matrices: tuple[Matrix, ...]


Pass = tuple[GroupPlan, ...]
"""What is collected in one pass of the calibration tokens through a layer, and solved after it."""


@dataclass(frozen=True)
class Plan:
    """`linears`: full name -> shape of each linear to be quantized; `recipes`: how.  `ignored`: full names of those left alone.

    `layers`: of each layer, how its linears hang together, and of the head where it is one of them; `passes`: what is done, pass
    by pass.  `untied`: weights of the head where they have been the embedding's too, and are stored besides from now on.
    `first`: number of the first layer, -1 where the embeddings are one (ptq.run.embedding).
    """

    linears: dict[str, tuple[int, int]]
    recipes: dict[str, Recipe]
    ignored: tuple[str, ...]
    layers: tuple[LayerPlan, ...]
    passes: tuple[tuple[Pass, ...], ...]
    untied: int = 0
    first: int = 0

    @property
    def weights(self) -> int:
        return sum(d_out * d_in for d_out, d_in in self.linears.values())

    @property
    def formats(self) -> dict[str, Format]:
        """By full name, with those of the activations."""
        return {name: recipe.stored for name, recipe in self.recipes.items()}

    @property
    def drift(self) -> bool:
        """Whether the original's hidden states are needed beside those of the quantized model."""
        return any(recipe.drift > 0 for recipe in self.recipes.values())

    @property
    def row_feedback(self) -> bool:
        return any(recipe.row_feedback for recipe in self.recipes.values())

    @property
    def activations(self) -> bool:
        """Whether there are linears whose inputs are quantized."""
        return any(recipe.activation for recipe in self.recipes.values())

    def inputs(self, layer: Layer) -> dict[str, ActivationFormat]:
        """By name inside the layer, the format of those linears' inputs that are quantized."""
        names = [name for group in self.layers[layer.index].groups for name in group]
        recipes = {name: self.recipes.get(layer.full_name(name)) for name in names}
        return {name: recipe.activation for name, recipe in recipes.items() if recipe and recipe.activation}

    @property
    def needs_calibration(self) -> str | None:
        """The first linear that does."""
        return next((name for name, recipe in self.recipes.items() if recipe.needs_calibration), None)

    def checkpoint_bytes(self, parameters: int) -> int:
        """Size of the tensors of a checkpoint of a model with so many parameters: two bytes each but for the linears'."""
        bits = {name: d_out * d_in * self.recipes[name].format.bits_per_weight for name, (d_out, d_in) in self.linears.items()}
        return 2 * (parameters + self.untied - self.weights) + int(sum(bits.values()) / 8)


def make_plan(adapter: Skeleton, recipe: Recipe | Rules, ignore: Iterable[str] = ()) -> Plan:
    """What to do by `recipe`, one for all linears or rules (ptq.run.recipe), leaving alone those that `ignore` matches.

    Raises ValueError that names the linear and the remedy for: a shape the block does not divide, a non-finite weight,
    a pattern that matches nothing, fused linears with different recipes.
    """
    plan, problems = examine(adapter, as_rules(recipe, ignore))
    if problems:
        raise ValueError(problems[0])
    return plan


def examine(adapter: Skeleton, rules: Rules) -> tuple[Plan, list[str]]:
    """What to do, and everything for which `make_plan` raises."""
    recipes: dict[str, Recipe] = {}
    linears: dict[str, tuple[int, int]] = {}
    ignored: list[str] = []
    problems: list[str] = []
    layers, passes = [], []
    head, embedding = adapter.head(), adapter.embedding()
    rules = [(embedding.name if pattern == last_name(embedding) else pattern, recipe) for pattern, recipe in rules]
    for_head, for_embedding = ([rule for rule in rules if last_name(end) in rule[0]] for end in (head, embedding))
    more = [head] if recipe_of(head.name, for_head) else []
    if wanted := recipe_of(embedding.name, for_embedding):
        recipes[embedding.name], linears[embedding.name] = of_embedding(wanted), tuple(embedding.weight("").shape)  # type: ignore[assignment]
        problems += embedding_problems(embedding, wanted)
    for layer in chain(adapter.skeleton(), more):
        layers.append(adapter.plan(layer))
        for name in (name for group in layers[-1].groups for name in group):
            full = layer.full_name(name)
            recipe = recipe_of(full, for_head if layers[-1].last else rules)
            if recipe is None:
                ignored.append(full)
            else:
                recipes[full] = recipe
                linears[full] = tuple(layer.linear(name).weight.shape)  # type: ignore[assignment]
                problems += weight_problems(full, layer.weight(name))
        problems += disagreements(layer, layers[-1], recipes) or split_inputs(layer, layers[-1], recipes)
        ignored += [layer.full_name(name) for name in layers[-1].keep]
        passes.append(passes_of(layer, layers[-1], recipes))
    for pattern, recipe in rules:
        if any(matches(name, pattern) for name in [*ignored, *linears]):
            continue
        end = next((end for end in (head, embedding) if matches(end.name, pattern)), None)
        if end is None:
            what = "--ignore" if recipe is None else "rule"
            problems.append(f"{what} {pattern!r} matches no linear; names look like {next(iter(linears), '(none)')}")
        elif recipe is not None and last_name(end) not in pattern:
            problems.append(f"rule {pattern!r} is for {end.name} alone, which only a rule with its name in it is for: write it")
    if head.name in recipes and recipes[head.name].row_feedback:
        problems.append(f"{head.name} has too many rows to feed errors forward over them; give its rule row_feedback: false")
    problems += block_problems(linears, recipes)
    if not linears:
        problems.append("--ignore leaves nothing to quantize")
    untied = head.weight("").numel() if (more or wanted) and adapter.model.config.tie_word_embeddings else 0
    return Plan(linears, recipes, tuple(ignored), tuple(layers), tuple(passes), untied, -1 if wanted else 0), problems


def last_name(end: Layer) -> str:
    """What a rule for the head or the embeddings has in it."""
    return end.name.rpartition(".")[2]


def of_embedding(recipe: Recipe) -> Recipe:
    """What holds of it for embeddings: format and rule."""
    return Recipe(recipe.format, "rtn", recipe.rule if recipe.rule == "absmax" else "mse")


def embedding_problems(embedding: Layer, recipe: Recipe) -> list[str]:
    found = weight_problems(embedding.name, embedding.weight(""))
    if recipe.format.block:
        found.append(
            f"{embedding.name} is to be {recipe.format.name}, and transformers 5.23 loads no packed embeddings (docs/log.md); "
            "give its rule format: fp8"
        )
    if recipe.activation:
        found.append(f"{embedding.name} reads token ids, which are not rounded; leave activations out of its rule")
    if list(embedding.module.buffers()):
        found.append(f"{embedding.name} scales its rows, and transformers 5.23 rounds that factor then; leave out its rule")
    return found


def passes_of(layer: Layer, plan: LayerPlan, recipes: Mapping[str, Recipe]) -> tuple[Pass, ...]:
    """Wave by wave where a linear makes good what those before it lost, as it then is; else all from one pass."""
    waves = [tuple(found for group in wave if (found := plan_group(layer, plan, group, recipes))) for wave in plan.waves]
    waves = [wave for wave in waves if wave]
    if any(matrix.recipe.drift and matrix.recipe.stagewise for wave in waves for group in wave for matrix in group.matrices):
        return tuple(waves)
    return (tuple(group for wave in waves for group in wave),) if waves else ()


def plan_group(layer: Layer, plan: LayerPlan, group: Group, recipes: Mapping[str, Recipe]) -> GroupPlan | None:
    """None where nothing of the group is to be quantized."""
    matrices: dict[tuple[str, ...], Matrix] = {}
    for name in group:
        names = plan.fused_with(name)
        recipe = recipes.get(layer.full_name(name))
        if recipe is not None and names not in matrices:
            linears = [layer.linear(each) for each in names]
            matrices[names] = Matrix(names, tuple(one.out_features for one in linears), linears[0].in_features, recipe)
    return GroupPlan(group, tuple(matrices.values())) if matrices else None


def disagreements(layer: Layer, plan: LayerPlan, recipes: Mapping[str, Recipe]) -> list[str]:
    """Fused linears whose recipes differ."""
    found = []
    for names in plan.fused:
        theirs = [recipes.get(layer.full_name(name)) for name in names]
        other = next((n for n, recipe in enumerate(theirs) if recipe != theirs[0]), None)
        if other is None:
            continue
        engines = f"serving engines fuse {', '.join(names)} and need one scheme for all"
        first, second = layer.full_name(names[0]), layer.full_name(names[other])
        if theirs[0] is None or theirs[other] is None:
            alone, not_alone = (first, second) if theirs[0] is None else (second, first)
            found.append(f"--ignore leaves {alone} alone but not {not_alone}; {engines}: ignore all of them or none")
        else:
            found.append(f"{first} is to be {theirs[0]} and {second} {theirs[other]}; {engines}: give them one recipe")
    return found


def split_inputs(layer: Layer, plan: LayerPlan, recipes: Mapping[str, Recipe]) -> list[str]:
    """Linears that read the same input, of which there is one Hessian, but not with the same activations."""
    found = []
    for group in plan.groups:
        given = {full: recipes[full].activation for full in map(layer.full_name, group) if full in recipes}
        first = next(iter(given), "")
        other = next((full for full in given if given[full] != given[first]), None)
        if other:
            found.append(f"{first} and {other} read the same input and share its Hessian; give them the same activations")
    return found


def weight_problems(name: str, weight: Tensor) -> list[str]:
    try:
        check_finite(f"{name}.weight", weight)
    except ValueError as error:
        return [str(error)]
    return []


def block_problems(linears: Mapping[str, tuple[int, int]], recipes: Mapping[str, Recipe]) -> list[str]:
    misfits = {name: shape for name, shape in linears.items() if shape[1] % recipes[name].format.span(shape[1])}
    if not misfits:
        return []
    name, (_, d_in) = next(iter(misfits.items()))
    format = recipes[name].format
    tails = sorted({name.split(".layers.")[-1].split(".", 1)[-1] for name in misfits})
    ignore = " ".join(f"'re:.*\\.{re.escape(tail)}$'" for tail in tails)
    smaller = [b for b in BLOCKS if b < format.block and all(shape[1] % b == 0 for shape in linears.values())]
    remedy = f"--block {smaller[-1]}, or " if smaller and free_block(format) else ""
    return [
        f"{name} has {d_in} input columns, which blocks of {format.block} do not divide ({len(misfits)} such linears); "
        f"use {remedy}--ignore {ignore}"
    ]


def free_block(format: Format) -> bool:
    """Whether checkpoints of the format may have blocks of another size: the float formats fix theirs."""
    return format.scheme == "pack-quantized"


def named_format(name: str, block: int | None) -> Format:
    """The format of that name, with `block` where it is free.  Raises ValueError as `get_format` and `with_block` do."""
    format = get_format(name)
    return with_block(format, block if free_block(format) else None)


def with_block(format: Format, block: int | None) -> Format:
    """`format` with another block size.  Raises ValueError where checkpoints of that size cannot exist."""
    if block is None or block == format.block:
        return format
    if not free_block(format):
        raise ValueError(f"{format.name} checkpoints have blocks of {format.block}; --block {block} is for int4")
    if block not in BLOCKS:
        raise ValueError(f"--block {block}: int4 checkpoints have blocks of 32, 64, 128 or 256")
    return replace(format, block=block)
