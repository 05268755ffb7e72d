"""The loop: layer by layer through a model, each layer calibrated on the output of the quantized ones before it.

For each layer: run it once and collect H per stage; quantize its linears; run it again to get the next layer's input.  One
layer's Hessians are alive at a time, and layers are asked of the adapter one by one.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq.adapter import Adapter
from ptq.config import QuantConfig
from ptq.formats import choose_tensor_scale
from ptq.hessian import Hessian
from ptq.methods import METHODS
from ptq.methods.rtn import rtn
from ptq.methods.solution import Solution
from ptq.packing import Quantized
from ptq.plan import make_plan
from ptq.token_weights import TokenWeights
from ptq.watch import watch_linears

# Rounding alone leaves the two sides of the identity within about 2 √d_in · eps · ‖W‖/‖Δ‖ of each other, 2e-4 for d_in = 14336
# and an error of 5 %; the bugs it is there to catch (stale or missing feedback) change one side by tens of percent.
CERTIFICATE_TOLERANCE = 1e-2


class CertificateError(RuntimeError):
    """GPTQ's loss identity does not hold: the error feedback went wrong."""


@dataclass(frozen=True)
class Record:
    """What happened to one linear.

    `error`: ‖(W - Q) X‖ / ‖W X‖ on the calibration tokens, weighted as H is; `rtn_error` the same for RTN with absmax scales;
    None without calibration.  `certificate`: relative difference of the two sides of the loss identity (gptq only).
    `dead_inputs`: columns no token reached.  `seconds`: this linear's share, by rows, of its stage.
    """

    name: str
    shape: tuple[int, int]
    method: str
    rule: str
    error: float | None
    rtn_error: float | None
    certificate: float | None
    damp: float
    dead_inputs: int | None
    tokens: int
    seconds: float


@torch.no_grad()
def quantize_model(
    adapter: Adapter, batches: Sequence[Tensor] | None, config: QuantConfig, token_weights: TokenWeights | None = None
) -> Iterator[tuple[Record, Quantized]]:
    """Quantizes the model in place and yields (record, weight) for each linear as it is done.

    `batches`: token ids (n, length) each, on the model's device; None for methods that need no calibration.  `token_weights`: for
    the same batches, what each token counts for in H (ptq.token_weights); every token counts the same without.
    Raises ValueError, before any work, for whatever `make_plan` finds, and later for non-finite activations or an H that damping
    does not cure, naming layer and stage; CertificateError where the loss identity fails.
    """
    if not batches and config.needs_calibration:
        raise ValueError(f"method {config.method} with scale rule {config.rule} needs calibration tokens")
    plan = make_plan(adapter, config)
    hidden = [adapter.embed(tokens) for tokens in batches or ()]
    for prefix, layer in adapter.layers():
        stages = [
            {f"{prefix}.{name}": linear_of(layer, name) for name in stage if f"{prefix}.{name}" in plan.linears}
            for stage in adapter.stages
        ]
        stages = [stage for stage in stages if stage]
        hessians = collect_hessians(adapter, layer, stages, hidden, token_weights)
        for stage in stages:
            try:
                yield from quantize_stage(stage, hessians.pop(0) if hessians else None, config)
            except ValueError as error:
                raise type(error)(f"{', '.join(stage)}: {error}") from None
        for i, x in enumerate(hidden):
            hidden[i] = adapter.forward(layer, x)


def linear_of(layer: nn.Module, name: str) -> nn.Linear:
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear), name
    return linear


def collect_hessians(
    adapter: Adapter,
    layer: nn.Module,
    stages: list[dict[str, nn.Linear]],
    hidden: list[Tensor],
    token_weights: TokenWeights | None,
) -> list[Hessian]:
    """One Hessian per stage from one pass of `hidden` through the layer."""
    if not hidden:
        return []
    names: dict[nn.Module, str] = {}
    hessians: dict[nn.Module, Hessian] = {}
    for stage in stages:
        name, linear = next(iter(stage.items()))
        names[linear], hessians[linear] = name, Hessian(linear.in_features, device=linear.weight.device)
    for i, x in enumerate(hidden):

        def see(linear: nn.Module, x: Tensor, _y: Tensor, i: int = i) -> None:
            hessians[linear].add(x, token_weights[names[linear]][i] if token_weights else None)

        with watch_linears(hessians, see):
            adapter.forward(layer, x)
    return list(hessians.values())


def quantize_stage(
    stage: dict[str, nn.Linear], hessian: Hessian | None, config: QuantConfig
) -> Iterator[tuple[Record, Quantized]]:
    """Quantizes the linears of one stage as one matrix: they share H, U and, as serving engines fuse them, tensor_scale."""
    begin = time.perf_counter()
    H = hessian.mean() if hessian else None
    W = torch.cat([linear.weight.float() for linear in stage.values()])
    tensor_scale = choose_tensor_scale(W, config.format)
    solution = METHODS[config.method](W, H, config.format, rule=config.rule, tensor_scale=tensor_scale, damp=config.damp)
    baseline = rtn(W, None, config.format, rule="absmax", tensor_scale=tensor_scale).quantized.dequantize()
    Q = solution.quantized.dequantize()
    energies = None if H is None else [output_energy(part, H) for part in (W, W - Q, W - baseline)]
    dead = None if H is None else int((H.diagonal() == 0).sum())
    seconds = time.perf_counter() - begin
    start = 0
    for name, linear in stage.items():
        stop = start + linear.out_features
        rows = slice(start, stop)
        error, rtn_error = relative_errors(energies, rows)
        linear.weight.copy_(Q[rows])
        record = Record(
            name=name,
            shape=(linear.out_features, linear.in_features),
            method=config.method,
            rule=config.rule,
            error=error,
            rtn_error=rtn_error,
            certificate=certify(name, solution, rows, energies),
            damp=config.damp,
            dead_inputs=dead,
            tokens=hessian.tokens if hessian else 0,
            seconds=seconds * linear.out_features / W.shape[0],
        )
        yield record, solution.quantized.rows(start, stop)
        start = stop


def output_energy(W: Tensor, H: Tensor) -> Tensor:
    """Mean over tokens of (W x)² for each row of W: (d_out,) float64."""
    return ((W @ H) * W).sum(1, dtype=torch.float64)


def relative_errors(energies: list[Tensor] | None, rows: slice) -> tuple[float | None, float | None]:
    if energies is None:
        return None, None
    whole, ours, baseline = (float(energy[rows].sum()) for energy in energies)
    return tuple((max(part, 0.0) / whole) ** 0.5 if whole else 0.0 for part in (ours, baseline))  # type: ignore[return-value]


def certify(name: str, solution: Solution, rows: slice, energies: list[Tensor] | None) -> float | None:
    """Relative difference of Σ err² and tr(Δ (H + damp) Δᵀ).  Raises CertificateError where it exceeds the tolerance."""
    if solution.accumulated is None or solution.measured is None or energies is None:
        return None
    accumulated, measured = float(solution.accumulated[rows].sum()), float(solution.measured[rows].sum())
    # Weights that were on the grid already leave nothing but rounding noise on both sides.
    noise = 1e-9 * float(energies[0][rows].sum())
    difference = abs(accumulated - measured) / max(measured, noise, 1e-300)
    if not difference <= CERTIFICATE_TOLERANCE:
        raise CertificateError(
            f"{name}: Σ err² = {accumulated:.6g} but tr(Δ (H + damp) Δᵀ) = {measured:.6g}; the error feedback went wrong, "
            "please report this"
        )
    return difference
