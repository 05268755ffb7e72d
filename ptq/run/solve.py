"""One matrix: its linears solved together, and what is known of the result.

Nothing here waits for the device but a factorization that may fail: the numbers of a record are tensors until the layer ends.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptq.calibrate.drift import Drift
from ptq.core.formats import choose_tensor_scale
from ptq.core.linalg import unpack_symmetric
from ptq.core.packing import Quantized
from ptq.methods import METHODS
from ptq.methods.rtn import rtn
from ptq.methods.solution import Solution, join
from ptq.run.plan import Matrix
from ptq.run.recipe import Recipe
from ptq.runtime.clock import Timestamp, now, phase, seconds_between
from ptq.runtime.distributed import Ranks

# Rounding alone leaves the two sides of the identity within about 2 √d_in · eps · ‖W‖/‖Δ‖ of each other, 2e-4 for d_in = 14336
# and an error of 5 %; the bugs it is there to catch (stale or missing feedback) change one side by tens of percent.
CERTIFICATE_TOLERANCE = 1e-2


class CertificateError(RuntimeError):
    """GPTQ's loss identity does not hold: the error feedback went wrong."""


@dataclass(frozen=True)
class Record:
    """What happened to one linear.

    `error`: ‖(W - Q) X‖ / ‖W X‖ on the calibration tokens, weighted as H is, or ‖(T - Q) X‖ / ‖W X‖ where drift moved W to T;
    `rtn_error` the same for RTN of W with absmax scales; None without calibration.  `certificate`: relative difference of the
    two sides of the loss identity (gptq only).  `moved_scales`: share of the blocks whose scale is not the absmax one.
    `dead_inputs`: columns no token reached.  `seconds`: its part, by rows, of the time its matrix was solved in, over the number
    of ranks: all records together add up to no more than the run.  `validation_error`: of its outputs against the original
    model's (ptq.calibrate.validation).  `routed_tokens`: of an expert, how many came to it; where they were too few, `tokens` is
    all (ptq.calibrate.collect).
    """

    name: str
    shape: tuple[int, int]
    method: str
    rule: str
    error: float | None
    rtn_error: float | None
    certificate: float | None
    moved_scales: float
    damp: float
    dead_inputs: int | None
    tokens: int
    seconds: float
    validation_error: float | None = None
    routed_tokens: int | None = None


class LinearStats(NamedTuple):
    """What the device found of one linear.  Sums over rows, so that ranks that share the rows add up: energies, which are means
    over tokens of (row · x)²; `accumulated` and `measured`, the sides of the loss identity; `moved`, the share of a row's blocks
    whose scale is not the absmax one; `seconds`."""

    output_energy: float
    error_energy: float
    rtn_energy: float
    accumulated: float
    measured: float
    moved: float
    seconds: float


class MatrixFacts(NamedTuple):
    """What is the same for all rows, and said by one rank only.  `has_identity`: 1 where the method has a loss identity.
    `routed`: of an expert, the tokens that came to it, else -1."""

    has_identity: float
    dead_inputs: float
    tokens: float
    routed: float


@dataclass(frozen=True)
class SolvedRows:
    """Quantized rows of a matrix, and on the device, float64: stats (linears, 7), seconds still 0, and facts (4,)."""

    quantized: Quantized
    stats: Tensor
    facts: Tensor
    begin: Timestamp
    end: Timestamp


@dataclass(frozen=True)
class Statistics:
    """Of the calibration tokens, for one group: H (d_in, d_in), what was lost before it, and how much weight both are over."""

    H: Tensor
    tokens: int
    weight: Tensor
    drift: Drift | None = None
    routed: int | None = None


def solve_matrix(
    matrix: Matrix,
    linears: Mapping[str, nn.Linear],
    statistics: Statistics | None,
    curvature: Mapping[str, Tensor],
    rows: range,
    ranks: Ranks,
) -> SolvedRows:
    """Quantizes the `linears`, by full name in the order of the matrix, or `rows` of them where other ranks have the rest: they
    share H, U and, as serving engines fuse them, tensor_scale.

    With row feedback each linear is solved with its own `curvature`.  Raises ValueError for statistics that are not finite.
    """
    recipe = matrix.recipe
    slices = row_slices(matrix.rows, rows)
    sizes = [part.stop - part.start for part in slices]
    device = next(iter(linears.values())).weight.device
    begin = now(device)
    H = statistics.H if statistics else None
    W = T = torch.cat([linear.weight[part].float() for linear, part in zip(linears.values(), slices, strict=True)])
    if statistics and statistics.drift and recipe.drift:
        with phase("drift"):
            T = drift_target(W, recipe, statistics, rows)
    largest = T.abs().amax()
    tensor_scale = choose_tensor_scale(
        largest if len(rows) == matrix.shape[0] else ranks.all_reduce_max(largest), recipe.format
    )
    with phase("sweep"):
        how = partial(
            METHODS[recipe.method], format=recipe.format, rule=recipe.rule, tensor_scale=tensor_scale, damp=recipe.damp
        )
        if recipe.frozen:
            how = partial(how, frozen=True)
        if recipe.row_feedback:
            parts = zip(T.split(sizes), linears, strict=True)
            solution = join([how(part, H, G=known_curvature(curvature[name].to(device), len(part))) for part, name in parts])
        else:
            solution = how(T, H)
    with phase("report"):
        stats = linear_stats(W, T, H, solution, recipe, sizes)
        dead, tokens = ((statistics.H.diagonal() == 0).sum(), statistics.tokens) if statistics else (0, 0)
        routed = -1 if statistics is None or statistics.routed is None else statistics.routed
        facts = (solution.measured is not None, dead, tokens, routed)
        told = torch.stack([torch.as_tensor(fact, dtype=torch.float64, device=device) for fact in facts])
    return SolvedRows(solution.quantized, stats, told, begin, now(device))


def known_curvature(packed: Tensor, rows: int) -> Tensor | None:
    """G (rows, rows); None where no gradient came, as of an expert that was given no tokens: then errors are not fed over rows."""
    return unpack_symmetric(packed, rows) if packed.any() else None


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


def linear_stats(W: Tensor, T: Tensor, H: Tensor | None, solution: Solution, recipe: Recipe, sizes: list[int]) -> Tensor:
    """(linears, 7) float64: `LinearStats` of these rows, `sizes` of each linear, seconds still 0."""
    nothing = W.new_zeros(len(W), dtype=torch.float64)
    quantized = solution.quantized
    baseline = rtn(W, None, recipe.format, rule="absmax", tensor_scale=quantized.tensor_scale).quantized
    energies = [nothing] * 3 if H is None else output_energies(W, T, H, solution, baseline.dequantize(), recipe)
    identity = [nothing if side is None else side for side in (solution.accumulated, solution.measured)]
    moved = (quantized.scales != baseline.scales).double().sum(1) / baseline.scales.shape[1]
    sums = [torch.stack([part.sum() for part in each.split(sizes)]) for each in (*energies, *identity, moved, nothing)]
    return torch.stack(sums, 1)


def output_energies(W: Tensor, T: Tensor, H: Tensor, solution: Solution, baseline: Tensor, recipe: Recipe) -> list[Tensor]:
    """Of W, of the error of T, and of the error of the baseline: mean over tokens of (row · x)², each (d_out,) float64."""
    error = T - solution.quantized.dequantize()
    if solution.measured is None or recipe.row_feedback:
        ours = ((error @ H) * error).sum(1, dtype=torch.float64)
    else:  # what the method measured, less the damping in it
        ours = solution.measured - recipe.damp * H.diagonal().mean() * error.square().sum(1, dtype=torch.float64)
    return [rough_energy(W, H), ours, rough_energy(W - baseline, H)]


def rough_energy(W: Tensor, H: Tensor) -> Tensor:
    """Diagonal of W H Wᵀ, (d_out,) float64.  On a GPU the product's operands are rounded to bfloat16, which changes the sum over
    rows by about 1e-3 of it, unless W was fitted to avoid the large directions of H."""
    if W.is_cuda:
        return (torch.mm(W.bfloat16(), H.bfloat16(), out_dtype=torch.float32) * W).sum(1, dtype=torch.float64)
    return ((W @ H) * W).sum(1, dtype=torch.float64)


def row_slices(sizes: tuple[int, ...], rows: range) -> list[slice]:
    """The part of each linear's rows, `sizes` of them one below the other, that is in `rows` of the matrix."""
    slices, start = [], 0
    for size in sizes:
        first, last = (min(max(edge - start, 0), size) for edge in (rows.start, rows.stop))
        slices.append(slice(first, last))
        start += size
    return slices


def gather_matrix(
    matrix: Matrix, like: Tensor, solved: SolvedRows | None, shard: list[range], ranks: Ranks
) -> tuple[Quantized, list[LinearStats], MatrixFacts]:
    """(quantized, stats of each linear, facts) of a matrix on every rank; `solved`: this rank's rows of the `shard`."""
    (d_out, d_in), format = matrix.shape, matrix.recipe.format
    codes = like.new_empty((d_out, d_in), dtype=torch.uint8)
    scales = like.new_empty((d_out, d_in // format.span(d_in)), dtype=torch.float32)
    tensor_scale = like.new_empty((), dtype=torch.float32)
    stats = like.new_zeros((len(matrix.names), len(LinearStats._fields)), dtype=torch.float64)
    facts = like.new_zeros(len(MatrixFacts._fields), dtype=torch.float64)
    owners = [rank for rank, rows in enumerate(shard) if rows]
    if solved:
        if like.is_cuda:
            torch.cuda.synchronize(like.device)
        rows = slice(shard[ranks.rank].start, shard[ranks.rank].stop)
        codes[rows], scales[rows] = solved.quantized.codes, solved.quantized.scales
        tensor_scale.copy_(solved.quantized.tensor_scale)
        stats.copy_(solved.stats)
        share = torch.tensor(matrix.rows, dtype=torch.float64, device=like.device) / d_out
        stats[:, LinearStats._fields.index("seconds")] = seconds_between(solved.begin, solved.end) / ranks.size * share
        if ranks.rank == owners[0]:
            facts.copy_(solved.facts)
    for rank in owners:
        for tensor in (codes, scales):
            ranks.broadcast(tensor[shard[rank].start : shard[rank].stop], rank)
    ranks.broadcast(tensor_scale, owners[0])
    told = [LinearStats(*row) for row in ranks.all_reduce(stats).tolist()]
    return Quantized(codes, scales, tensor_scale, format), told, MatrixFacts(*ranks.all_reduce(facts).tolist())


def make_record(name: str, linear: nn.Linear, stats: LinearStats, facts: MatrixFacts, recipe: Recipe) -> Record:
    """Raises CertificateError where the loss identity fails."""
    known = facts.tokens > 0
    return Record(
        name=name,
        shape=(linear.out_features, linear.in_features),
        method=recipe.method,
        rule=recipe.rule,
        error=relative(stats.error_energy, stats.output_energy) if known else None,
        rtn_error=relative(stats.rtn_energy, stats.output_energy) if known else None,
        certificate=certify(name, stats) if known and facts.has_identity else None,
        moved_scales=stats.moved / linear.out_features,
        damp=recipe.damp,
        dead_inputs=int(facts.dead_inputs) if known else None,
        tokens=int(facts.tokens),
        seconds=stats.seconds,
        routed_tokens=int(facts.routed) if facts.routed >= 0 else None,
    )


def relative(part: float, whole: float) -> float:
    return (max(part, 0.0) / whole) ** 0.5 if whole else 0.0


def certify(name: str, stats: LinearStats) -> float:
    """Relative difference of Σ err² and tr(Δ (H + damp) Δᵀ).  Raises CertificateError where it exceeds the tolerance."""
    # Weights that were on the grid already leave nothing but rounding noise on both sides.
    difference = abs(stats.accumulated - stats.measured) / max(stats.measured, 1e-9 * stats.output_energy, 1e-300)
    if not difference <= CERTIFICATE_TOLERANCE:
        raise CertificateError(
            f"{name}: Σ err² = {stats.accumulated:.6g} but tr(Δ (H + damp) Δᵀ) = {stats.measured:.6g}; the error feedback went "
            "wrong, please report this"
        )
    return difference
