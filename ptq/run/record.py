"""What is known of a linear that was solved.

Measured on the device, of one matrix or of each of a batch, and read back when the layer ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptq.core.packing import Quantized
from ptq.methods.rtn import rtn
from ptq.methods.solution import Solution
from ptq.run.recipe import Recipe
from ptq.runtime.adapter import Layer

# Rounding alone leaves the two sides of the identity within about 2 √d_in · eps · ‖W‖/‖Δ‖ of each other, 2e-4 for d_in = 14336
# and an error of 5 %; the bugs it is there to catch (stale or missing feedback) change one side by tens of percent.
CERTIFICATE_TOLERANCE = 1e-2
# Of smaller losses nothing is known: products that float32 flushes to zero are below 1.2e-38 each, and there may be 10⁸ of them.
LEAST_LOSS = 1e-30


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

    Of embeddings the errors are the weight's own, ‖W - Q‖ / ‖W‖.
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


@dataclass(frozen=True)
class LayerResult:
    """A finished layer.  `layer` holds the quantized weights.  `batch`: sequences that ran at once; replaying needs the same."""

    layer: Layer
    batch: int
    records: list[Record] = field(default_factory=list)
    quantized: dict[str, Quantized] = field(default_factory=dict)


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


def linear_stats(W: Tensor, T: Tensor, H: Tensor | None, solution: Solution, recipe: Recipe, sizes: list[int]) -> Tensor:
    """(..., linears, 7) float64: `LinearStats` of these rows, `sizes` of each linear, seconds still 0."""
    nothing = W.new_zeros(W.shape[:-1], dtype=torch.float64)
    quantized = solution.quantized
    baseline = rtn(W, None, recipe.format, rule="absmax", tensor_scale=quantized.tensor_scale).quantized
    energies = [nothing] * 3 if H is None else output_energies(W, T, H, solution, baseline.dequantize(), recipe)
    identity = [nothing if side is None else side for side in (solution.accumulated, solution.measured)]
    moved = (quantized.scales != baseline.scales).double().mean(-1)
    sums = [
        torch.stack([part.sum(-1) for part in each.split(sizes, -1)], -1) for each in (*energies, *identity, moved, nothing)
    ]
    return torch.stack(sums, -1)


def output_energies(W: Tensor, T: Tensor, H: Tensor, solution: Solution, baseline: Tensor, recipe: Recipe) -> list[Tensor]:
    """Of W, of the error of T, and of the error of the baseline: mean over tokens of (row · x)², each (..., d_out) float64."""
    error = T - solution.quantized.dequantize()
    if solution.measured is None or recipe.row_feedback:
        ours = ((error @ H) * error).sum(-1, dtype=torch.float64)
    else:  # what the method measured, less the damping in it
        damping = recipe.damp * H.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        ours = solution.measured - damping * error.square().sum(-1, dtype=torch.float64)
    return [rough_energy(W, H), ours, rough_energy(W - baseline, H)]


def rough_energy(W: Tensor, H: Tensor) -> Tensor:
    """Diagonal of W H Wᵀ, (..., d_out) float64.  On a GPU the product's operands are rounded to bfloat16, which changes the sum
    over rows by about 1e-3 of it, unless W was fitted to avoid the large directions of H."""
    if W.is_cuda:
        multiply = torch.mm if W.dim() == 2 else torch.bmm
        return (multiply(W.bfloat16(), H.bfloat16(), out_dtype=torch.float32) * W).sum(-1, dtype=torch.float64)
    return ((W @ H) * W).sum(-1, dtype=torch.float64)


def matrix_facts(solution: Solution, H: Tensor | None, tokens: Sequence[int], routed: Sequence[int]) -> Tensor:
    """(..., 4) float64: `MatrixFacts` of each matrix."""
    scales = solution.quantized.tensor_scale
    counts = torch.tensor([tokens, routed], dtype=torch.float64, device=scales.device).view(2, *scales.shape)
    dead = torch.zeros_like(counts[0]) if H is None else (H.diagonal(dim1=-2, dim2=-1) == 0).sum(-1).double()
    return torch.stack([torch.full_like(dead, solution.measured is not None), dead, *counts], -1)


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
    difference = abs(stats.accumulated - stats.measured) / max(stats.measured, 1e-9 * stats.output_energy, LEAST_LOSS)
    if not difference <= CERTIFICATE_TOLERANCE:
        raise CertificateError(
            f"{name}: Σ err² = {stats.accumulated:.6g} but tr(Δ (H + damp) Δᵀ) = {stats.measured:.6g}; the error feedback went "
            "wrong, please report this"
        )
    return difference
