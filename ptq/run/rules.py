"""From settings and what a caller adds to them to the rules of a run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ptq.core.formats import Format
from ptq.run.plan import named_format
from ptq.run.recipe import Choice, OpenRules, Recipe, settled
from ptq.run.recipe_file import choice_of, read_recipe
from ptq.run.settings import base_recipe
from ptq.settings import Settings

GivenRules = Sequence[tuple[str, Recipe | Choice | str | None]]
"""(pattern, recipe) as ptq.run.recipe.OpenRules; a format's name stands for the settings' recipe in that format, for the head
without row feedback, for the embeddings without activations."""


def file_rules(settings: Settings) -> OpenRules:
    return read_recipe(Path(settings.recipe)) if settings.recipe else []


def all_rules(settings: Settings, of_file: OpenRules, rules: GivenRules) -> OpenRules:
    """The settings' own recipe for every linear, or the rules of their file, then what `rules` say, then what is to be ignored."""
    settings = settings.complete()
    base = base_recipe(settings)
    whole = base if settings.target_bits is None else choice_of(base, settings.target_bits)
    if settings.token_importance == "none" and any(recipe and recipe.row_feedback for _, recipe in settled(of_file)):
        raise ValueError("a rule has row feedback, which needs --token-importance text or sampled")
    formats = {name: named_format(name, settings.block) for _, name in rules if isinstance(name, str)}
    named = [(pattern, in_format(base, formats[how], pattern) if isinstance(how, str) else how) for pattern, how in rules]
    return [*(of_file or [("re:.*", whole)]), *named, *((pattern, None) for pattern in settings.ignore)]


def in_format(base: Recipe, format: Format, pattern: str) -> Recipe:
    """The recipe in another format, as far as that goes: with one scale a row there is no rule of blocks."""
    if pattern.endswith("embed_tokens"):
        base = replace(base, activation=None, smooth=False)
    rule = base.rule if format.block else "mse"
    return replace(base, format=format, rule=rule, row_feedback=base.row_feedback and pattern != "lm_head")


def described(rules: GivenRules) -> list[str]:
    return [f"{pattern}: {how or 'left alone'}" for pattern, how in rules]
