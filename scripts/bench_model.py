#!/usr/bin/env python
"""Time the quantization of a whole model of a given shape, with random weights made on the device.

    python scripts/bench_model.py --shape Llama-3.1-8B --commit abc1234
    torchrun --nproc-per-node 2 scripts/bench_model.py --shape Llama-3.1-8B --commit abc1234

Layers are written to a temporary folder as in a real run.  A short run of one layer goes before, so that no kernel is compiled
on the clock.  Rows are appended to benchmarks/models.csv; phases are exclusive, on the GPU's clock of rank 0.
"""

import argparse
import csv
import hashlib
import os
import resource
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from random_model import SHAPES, random_adapter, shape_config
from transformers import PretrainedConfig

from ptq.calibrate.activations import default_batch
from ptq.core.formats import get_format
from ptq.cost.estimate import floor_seconds
from ptq.cost.shape import operations, shape_of
from ptq.export.compressed_tensors import CompressedTensors
from ptq.run.job import Job, do_layers
from ptq.run.plan import make_plan
from ptq.run.resume import Unfinished
from ptq.run.settings import make_recipe
from ptq.runtime.clock import Timestamp, now, seconds_between, timed
from ptq.runtime.distributed import Ranks, init_process_group
from ptq.settings import DRIFTS, EFFORTS, IMPORTANCES, VALIDATION_SEQUENCES

PHASES = ("load", "importance", "forward", "hessian", "drift", "factorization", "sweep", "report", "write", "communicate")
FIELDS = (
    *("shape", "gpus", "format", "method", "rule", "token_importance", "drift", "row_feedback"),
    *("layers", "sequences", "length", "batch", "deterministic"),
    *("seconds_total", *(f"{phase}_s" for phase in PHASES), "peak_gpu_gb", "peak_host_gb", "floor_seconds", "tflops"),
    *("gpu", "commit"),
)


class Clock:
    """Seconds by phase.  A phase inside a phase is not counted in the outer one."""

    def __init__(self, device: torch.device):
        self._device = device
        self._open: list[str] = []
        self._marks: list[tuple[str | None, Timestamp]] = []

    def mark(self) -> None:
        """From now on the time belongs to the innermost phase that is open."""
        self._marks.append((self._open[-1] if self._open else None, now(self._device)))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._open.append(name)
        self.mark()
        try:
            yield
        finally:
            self._open.pop()
            self.mark()

    def seconds(self) -> dict[str, float]:
        """Seconds by phase so far; waits for the GPU."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        totals: dict[str, float] = defaultdict(float)
        for (name, begin), (_, end) in pairwise(self._marks):
            if name is not None:
                totals[name] += seconds_between(begin, end)
        return dict(totals)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, help="only the first N layers")
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--rule")
    parser.add_argument("--token-importance", choices=IMPORTANCES)
    parser.add_argument("--drift", choices=DRIFTS)
    parser.add_argument("--row-feedback", action="store_true")
    parser.set_defaults(**EFFORTS["default"])
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, help="sequences at once (default: by the width)")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/models.csv"))
    parser.add_argument("--digest", action="store_true", help="print a hash of all layers' files")
    parser.add_argument("--commit", required=True, help="recorded in the CSV")
    args = parser.parse_args()
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(args.device)
    config = shape_config(args.shape)
    experts = hasattr(config, "num_experts_per_tok")
    args.batch = args.batch or default_batch(config.hidden_size, args.length, torch.device(args.device), experts=experts)
    return args


def make_job(args: argparse.Namespace, config: PretrainedConfig, sequences: int) -> Job:
    device = torch.device(args.device)
    adapter = random_adapter(config, device)
    recipe = make_recipe(get_format(args.format), vars(args))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (sequences + VALIDATION_SEQUENCES, args.length), generator=generator)
    return Job(
        adapter,
        make_plan(adapter, recipe),
        CompressedTensors(),
        tokens[:sequences],
        device,
        args.token_importance,
        batch=args.batch,
        validation=tokens[sequences:],
    )


def run(job: Job, ranks: Ranks, folder: Path) -> None:
    with closing(Unfinished(folder / "out", {}, len(job.adapter.names), resume=False, ranks=ranks)) as unfinished:
        do_layers(job, unfinished, ranks)


def measure(args: argparse.Namespace, ranks: Ranks) -> dict:
    """A row of the CSV."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(ranks.all_gather_object(folder)[0])
        run(make_job(args, shape_config(args.shape, 1), 8 * ranks.size), ranks, place / "short")
        job = make_job(args, shape_config(args.shape, args.layers), args.sequences)
        on_gpu = job.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        ranks.all_gather_object(None)
        clock = Clock(job.device)
        begin = time.perf_counter()
        with timed(clock.phase):
            run(job, ranks, place / "whole")
        if on_gpu:
            torch.cuda.synchronize()
        ranks.all_gather_object(None)
        total = time.perf_counter() - begin
        if args.digest and ranks.rank == 0:
            files = sorted((place / "whole").glob("**/*.safetensors"))
            print(hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest())
    shape = shape_of(job.plan, job.adapter, args.sequences, args.length, job.importance)
    return {
        "seconds_total": round(total, 2),
        **{f"{name}_s": round(seconds, 3) for name, seconds in clock.seconds().items()},
        "peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_gpu else "",
        "peak_host_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "floor_seconds": round(floor_seconds(shape) / ranks.size, 2),
        "tflops": round(sum(operations(shape).values()) / total / 1e12, 1),
        "layers": len(job.adapter.names),
    }


def main() -> int:
    args = parse_arguments()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")  # of every first backward pass
    with init_process_group(torch.device(args.device), deterministic=args.deterministic) as ranks:
        row = measure(args, ranks)
    if ranks.rank:
        return 0
    row |= {"gpus": ranks.size} | {name: value for name, value in vars(args).items() if name in FIELDS and name not in row}
    row["gpu"] = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    fresh = not args.csv.exists()
    with args.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    print("  ".join(f"{name} {row.get(name, '')}" for name in FIELDS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
