"""From an opened model to its finished layers: token importance, quantize, write; as far as an earlier run left it to be done."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.calibrate.importance import TokenImportance, token_importance
from ptq.export.layout import Layout
from ptq.run.loop import Calibration, quantize_layers
from ptq.run.plan import Plan
from ptq.run.resume import Unfinished
from ptq.runtime.adapter import Adapter
from ptq.runtime.clock import phase
from ptq.runtime.distributed import Ranks
from ptq.runtime.heartbeat import may_wait


@dataclass(frozen=True)
class Job:
    """`calibration` (sequences, length): of all ranks, on the CPU.  `importance`: none, text or sampled (ptq.run.settings),
    `seed` draws its labels.  `batch`: sequences that run at once.  `on_host`: whether hidden states are in host memory; None,
    by size.  `validation` (n, length): sequences to measure every linear on, on all ranks the same."""

    adapter: Adapter
    plan: Plan
    layout: Layout
    calibration: Tensor
    device: torch.device
    importance: str = "sampled"
    seed: int = 0
    batch: int = 8
    on_host: bool | None = None
    validation: Tensor | None = None


def do_layers(
    job: Job, unfinished: Unfinished, ranks: Ranks, progress: Callable[[str, str], None] = lambda what, name: None
) -> None:
    """All layers are in the unfinished folder afterwards, if they are not in the output already.

    progress("importance" | "quantize", layer) as each is done.  Raises ValueError for row feedback on several ranks
    that are to be deterministic: G is added up rank by rank.
    """
    if unfinished.complete:
        return
    if job.plan.row_feedback and ranks.deterministic and ranks.size > 1:
        raise ValueError("--row-feedback is not --deterministic on several ranks; use one rank, or leave one of the two out")
    share = ranks.shard(len(job.calibration))
    batches = job.calibration[share].to(job.device).split(job.batch)
    weights, curvature = measure_importance(job, batches, share, unfinished, ranks, progress)
    validation = None if job.validation is None else job.validation.to(job.device)
    layers = quantize_layers(
        job.adapter,
        job.plan,
        Calibration(batches, weights, curvature, validation),
        ranks=ranks,
        finished=unfinished.finished,
        restore=lambda layer: unfinished.restore(layer, job.plan.formats, job.layout),
        on_host=job.on_host,
    )
    with unfinished.writer(job.plan.formats, job.layout) as writer:
        for done in layers:
            if ranks.rank == 0:
                with phase("write"), may_wait():
                    writer.write(done)
            progress("quantize", done.layer.name)
        with phase("write"), may_wait():
            writer.wait()


def measure_importance(
    job: Job,
    batches: tuple[Tensor, ...],
    share: slice,
    unfinished: Unfinished,
    ranks: Ranks,
    progress: Callable[[str, str], None],
) -> tuple[TokenImportance | None, Mapping[str, Tensor]]:
    """Token weights of this rank's sequences, and the curvature for row feedback; a later run finds them again."""
    if job.importance == "none" or unfinished.finished == unfinished.layers:
        return None, {}
    kept = ranks.all_gather_object(unfinished.load_importance() is not None)[0]
    if kept:
        whole = unfinished.load_importance() or {}
        return {name: [weights[share].to(job.device)] for name, weights in whole.items()}, unfinished.curvature

    with unfinished.curvature.writer() as write:

        def keep(name: str, G: Tensor) -> None:
            ranks.all_reduce(G)
            if ranks.rank == 0:
                write(name, G)

        weights = token_importance(
            job.adapter,
            batches,
            seed=job.seed if job.importance == "sampled" else None,
            first=share.start,
            on_host=job.on_host,
            groups=ranks.local_groups(len(job.calibration)),
            curvature=keep if job.plan.row_feedback else None,
            progress=lambda name: progress("importance", name),
        )
    collected = {name: [ranks.all_gather(torch.cat(parts), len(job.calibration))] for name, parts in weights.items()}
    if ranks.rank == 0:
        unfinished.save_importance(collected)
    ranks.all_gather_object(None)
    return weights, unfinished.curvature
