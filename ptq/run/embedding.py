"""Embeddings in few bits: layer -1, before all others.

What they are given is one-hot, so their Hessian is diagonal and no row can make good what another lost: each is rounded to
nearest, under the scale that its rule finds by the row's own error.  Drift makes it good in the layers after them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ptq.calibrate.activations import embed_all
from ptq.calibrate.passes import Stream
from ptq.calibrate.validation import Validation
from ptq.core.packing import Quantized
from ptq.methods.rtn import quantize
from ptq.run.recipe import Recipe
from ptq.run.record import LayerResult, Record
from ptq.runtime.adapter import Adapter, Layer
from ptq.runtime.clock import now, phase, seconds_between


def quantize_embedding(
    adapter: Adapter,
    recipes: Mapping[str, Recipe],
    batches: Sequence[Tensor],
    stream: Stream | None,
    validation: Validation | None,
    restore: Callable[[Layer], object] | None,
) -> Iterator[LayerResult]:
    """Rounds the embeddings, or restores them, which yields nothing.  With them the quantized model's hidden states, of
    `batches` and of the validation's tokens, begin anew; the original's stay."""
    (layer,) = adapter.layers([-1])
    result = None if restore else round_rows(layer, recipes[layer.full_name("")])
    if restore:
        restore(layer)
    if stream:
        embed_all(adapter, batches, embedding=layer, hidden=stream.hidden)
    error = validation.embed(layer) if validation else None
    if result:
        yield replace(result, records=[replace(one, validation_error=error) for one in result.records])


def round_rows(layer: Layer, recipe: Recipe) -> LayerResult:
    """The embeddings in place; what is known of them, and codes and scales."""
    W, name = layer.weight("").data, layer.full_name("")
    begin = now(W.device)
    with phase("sweep"):
        quantized = quantize(W, recipe.format, rule=recipe.rule)
    end = now(W.device)
    with phase("report"):
        nearest = quantize(W, recipe.format, rule="absmax")
        error, rtn_error = (off(W, one) for one in (quantized, nearest))
        moved = float((quantized.scales != nearest.scales).double().mean())
    W.copy_(quantized.dequantize())
    record = Record(
        name, (W.shape[0], W.shape[1]), recipe.method, recipe.rule, error, rtn_error, certificate=None, moved_scales=moved,
        damp=recipe.damp, dead_inputs=None, tokens=0, seconds=seconds_between(begin, end),
    )  # fmt: skip
    return LayerResult(layer, 0, [record], {name: quantized})


def off(W: Tensor, quantized: Quantized) -> float:
    """‖W - Q‖ / ‖W‖."""
    return float((W.float() - quantized.dequantize()).norm() / W.float().norm())
