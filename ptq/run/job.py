"""From an opened model to its finished layers: weigh the tokens, quantize, write; as far as an earlier run left it to be done."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.calibrate.importance import TokenWeights, token_weights
from ptq.run.config import QuantConfig
from ptq.run.loop import quantize_layers
from ptq.run.plan import Plan
from ptq.run.resume import Unfinished
from ptq.runtime.adapter import Adapter
from ptq.runtime.clock import phase
from ptq.runtime.distributed import Team


@dataclass(frozen=True)
class Job:
    """`calibration` (sequences, length): of all ranks, on the CPU.  `weighing`: none, text or sampled (see importance), `seed`
    draws its labels.  `batch`: sequences that run at once.  `on_host`: whether hidden states are in host memory; None, by size.
    `held_out` (n, length): sequences to measure every linear on, on all ranks the same."""

    adapter: Adapter
    config: QuantConfig
    plan: Plan
    calibration: Tensor
    device: torch.device
    weighing: str = "sampled"
    seed: int = 0
    batch: int = 8
    on_host: bool | None = None
    held_out: Tensor | None = None


def do_layers(
    job: Job, unfinished: Unfinished, team: Team, progress: Callable[[str, str], None] = lambda what, name: None
) -> None:
    """All layers are in the unfinished folder afterwards.  progress("weigh" | "quantize", layer) as each is done.

    Raises ValueError for row feedback on several ranks that are to be deterministic: G is added up rank by rank.
    """
    if job.config.row_feedback and team.deterministic and team.size > 1:
        raise ValueError("--row-feedback is not --deterministic on several ranks; use one rank, or leave one of the two out")
    share = team.share(len(job.calibration))
    batches = job.calibration[share].to(job.device).split(job.batch)
    weights, curvature = weigh(job, batches, share, unfinished, team, progress)
    names = job.adapter.names
    layers = quantize_layers(
        job.adapter,
        batches,
        job.config,
        job.plan,
        weights,
        curvature,
        None if job.held_out is None else job.held_out.to(job.device),
        team=team,
        finished=unfinished.finished,
        restore=lambda index, layer: unfinished.restore(names[index], index, layer, job.config.format),
        on_host=job.on_host,
    )
    with unfinished.writer(job.config.format) as writer:
        for done in layers:
            if team.rank == 0:
                with phase("write"):
                    writer.write(names[done.index], done)
            progress("quantize", names[done.index])
        with phase("write"):
            writer.wait()


def weigh(
    job: Job,
    batches: tuple[Tensor, ...],
    share: slice,
    unfinished: Unfinished,
    team: Team,
    progress: Callable[[str, str], None],
) -> tuple[TokenWeights | None, Mapping[str, Tensor]]:
    """Token weights of this rank's sequences, and the curvature for row feedback; a later run finds them again."""
    if job.weighing == "none" or unfinished.finished == len(job.adapter.names):
        return None, {}
    kept = team.exchange(unfinished.load_weights() is not None)[0]
    if kept:
        whole = unfinished.load_weights() or {}
        return {name: [weights[share].to(job.device)] for name, weights in whole.items()}, unfinished.curvature

    def keep(name: str, G: Tensor) -> None:
        team.sum(G)
        if team.rank == 0:
            unfinished.curvature.keep(name, G)

    weights = token_weights(
        job.adapter,
        batches,
        seed=job.seed if job.weighing == "sampled" else None,
        first=share.start,
        on_host=job.on_host,
        groups=team.local_groups(len(job.calibration)),
        curvature=keep if job.config.row_feedback else None,
        progress=lambda name: progress("weigh", name),
    )
    collected = {name: [team.collect(torch.cat(parts), len(job.calibration))] for name, parts in weights.items()}
    if team.rank == 0:
        unfinished.save_weights(collected)
    team.exchange(None)
    return weights, unfinished.curvature
