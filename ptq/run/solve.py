"""Matrices solved: what is known of the calibration tokens, and the linears of one matrix, go in; codes and scales come out.

Or a batch of matrices alike, as the experts of a mixture have them: tensors then have one more dimension in front.  Nothing
here waits for the device but a check that may fail.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ptq.calibrate.collect import Sums
from ptq.calibrate.drift import Drift
from ptq.calibrate.hessian import Hessian
from ptq.core.formats import tensor_scale_of
from ptq.core.linalg import unpack_symmetric
from ptq.core.packing import Quantized
from ptq.methods import METHODS
from ptq.methods.solution import join
from ptq.run.plan import Matrix
from ptq.run.recipe import Recipe
from ptq.run.record import LinearStats, MatrixFacts, linear_stats, matrix_facts
from ptq.runtime.clock import Timestamp, now, phase, seconds_between
from ptq.runtime.distributed import Ranks


@dataclass(frozen=True)
class SolvedRows:
    """Quantized rows of a matrix, and on the device, float64: stats (..., linears, 7), seconds still 0, and facts (..., 4)."""

    quantized: Quantized
    stats: Tensor
    facts: Tensor
    begin: Timestamp
    end: Timestamp


@dataclass(frozen=True)
class Statistics:
    """Of the calibration tokens, for one group or a batch of them: H (..., d_in, d_in), what was lost before it, and how much
    weight (...) both are over.  `tokens`, and of those that came to an expert `routed`, else -1: of each group."""

    H: Tensor
    tokens: Sequence[int]
    weight: Tensor
    drift: Drift | None = None
    routed: Sequence[int] = (-1,)


def take_statistics(sums: Sequence[Sums]) -> Statistics:
    """Of one group in the memory of its sums, which are gone then; of several in new memory.  Raises ValueError as
    `Hessian.mean`."""
    hessians, drifts = [one.hessian for one in sums], [one.drift for one in sums if one.drift]
    tokens, routed = [one.tokens for one in hessians], [-1 if one.routed is None else one.routed for one in sums]
    if len(sums) == 1:
        return Statistics(hessians[0].take_mean(), tokens, hessians[0].weight, sums[0].drift, routed)
    H, weights = Hessian.stack_means(hessians)
    return Statistics(H, tokens, weights, Drift.stack(drifts) if drifts else None, routed)


Linears = Mapping[str, nn.Linear]
"""Those of a matrix, by full name in its order."""


def solve_matrices(
    matrix: Matrix,
    linears: Sequence[Linears],
    statistics: Statistics | None,
    curvature: Mapping[str, Tensor],
    rows: range,
    ranks: Ranks,
) -> SolvedRows:
    """Quantizes the `linears` of one matrix, or of each of a batch that are like `matrix`, or `rows` of them where other ranks
    have the rest.  Those of a matrix share H, U and, as serving engines fuse them, tensor_scale.

    With row feedback each linear is solved with its own `curvature`.  Raises ValueError for statistics that are not finite.
    """
    recipe = matrix.recipe
    slices = row_slices(matrix.rows, rows)
    sizes = [part.stop - part.start for part in slices]
    weights = [linear.weight[part] for each in linears for linear, part in zip(each.values(), slices, strict=True)]
    batch = () if len(linears) == 1 else (len(linears),)
    begin = now(weights[0].device)
    H = statistics.H if statistics else None
    W = T = torch.cat(weights).float().view(*batch, len(rows), matrix.d_in)
    if statistics and statistics.drift and recipe.drift:
        with phase("drift"):
            T = drift_target(W, recipe, statistics, rows)
    largest = T.abs().amax((-2, -1))
    tensor_scale = tensor_scale_of(largest if len(rows) == matrix.shape[0] else ranks.all_reduce_max(largest), recipe.format)
    with phase("sweep"):
        how = partial(
            METHODS[recipe.method], format=recipe.format, rule=recipe.rule, tensor_scale=tensor_scale, damp=recipe.damp
        )
        if recipe.frozen:
            how = partial(how, frozen=True)
        if recipe.row_feedback:
            parts = zip(T.split(sizes, -2), zip(*linears, strict=True), strict=True)
            solution = join([how(part, H, G=curvature_of(names, curvature, part)) for part, names in parts])
        else:
            solution = how(T, H)
    with phase("report"):
        stats = linear_stats(W, T, H, solution, recipe, sizes)
        counts = (statistics.tokens, statistics.routed) if statistics else ([0] * len(linears), [-1] * len(linears))
        facts = matrix_facts(solution, H, *counts)
    return SolvedRows(solution.quantized, stats, facts, begin, now(W.device))


def curvature_of(names: Sequence[str], curvature: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """G (..., rows, rows) of the linears `names`; the identity, which feeds no error over rows, where no gradient came, as of
    an expert that was given no tokens.  like (..., rows, d_in)."""
    rows = like.shape[-2]
    G = torch.stack([unpack_symmetric(curvature[name].to(like.device, non_blocking=True), rows) for name in names])
    known = G.flatten(1).any(1)[:, None, None]
    return torch.where(known, G, torch.eye(rows, device=G.device)).view(*like.shape[:-1], rows)


def drift_target(W: Tensor, recipe: Recipe, statistics: Statistics, rows: range) -> Tensor:
    """What is rounded instead of W, these `rows` of a matrix that makes good what was lost before it."""
    assert statistics.drift
    part = slice(rows.start, rows.stop)
    T = statistics.drift.target(W, statistics.H, statistics.weight, strength=recipe.drift, ridge=recipe.ridge, rows=part)
    if not T.isfinite().all():
        raise ValueError(
            "what was lost before it is not finite: the original model overflows on the calibration tokens; run it in --dtype "
            "bfloat16 or float32"
        )
    return T


def row_slices(sizes: tuple[int, ...], rows: range) -> list[slice]:
    """The part of each linear's rows, `sizes` of them one below the other, that is in `rows` of the matrix."""
    slices, start = [], 0
    for size in sizes:
        first, last = (min(max(edge - start, 0), size) for edge in (rows.start, rows.stop))
        slices.append(slice(first, last))
        start += size
    return slices


def gather(
    matrix: Matrix, count: int, like: Tensor, solved: SolvedRows | None, shard: list[range], ranks: Ranks
) -> tuple[Quantized, list[list[LinearStats]], list[MatrixFacts]]:
    """On every rank, of `count` matrices like `matrix`: (quantized (count, d_out, d_in), stats of each one's linears, facts of
    each); `solved`: this rank's rows of the `shard`."""
    (d_out, d_in), format = matrix.shape, matrix.recipe.format
    codes = like.new_empty((count, d_out, d_in), dtype=torch.uint8)
    scales = like.new_empty((count, d_out, d_in // format.span(d_in)), dtype=torch.float32)
    tensor_scale = like.new_empty(count, dtype=torch.float32)
    stats = like.new_zeros((count, len(matrix.names), len(LinearStats._fields)), dtype=torch.float64)
    facts = like.new_zeros((count, len(MatrixFacts._fields)), dtype=torch.float64)
    owners = [rank for rank, rows in enumerate(shard) if rows]
    if solved:
        if like.is_cuda:
            torch.cuda.synchronize(like.device)
        rows = slice(shard[ranks.rank].start, shard[ranks.rank].stop)
        codes[:, rows], scales[:, rows] = solved.quantized.codes, solved.quantized.scales
        tensor_scale.copy_(solved.quantized.tensor_scale)
        stats.copy_(solved.stats)
        share = torch.tensor(matrix.rows, dtype=torch.float64, device=like.device) / (count * d_out)
        stats[..., LinearStats._fields.index("seconds")] = seconds_between(solved.begin, solved.end) / ranks.size * share
        if ranks.rank == owners[0]:
            facts.copy_(solved.facts)
    for rank in owners:
        for tensor in (codes, scales):
            ranks.broadcast(tensor[:, shard[rank].start : shard[rank].stop], rank)
    ranks.broadcast(tensor_scale, owners[0])
    told = [[LinearStats(*row) for row in rows] for rows in ranks.all_reduce(stats).tolist()]
    return Quantized(codes, scales, tensor_scale, format), told, [MatrixFacts(*row) for row in ranks.all_reduce(facts).tolist()]
