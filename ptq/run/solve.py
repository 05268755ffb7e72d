"""One stage: its linears solved as one matrix, and what is known of the result.

Nothing here waits for the device but a factorization that may fail: the numbers of a record are tensors until the layer ends.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptq.calibrate.collect import Stage, Sums, first_of, shape_of
from ptq.core.formats import choose_tensor_scale
from ptq.core.packing import Quantized
from ptq.methods import METHODS
from ptq.methods.rtn import rtn
from ptq.methods.solution import Solution, join
from ptq.run.config import QuantConfig
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
    `dead_inputs`: columns no token reached.  `seconds`: this linear's share, by rows, of its stage.
    `validation_error`: of its outputs against the original model's (ptq.calibrate.validation).
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


class Numbers(NamedTuple):
    """What the device found of one linear.  Energies: Σ over rows of the mean over tokens of (row · x)².

    `moved`: Σ over rows of the share of blocks whose scale is not the absmax one.  What follows is no sum over rows.
    `feeds_forward`: 1 where the method has a loss identity, whose sides are `accumulated` and `measured`, else 0.
    """

    whole: float
    ours: float
    baseline: float
    accumulated: float
    measured: float
    moved: float
    feeds_forward: float
    dead: float
    tokens: float
    seconds: float


@dataclass(frozen=True)
class Solved:
    """Quantized rows of a stage.  numbers (linears, 10) float64, on the device: rows of `Numbers`, seconds still 0."""

    quantized: Quantized
    numbers: Tensor
    begin: Timestamp
    end: Timestamp


def solve_stage(
    stage: Stage, sums: Sums | None, config: QuantConfig, curvature: Mapping[str, Tensor], rows: range, ranks: Ranks
) -> Solved:
    """Quantizes the linears of one stage as one matrix, or `rows` of it where others of the ranks have the rest: they share H, U
    and, as serving engines fuse them, tensor_scale.

    The sums are used up.  With row feedback each linear is solved with its own `curvature`.
    """
    cuts = cut(stage, rows)
    sizes = [part.stop - part.start for part in cuts]
    device = first_of(stage).weight.device
    begin = now(device)
    H, tokens = (sums.hessian.take_mean(), sums.hessian.tokens) if sums else (None, 0)
    W = T = torch.cat([linear.weight[part].float() for linear, part in zip(stage.values(), cuts, strict=True)])
    if sums and sums.drift:
        assert H is not None
        with phase("drift"):
            part = slice(rows.start, rows.stop)
            T = sums.drift.target(W, H, sums.hessian.weight, strength=config.drift, ridge=config.ridge, rows=part)
    largest = T.abs().amax()
    tensor_scale = choose_tensor_scale(
        largest if len(rows) == shape_of(stage)[0] else ranks.all_reduce_max(largest), config.format
    )
    with phase("sweep"):
        how = partial(
            METHODS[config.method], format=config.format, rule=config.rule, tensor_scale=tensor_scale, damp=config.damp
        )
        if config.frozen:
            how = partial(how, frozen=True)
        if config.row_feedback:
            parts = zip(T.split(sizes), stage, strict=True)
            solution = join([how(part, H, G=curvature[name].to(device)) for part, name in parts])
        else:
            solution = how(T, H)
    with phase("report"):
        nothing = W.new_zeros(len(W), dtype=torch.float64)
        baseline = rtn(W, None, config.format, rule="absmax", tensor_scale=tensor_scale).quantized
        energies = [nothing] * 3 if H is None else output_energies(W, T, H, solution, baseline.dequantize(), config)
        identity = [nothing if side is None else side for side in (solution.accumulated, solution.measured)]
        moved = (solution.quantized.scales != baseline.scales).double().sum(1) / baseline.scales.shape[1]
        totals = [torch.stack([part.sum() for part in each.split(sizes)]) for each in (*energies, *identity, moved)]
        dead = 0 if H is None else (H.diagonal() == 0).sum()
        same = (solution.measured is not None, dead, tokens, 0)
        constants = [torch.as_tensor(value, dtype=torch.float64, device=device).expand(len(sizes)) for value in same]
    return Solved(solution.quantized, torch.stack([*totals, *constants], 1), begin, now(device))


def output_energies(W: Tensor, T: Tensor, H: Tensor, solution: Solution, baseline: Tensor, config: QuantConfig) -> list[Tensor]:
    """Of W, of the error of T, and of the error of the baseline: mean over tokens of (row · x)², each (d_out,) float64."""
    error = T - solution.quantized.dequantize()
    if solution.measured is None or config.row_feedback:
        ours = ((error @ H) * error).sum(1, dtype=torch.float64)
    else:  # what the method measured, less the damping in it
        ours = solution.measured - config.damp * H.diagonal().mean() * error.square().sum(1, dtype=torch.float64)
    return [rough_energy(W, H), ours, rough_energy(W - baseline, H)]


def rough_energy(W: Tensor, H: Tensor) -> Tensor:
    """Diagonal of W H Wᵀ, (d_out,) float64.  On a GPU the product's operands are rounded to bfloat16, which changes the sum over
    rows by about 1e-3 of it, unless W was fitted to avoid the large directions of H."""
    if W.is_cuda:
        return (torch.mm(W.bfloat16(), H.bfloat16(), out_dtype=torch.float32) * W).sum(1, dtype=torch.float64)
    return ((W @ H) * W).sum(1, dtype=torch.float64)


def cut(stage: Stage, rows: range) -> list[slice]:
    """The part of each linear's rows that is in `rows` of the stage."""
    cuts, start = [], 0
    for linear in stage.values():
        first, last = (min(max(edge - start, 0), linear.out_features) for edge in (rows.start, rows.stop))
        cuts.append(slice(first, last))
        start += linear.out_features
    return cuts


def share_solved(
    stage: Stage, solved: Solved | None, share: list[range], config: QuantConfig, ranks: Ranks
) -> tuple[Quantized, Tensor]:
    """(quantized, numbers) of a stage on every rank; `solved`: this rank's rows of the `share`."""
    first, (d_out, d_in) = first_of(stage).weight, shape_of(stage)
    codes = first.new_empty((d_out, d_in), dtype=torch.uint8)
    scales = first.new_empty((d_out, d_in // config.format.block), dtype=torch.float32)
    tensor_scale = first.new_empty((), dtype=torch.float32)
    numbers = first.new_zeros((len(stage), len(Numbers._fields)), dtype=torch.float64)
    owners = [rank for rank, rows in enumerate(share) if rows]
    if solved:
        if first.is_cuda:
            torch.cuda.synchronize(first.device)
        rows = slice(share[ranks.rank].start, share[ranks.rank].stop)
        codes[rows], scales[rows] = solved.quantized.codes, solved.quantized.scales
        tensor_scale.copy_(solved.quantized.tensor_scale)
        numbers.copy_(solved.numbers)
        numbers[:, -1] = seconds_between(solved.begin, solved.end)
        numbers[:, Numbers._fields.index("feeds_forward") :] /= len(owners)
    for rank in owners:
        for tensor in (codes, scales):
            ranks.broadcast(tensor[share[rank].start : share[rank].stop], rank)
    ranks.broadcast(tensor_scale, owners[0])
    return Quantized(codes, scales, tensor_scale, config.format), ranks.all_reduce(numbers)


def make_record(name: str, linear: nn.Linear, numbers: Numbers, config: QuantConfig) -> Record:
    """Raises CertificateError where the loss identity fails."""
    known = numbers.tokens > 0
    return Record(
        name=name,
        shape=(linear.out_features, linear.in_features),
        method=config.method,
        rule=config.rule,
        error=relative(numbers.ours, numbers.whole) if known else None,
        rtn_error=relative(numbers.baseline, numbers.whole) if known else None,
        certificate=certify(name, numbers),
        moved_scales=numbers.moved / linear.out_features,
        damp=config.damp,
        dead_inputs=int(numbers.dead) if known else None,
        tokens=int(numbers.tokens),
        seconds=numbers.seconds,
    )


def relative(part: float, whole: float) -> float:
    return (max(part, 0.0) / whole) ** 0.5 if whole else 0.0


def certify(name: str, numbers: Numbers) -> float | None:
    """Relative difference of Σ err² and tr(Δ (H + damp) Δᵀ), None where the method feeds no error forward.

    Raises CertificateError where it exceeds the tolerance.
    """
    if numbers.tokens == 0 or not numbers.feeds_forward:
        return None
    # Weights that were on the grid already leave nothing but rounding noise on both sides.
    difference = abs(numbers.accumulated - numbers.measured) / max(numbers.measured, 1e-9 * numbers.whole, 1e-300)
    if not difference <= CERTIFICATE_TOLERANCE:
        raise CertificateError(
            f"{name}: Σ err² = {numbers.accumulated:.6g} but tr(Δ (H + damp) Δᵀ) = {numbers.measured:.6g}; the error feedback went "
            "wrong, please report this"
        )
    return difference
