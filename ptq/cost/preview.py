"""What `--plan` tells: the whole run before any weight is read."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ptq.calibrate.activations import default_batch
from ptq.cost.cpu import cpu_seconds
from ptq.cost.estimate import Memory, disk_bytes, memory, seconds
from ptq.cost.shape import Shape, shape_of
from ptq.export.files import existing_parent
from ptq.run.plan import Plan, examine
from ptq.run.recipe import Rules
from ptq.runtime.adapter import Skeleton

if TYPE_CHECKING:
    from ptq.run.allocate import Allocation


@dataclass(frozen=True)
class Preview:
    """`output`: bytes of the checkpoint; `free`: of the disk it goes to.  `ranks`: processes, one a GPU.  `cpu`: seconds on so
    many cores, where the device is the CPU."""

    plan: Plan
    problems: tuple[str, ...]
    shape: Shape
    parameters: int
    output: int
    free: int
    memory: Memory
    seconds: dict[str, float]
    ranks: int
    batch: int
    cpu: tuple[float, int] | None
    allocation: "Allocation | None" = None

    def all_problems(self) -> list[str]:
        """Everything that will not work, and what will work badly."""
        found = list(self.problems)
        needed = self.output + disk_bytes(self.shape)
        if self.free < 1.05 * needed:
            found.append(f"the work needs about {gb(needed)} and the disk has {gb(self.free)} free")
        starved = sorted({d_in for layer, _ in self.shape.layers for _, d_in in layer.matrices if d_in > self.shape.tokens})
        if self.shape.calibrate and starved:
            found.append(
                f"{self.shape.tokens} calibration tokens are fewer than the {', '.join(map(str, starved))} input columns of some "
                "linears: their H is singular but for damping; give more text"
            )
        return found

    def text(self) -> str:
        plan, memory, shape = self.plan, self.memory, self.shape
        kinds: dict[tuple[str, tuple[int, int]], int] = {}
        for name, size in plan.linears.items():
            kind = name.split(".layers.")[-1].split(".", 1)[-1], size
            kinds[kind] = kinds.get(kind, 0) + 1
        lines = [f"  {count:4} × {name:18} {size[0]:6} × {size[1]}" for (name, size), count in kinds.items()]
        whole = 8 * self.output / self.parameters
        place = "host" if memory.kept_on_host else "GPU"
        formats = " and ".join(dict.fromkeys(format.name for format in plan.formats.values()))
        bits = 8 * (self.output - 2 * (self.parameters + plan.untied - plan.weights)) / plan.weights
        lines = [
            f"{len(plan.linears)} linears, {plan.weights / 1e6:.1f} of {self.parameters / 1e6:.1f} million parameters, "
            f"{len(plan.ignored)} linears left alone",
            *lines,
            f"{formats}: {bits:g} bits a weight, {whole:.2f} over the whole checkpoint, {gb(self.output)}",
            f"{shape.sequences} × {shape.length} tokens, {self.batch} sequences at once, {self.ranks} rank{'s'[: self.ranks > 1]}",
            f"on GPUs, a rank takes up to {gb(memory.gpu)} of GPU memory and {gb(memory.host)} of host memory; hidden states "
            f"{gb(memory.hidden)}, kept for the backward pass {gb(memory.kept)} ({place})",
            f"about {sum(self.seconds.values()):.0f} s on H200s, reading the weights from the disk aside: "
            + ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items()),
        ]
        if self.cpu:
            took, cores = self.cpu
            alone = f"{cores} core{'s'[: cores > 1]} to itself"
            lines.append(f"on this CPU about {minutes(took)} with {alone}: rough, expect half to twice that")
        if self.allocation:
            lines.append(f"formats chosen: {self.allocation}")
        if shape.rows:
            lines.append(f"on the disk, until the checkpoint is finished, {gb(disk_bytes(shape))} for row feedback")
        problems = self.all_problems()
        return "\n".join(
            lines + (["nothing that cannot work was found"] if not problems else [f"problem: {p}" for p in problems])
        )


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def make_preview(
    adapter: Skeleton,
    rules: Rules,
    sequences: int,
    length: int,
    importance: str,
    *,
    batch: int | None,
    on_host: bool | None,
    ranks: int,
    output: Path,
    cores: int = 0,
    allocation: "Allocation | None" = None,
) -> Preview:
    """From shapes alone; `adapter` is one of ptq.models.  `cores`: of the CPU, where that is the device.

    Raises ValueError where nothing is left to quantize.
    """
    plan, problems = examine(adapter, rules)
    if not plan.linears:
        raise ValueError(problems[0])
    shape = shape_of(plan, adapter, sequences, length, importance)
    batch = min(sequences, batch or default_batch(shape.head[1], length, torch.device("cuda"), experts=adapter.has_experts))
    parameters, peaks = adapter.parameters(), memory(shape, batch, ranks=ranks, on_host=on_host)
    return Preview(
        plan=plan,
        problems=tuple(problems),
        shape=shape,
        parameters=parameters,
        output=plan.checkpoint_bytes(parameters),
        free=shutil.disk_usage(existing_parent(output)).free,
        memory=peaks,
        seconds=seconds(shape, ranks, batch, peaks.passes_kept),
        ranks=ranks,
        batch=batch,
        cpu=(cpu_seconds(shape, plan, cores), cores) if cores else None,
        allocation=allocation,
    )
