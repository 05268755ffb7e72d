"""Which groups of a pass are solved at once: those alike, as the experts of a mixture are."""

from collections.abc import Hashable
from dataclasses import dataclass

from ptq.run.plan import GroupPlan, Pass
from ptq.runtime.adapter import Layer

# Elements of the Hessians of one batch, 256 MB: it takes about ten times that while it is solved.
HESSIANS_AT_ONCE = 2**26

Shards = list[list[range]]
"""For each matrix and rank, the rows it solves."""


@dataclass(frozen=True)
class Batch:
    """Groups with matrices of the same shapes and recipes on the same ranks; `numbers`: theirs in the pass.  `shards`: of the
    matrices of one such group."""

    groups: tuple[GroupPlan, ...]
    numbers: tuple[int, ...]
    shards: Shards

    def alone(self) -> list["Batch"]:
        """Each group by itself, where there are several."""
        each = zip(self.groups, self.numbers, strict=True)
        return [Batch((group,), (number,), self.shards) for group, number in each] if len(self.groups) > 1 else []

    def names(self, layer: Layer) -> str:
        """Of the linears."""
        matrices = [matrix for group in self.groups for matrix in group.matrices]
        return ", ".join(layer.full_name(name) for matrix in matrices for name in matrix.names)


def batches_of(groups: Pass, shards: Shards) -> list[Batch]:
    """All groups of the pass: in each batch as many alike as `HESSIANS_AT_ONCE` holds.  Those whose rows ranks share stay alone,
    since ranks solve them in step."""
    work = iter(shards)
    of_group = [[next(work) for _ in group.matrices] for group in groups]
    alike: dict[Hashable, list[int]] = {}
    for number, group in enumerate(groups):
        both = list(zip(group.matrices, of_group[number], strict=True))
        kind = tuple((matrix.rows, matrix.d_in, matrix.recipe, *shard) for matrix, shard in both)
        shared = any(0 < len(rows) < matrix.shape[0] for matrix, shard in both for rows in shard)
        alike.setdefault((kind, number if shared else None), []).append(number)
    batches = []
    for numbers in alike.values():
        at_once = max(1, HESSIANS_AT_ONCE // groups[numbers[0]].matrices[0].d_in ** 2)
        for start in range(0, len(numbers), at_once):
            part = tuple(numbers[start : start + at_once])
            batches.append(Batch(tuple(groups[number] for number in part), part, of_group[part[0]]))
    return batches


def owners_of(groups: Pass, shards: Shards) -> list[list[int]]:
    """The ranks that solve some rows of each group."""
    work = iter(shards)
    by_group = [[next(work) for _ in group.matrices] for group in groups]
    return [[rank for rank in range(len(shards[0])) if any(shard[rank] for shard in of_group)] for of_group in by_group]
