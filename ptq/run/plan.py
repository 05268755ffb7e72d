"""Everything about a model that can be known to fail is found here, before any long work."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from ptq.core.formats import Format, get_format
from ptq.run.config import QuantConfig
from ptq.runtime.adapter import Adapter
from ptq.runtime.checks import check_finite

BLOCKS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Plan:
    """`linears`: full name -> shape of each linear to be quantized.  `ignored`: full names of those left alone."""

    linears: dict[str, tuple[int, int]]
    ignored: tuple[str, ...]

    @property
    def weights(self) -> int:
        return sum(d_out * d_in for d_out, d_in in self.linears.values())

    def checkpoint_bytes(self, parameters: int, format: Format) -> int:
        """Size of the tensors of a checkpoint of a model with so many parameters: two bytes each but for the linears'."""
        return 2 * (parameters - self.weights) + int(self.weights * format.bits_per_weight / 8)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """True where `name` equals a pattern or matches a `re:` pattern from its start (the rule of compressed-tensors)."""
    return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns)


def make_plan(adapter: Adapter, config: QuantConfig) -> Plan:
    """The linears to quantize.  Raises ValueError that names the linear and the remedy for: a shape the block does not divide, a
    non-finite weight, a module that is no nn.Linear, an ignore pattern that matches nothing or splits a stage."""
    plan, problems = examine(adapter, config)
    if problems:
        raise ValueError(problems[0])
    return plan


def examine(adapter: Adapter, config: QuantConfig) -> tuple[Plan, list[str]]:
    """The linears to quantize, and everything for which `make_plan` raises."""
    linears: dict[str, tuple[int, int]] = {}
    ignored: list[str] = []
    problems: list[str] = []
    for prefix, layer in adapter.skeleton():
        for stage in adapter.stages:
            names = [f"{prefix}.{name}" for name in stage]
            left_alone = [name for name in names if matches(name, config.ignore)]
            if left_alone and len(left_alone) < len(names):
                problems.append(
                    f"--ignore leaves {left_alone[0]} alone but not {next(n for n in names if n not in left_alone)}; serving "
                    f"engines fuse {', '.join(stage)} and need one scheme for all: ignore all of them or none"
                )
            ignored += left_alone
            for full, name in zip(names, stage, strict=True):
                if not left_alone:
                    module = layer.get_submodule(name)
                    problems += linear_problems(full, module)
                    linears[full] = tuple(module.weight.shape)  # type: ignore[assignment,union-attr]
    for pattern in config.ignore:
        if not any(matches(name, [pattern]) for name in [*ignored, "lm_head"]):  # lm_head is never quantized
            problems.append(f"--ignore {pattern!r} matches no linear; names look like {next(iter(linears), '(none)')}")
    problems += block_problems(linears, config.format)
    if not linears:
        problems.append("--ignore leaves nothing to quantize")
    return Plan(linears, tuple(ignored)), problems


def linear_problems(name: str, module: nn.Module) -> list[str]:
    if not isinstance(module, nn.Linear):
        return [f"{name} is a {type(module).__name__}; only nn.Linear can be quantized"]
    try:
        check_finite(f"{name}.weight", module.weight)
    except ValueError as error:
        return [str(error)]
    return []


def block_problems(linears: dict[str, tuple[int, int]], format: Format) -> list[str]:
    misfits = {name: shape for name, shape in linears.items() if shape[1] % format.block}
    if not misfits:
        return []
    name, (_, d_in) = next(iter(misfits.items()))
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
