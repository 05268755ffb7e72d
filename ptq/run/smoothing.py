"""Channels scaled before a linear's inputs are rounded (SmoothQuant, Xiao et al. 2023), so that an engine runs them unchanged.

    y = W x = (W S⁻¹) (S x),   S diagonal, made by what comes before: a norm's gain, or the rows of v_proj or up_proj

A channel that is large in all tokens makes its neighbours in a block small against their scale; S takes some of that to the
weights, which are known and rounded with error feedback.  S is of powers of two, so that the model's outputs do not change in a
bit.  s_j = |x_j|^-α, |x_j| the root mean square, α by group the one of least error in the outputs, inputs rounded and weights too.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing

import torch
from torch import Tensor, nn

from ptq.calibrate.activations import each_batch
from ptq.calibrate.observe import LayerPass, Observed
from ptq.calibrate.passes import Stream
from ptq.core.activations import ActivationFormat, global_scale_of
from ptq.core.formats import choose_tensor_scale
from ptq.core.linalg import pack_symmetric
from ptq.kernels.activations import fake_quantize
from ptq.methods.rtn import rtn
from ptq.run.recipe import Recipe
from ptq.runtime.adapter import Adapter, Layer, LayerPlan, Scaling

EXPONENTS = tuple(k / 8 for k in range(9))
# Inputs that root mean squares are over, and every so manieth of them that errors are measured on.
TOKENS, TRIED = 4096, 4
# What the weights' error to nearest counts for: about as much of it is left by error feedback and drift.  As many rows tell it.
WEIGHTS_SHARE, ROWS_TRIED = 0.25, 128
# Largest power of two, either way: no product leaves the range of bfloat16 or of E4M3 scales.
REACH = 8


def smooth(adapter: Adapter, layer: Layer, plan: LayerPlan, recipes: Mapping[str, Recipe], stream: Stream) -> dict[str, Tensor]:
    """Scales the layer's channels in place where a `recipe`, by full name, asks for it.  By full name of the linears whose outputs
    are scaled, by what (d_out,).  On all ranks the same, by the first sequences of rank 0."""
    asked = {}
    for scaling in plan.scalings:
        theirs = [recipes.get(layer.full_name(name)) for name in scaling.readers]
        recipe = next((one for one in theirs if one and one.smooth), None)
        if recipe:
            asked[scaling] = recipe
    if not asked:
        return {}
    inputs = sample_inputs(adapter, layer, plan, [scaling.readers[0] for scaling in asked], stream)
    outputs = {}
    for scaling, recipe in asked.items():
        W = torch.cat([layer.linear(name).weight for name in scaling.readers]).float()
        s = choose_channel_scales(inputs[scaling.readers[0]], W, recipe, scaling.outputs(layer), scaling.width)
        stream.ranks.broadcast(s, 0)
        scale_channels(layer, scaling, s)
        if isinstance(layer.module.get_submodule(scaling.maker), nn.Linear):
            outputs[layer.full_name(scaling.maker)] = s
    return outputs


def sample_inputs(adapter: Adapter, layer: Layer, plan: LayerPlan, names: list[str], stream: Stream) -> dict[str, Tensor]:
    """By name, inputs (about `TOKENS`, d_in) of these linears in the stream's first batch, float32."""
    hidden = stream.hidden
    first = slice(0, min(hidden.batch, hidden.groups[0].stop))
    step = max(1, first.stop * hidden.length // TOKENS)
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def work(rows: slice) -> None:
        def observe(seen: Observed) -> None:
            found[seen.name].append(seen.x.flatten(0, -2)[::step].float())

        with closing(LayerPass(adapter, layer, plan, hidden.load(rows))) as one:
            one.observe(names, observe, streams=False)

    each_batch(hidden, "forward", work, groups=[first])
    return {name: torch.cat(parts) for name, parts in found.items()}


def choose_channel_scales(x: Tensor, W: Tensor, recipe: Recipe, outputs: int, width: int | None) -> Tensor:
    """s (outputs,) float32, powers of two, for inputs x (n, d_in) of W (d_out, d_in); `width` as in `Scaling`."""
    assert recipe.activation
    size = x.square().mean(0).view(-1, x.shape[1] // outputs, width or outputs).mean(1).sqrt().flatten()
    tried = x[::TRIED]
    best, least = torch.ones_like(size), None
    for s in candidates(size):
        wide = spread(s, x.shape[1], width)
        error = float(output_error(tried * wide, W / wide, recipe, recipe.activation))
        if least is None or error < least:
            best, least = s, error
    return best


def candidates(size: Tensor) -> Iterator[Tensor]:
    """size^-α for each α, to the nearest power of two, the median channel at 1."""
    logs = size.clamp_min(float(size.max()) * 1e-4).log2().nan_to_num(0, 0, 0)
    for exponent in EXPONENTS:
        wanted = -exponent * (logs - logs.median())
        yield torch.exp2(wanted.round().clamp(-REACH, REACH))


def output_error(x: Tensor, W: Tensor, recipe: Recipe, activation: ActivationFormat) -> Tensor:
    """() sum of squares: of the error in x Wᵀ from rounding x, and the share that counts of that from rounding W."""
    scale = global_scale_of(x.abs().amax(), activation) if activation.calibrated else None
    of_inputs = (fake_quantize(x, activation, scale) - x) @ W.T
    some = W[:: max(1, len(W) // ROWS_TRIED)]
    rounded = rtn(some, None, recipe.format, rule="mse", tensor_scale=choose_tensor_scale(W, recipe.format)).quantized
    of_weights = x @ (rounded.dequantize() - some).T
    return of_inputs.square().sum() + WEIGHTS_SHARE * len(W) / len(some) * of_weights.square().sum()


def spread(s: Tensor, d_in: int, width: int | None) -> Tensor:
    """s (outputs,) as the readers' inputs (d_in,) have it: every `width` of them for as many query heads as share them."""
    return s.view(-1, 1, width or len(s)).expand(-1, d_in // len(s), -1).flatten()


def scale_channels(layer: Layer, scaling: Scaling, s: Tensor) -> None:
    """In place: what makes the input gives s times as much, and those that read it take it back."""
    maker = layer.module.get_submodule(scaling.maker)
    for tensor in maker.parameters():
        tensor.mul_(s.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1)))
    for linear in map(layer.linear, scaling.readers):
        linear.weight.div_(spread(s, linear.in_features, scaling.width).to(linear.weight.dtype))


class Rescaled(Mapping[str, Tensor]):
    """The curvature G of linears' outputs (ptq.calibrate.importance), packed, where some are `outputs` times what they were."""

    def __init__(self, curvature: Mapping[str, Tensor], outputs: Mapping[str, Tensor]):
        self.curvature, self.outputs = curvature, outputs

    def __getitem__(self, name: str) -> Tensor:
        packed = self.curvature[name]
        if name not in self.outputs:
            return packed
        s = self.outputs[name].to(packed.device)
        return packed / pack_symmetric(torch.outer(s, s)).clamp_min(torch.finfo(torch.float32).tiny)

    def __iter__(self) -> Iterator[str]:
        return iter(self.curvature)

    def __len__(self) -> int:
        return len(self.curvature)
