"""The choices of a run (`--target-bits`): measured once, and found again by `--resume`."""

import json
from pathlib import Path

from ptq.pipeline.progress import bars
from ptq.run.allocate import SEQUENCES, Allocation, allocate
from ptq.run.job import Job
from ptq.run.recipe import OpenRules
from ptq.run.resume import unfinished_folder


def make_choices(job: Job, rules: OpenRules, output: Path | None, *, hidden: bool | None) -> Allocation:
    """What the unfinished run into `output` was begun with, else what is measured on the first calibration sequences.

    Raises ValueError as `allocate`.
    """
    kept = None if output is None else earlier(output)
    if kept is not None:
        return kept
    tokens = job.calibration[:SEQUENCES].to(job.device)
    with bars({"sensitivity": len(job.adapter.names)}, hidden=hidden) as progress:
        return allocate(job.adapter, rules, tokens, job.batch, job.seed, lambda layer: progress("sensitivity", layer))


def earlier(output: Path) -> Allocation | None:
    path = unfinished_folder(output) / "fingerprint.json"
    about = json.loads(path.read_text())["settings"].get("allocation") if path.is_file() else None
    return Allocation.restored(about) if about else None
