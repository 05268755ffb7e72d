"""Several processes at one model: each has its own calibration sequences, and some of the stages, or of their rows, to solve.

Tokens are additive in H, so H is summed over the ranks.  Rows are independent given H: a stage is solved by one rank, or each
rank factorizes and sweeps its share of the rows, and what was solved is sent to all.  With `deterministic` the sum is a tree over
`GROUPS` fixed groups of sequences, a stage has one rank, and the bits are the same on 1, 2, 4 or 8 ranks.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise

import torch
from torch import Tensor
from torch import distributed as dist

from ptq.runtime.heartbeat import heartbeat, meeting

GROUPS = 8
TIMEOUT = timedelta(minutes=10)


@contextmanager
def exchange() -> Iterator[None]:
    """The block waits for other ranks.  Raises ConnectionError where one has ended meanwhile: gloo and NCCL raise a RuntimeError
    of no class of its own."""
    try:
        with meeting():
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ConnectionError(f"another rank has ended, or cannot be reached ({str(error).split('. ')[0].strip()})") from error


@dataclass(frozen=True)
class Ranks:
    """This process among `size`.  Alone, every function is the identity."""

    rank: int = 0
    size: int = 1
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.deterministic and GROUPS % self.size:
            raise ValueError(f"--deterministic works on 1, 2, 4 or {GROUPS} ranks, not {self.size}")

    def shard(self, sequences: int) -> slice:
        """The sequences of this rank.  Raises ValueError where there are fewer than ranks, or than groups if that matters."""
        least = GROUPS if self.deterministic else self.size
        if sequences < least:
            raise ValueError(f"{sequences} calibration sequences are too few to divide into {least} parts")
        groups = self.groups(sequences)
        return slice(groups[0].start, groups[-1].stop)

    def groups(self, sequences: int) -> list[slice]:
        """This rank's part of the fixed groups of sequences, which no batch crosses, so that batches are the same on any number
        of ranks that divides `GROUPS`.  With another number, or fewer sequences, a rank's share is one group."""
        count = GROUPS if GROUPS % self.size == 0 and sequences >= GROUPS else self.size
        each = count // self.size
        edges = [sequences * g // count for g in range(self.rank * each, (self.rank + 1) * each + 1)]
        return [slice(a, b) for a, b in pairwise(edges)]

    def local_groups(self, sequences: int) -> list[slice]:
        """The same, counted from this rank's first sequence."""
        groups = self.groups(sequences)
        return [slice(group.start - groups[0].start, group.stop - groups[0].start) for group in groups]

    @exchange()
    def reduce(self, tensor: Tensor, owner: int) -> None:
        """In place: the sum over ranks, valid on `owner`."""
        if self.size == 1:
            return
        if not self.deterministic:
            dist.reduce(tensor, owner)
            return
        other = torch.empty_like(tensor)
        step = 1
        while step < self.size:  # after each step, 2 · step neighbours hold the same sum
            partner = self.rank ^ step
            sends = [dist.P2POp(dist.isend, tensor, partner), dist.P2POp(dist.irecv, other, partner)]
            for work in dist.batch_isend_irecv(sends):
                work.wait()
            tensor += other
            step *= 2

    @exchange()
    def all_reduce(self, tensor: Tensor) -> Tensor:
        """In place: the sum over ranks, on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    @exchange()
    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """In place: the largest over ranks, on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    @exchange()
    def all_reduce_value(self, value: float, device: torch.device) -> float:
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        return float(tensor)

    @exchange()
    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """In place: `owner`'s tensor on every rank."""
        if self.size > 1:
            dist.broadcast(tensor, owner)

    @exchange()
    def all_gather(self, tensor: Tensor, sequences: int) -> Tensor:
        """(sequences, …) of all ranks from each rank's own part, on every rank."""
        if self.size == 1:
            return tensor
        whole = tensor.new_zeros((sequences, *tensor.shape[1:]))
        whole[self.shard(sequences)] = tensor
        dist.all_reduce(whole)  # every element has one term that is not zero
        return whole

    @exchange()
    def all_gather_object(self, value: object) -> list:
        """Every rank's `value`, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def check_same(self, what: str, value: object) -> None:
        """Raises ValueError on every rank where one has another `value` than rank 0."""
        values = self.all_gather_object(value)
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise ValueError(f"rank {', '.join(map(str, others))} has another {what} than rank 0; all must be given the same")


def assign(costs: Sequence[float], ranks: int) -> list[int]:
    """A rank for each piece of work: the largest first, each to the rank with the least so far."""
    loads, owners = [0.0] * ranks, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[piece] = loads.index(min(loads))
        loads[owners[piece]] += costs[piece]
    return owners


def shard_rows(stages: Sequence[tuple[int, int]], ranks: Ranks, *, divisible: bool) -> list[list[range]]:
    """For each stage (d_out, d_in) and each rank, the rows of the stage that the rank solves.

    Whole stages, or, if `divisible` and there are fewer of them than ranks, as many rows of every stage on each rank.  A
    factorization costs about as much as a sweep over as many rows as there are columns.
    """
    everyone = range(ranks.size)
    if divisible and len(stages) < ranks.size <= min(d_out for d_out, _ in stages) and not ranks.deterministic:
        return [[range(d_out * r // ranks.size, d_out * (r + 1) // ranks.size) for r in everyone] for d_out, _ in stages]
    owners = assign([(d_out + d_in) * d_in * d_in for d_out, d_in in stages], ranks.size)
    return [[range(d_out if r == owner else 0) for r in everyone] for (d_out, _), owner in zip(stages, owners, strict=True)]


@contextmanager
def init_process_group(device: torch.device, *, deterministic: bool = False) -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone."""
    if deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Ranks(deterministic=deterministic)
        return
    ranks = Ranks(int(os.environ["RANK"]), size, deterministic)
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=device if on_gpu else None)
    with heartbeat(ranks.rank, size):
        yield ranks
    dist.destroy_process_group()  # not after an error: the others may be waiting in the middle of something, torchrun ends them


def local_device(device: str | None = None) -> str:
    """The device of this process among those that torchrun started on the machine.  None: a GPU where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    return device
