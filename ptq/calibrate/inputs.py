"""Quantized inputs: what a linear whose activations are quantized runs on, while it is calibrated, evaluated and read back.

All of it is one forward hook per linear (ptq.runtime.hooks.replace_inputs) that rounds the input as an engine would.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ptq.calibrate.activations import each_batch
from ptq.calibrate.observe import LayerPass, Observed
from ptq.calibrate.passes import Stream
from ptq.core.activations import ActivationFormat, global_scale_of
from ptq.core.packing import Quantized
from ptq.kernels.activations import fake_quantize
from ptq.runtime.adapter import Adapter, Layer, LayerPlan
from ptq.runtime.hooks import replace_inputs


@dataclass(frozen=True)
class Input:
    """How a linear's input is rounded.  `global_scale`: () float32, where the format has one."""

    format: ActivationFormat
    global_scale: Tensor | None = None


Inputs = Mapping[str, Input]
"""By the linear's name."""


def inputs_of(weights: Mapping[str, Quantized]) -> dict[str, Input]:
    """Of those quantized linears whose activations are quantized too."""
    return {
        name: Input(weight.format.activation, weight.input_scale)
        for name, weight in weights.items()
        if weight.format.activation
    }


@contextmanager
def quantized_inputs(module: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Inside the block the linears `inputs` of a layer or model, by their names in it, run on rounded inputs."""
    rounding = {
        module.get_submodule(name): partial(fake_quantize, format=one.format, global_scale=one.global_scale)
        for name, one in inputs.items()
    }
    with replace_inputs(rounding):
        yield


def calibrate_inputs(
    adapter: Adapter, layer: Layer, plan: LayerPlan, formats: Mapping[str, ActivationFormat], stream: Stream | None
) -> dict[str, Input]:
    """For the linears `formats`, by name in the layer, their inputs with global scales from one pass of the calibration tokens.

    A wave has one global scale: engines keep one for linears they fuse, and one for all experts.  Raises ValueError where
    inputs are not finite, or all of them zero.
    """
    calibrated = {name: format for name, format in formats.items() if format.calibrated}
    waves = [[group for group in wave if any(name in calibrated for name in group)] for wave in plan.waves]
    waves = [wave for wave in waves if wave]
    inputs = {name: Input(format) for name, format in formats.items()}
    if waves:
        assert stream
        largest = largest_inputs(adapter, layer, plan, [[group[0] for group in wave] for wave in waves], stream)
        for wave, amax in zip(waves, largest, strict=True):
            for name in (name for group in wave for name in group if name in calibrated):
                check_amax(layer.full_name(name), float(amax))
                inputs[name] = Input(calibrated[name], global_scale_of(amax, calibrated[name]))
    return inputs


def check_amax(name: str, amax: float) -> None:
    if not 0 < amax < float("inf"):
        raise ValueError(
            f"{name}: its largest input on the calibration tokens is {amax}, which gives its activations no scale; leave it "
            "alone with --ignore, or calibrate on other text"
        )


def largest_inputs(adapter: Adapter, layer: Layer, plan: LayerPlan, waves: Sequence[Sequence[str]], stream: Stream) -> Tensor:
    """(waves,) float32: the largest magnitude in the inputs of the linears of each wave, over all ranks."""
    wave_of = {name: number for number, names in enumerate(waves) for name in names}
    largest = torch.zeros(len(waves), device=stream.hidden.device)

    def observe(seen: Observed) -> None:
        if seen.x.numel():
            place = largest[wave_of[seen.name]]
            place.copy_(torch.maximum(place, seen.x.abs().amax().float()))

    def work(rows: slice) -> None:
        with closing(LayerPass(adapter, layer, plan, stream.hidden.load(rows))) as one:
            one.observe(list(wave_of), observe, streams=False)

    each_batch(stream.hidden, "forward", work)
    return stream.ranks.all_reduce_max(largest)
