"""How far the quantized model's linears are from the original's, on tokens that were not calibrated on."""

import torch
from torch import Tensor

from ptq.calibrate.activations import Activations, each_batch, embed_all
from ptq.runtime.adapter import Adapter, Layer, LayerPlan
from ptq.runtime.hooks import observe_outputs


class Validation:
    """A few sequences on their way through both models, layer by layer: tokens (n, length) at first, `batch` at once."""

    def __init__(self, adapter: Adapter, tokens: Tensor, batch: int):
        self._adapter, self._tokens = adapter, tokens.split(batch)
        self._original, self._quantized = (embed_all(adapter, self._tokens) for _ in range(2))

    @torch.no_grad()
    def embed(self, embedding: Layer) -> float:
        """The quantized model has this embedding from now on.  ‖ŷ - y‖ / ‖y‖ as `measure`."""
        embed_all(self._adapter, self._tokens, embedding=embedding, hidden=self._quantized)
        y, whole = (states.load(slice(0, len(states))).float() for states in (self._quantized, self._original))
        return float((y - whole).norm() / whole.norm())

    @torch.no_grad()
    def measure(self, original: Layer, layer: Layer, plan: LayerPlan) -> dict[str, float]:
        """Runs the original's layer and the quantized one.  By name inside it, ‖ŷ - y‖ / ‖y‖ of each linear's outputs, y
        being the original's: what its own rounding and all that was quantized before it do together."""
        names, store = [name for group in plan.groups for name in group], not plan.last
        norms: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

        def work(rows: slice) -> None:
            outputs = self._run(layer, names, self._quantized, rows, store=store)
            self._adapter.watch(original, self._adapter.routing(layer) or None)  # experts answer to the same tokens
            whole = self._run(original, names, self._original, rows, store=store)
            for name, y in outputs.items():
                norms[name].append(((y - whole[name]).float().norm(), whole[name].float().norm()))

        each_batch(self._original, "report", work, divisor=self._original.batch if plan.last else 1)
        self._adapter.watch(original, None)
        found = {name: torch.tensor(pairs, device=self._original.device).norm(dim=0) for name, pairs in norms.items() if pairs}
        ratios = torch.stack([lost / whole for lost, whole in found.values()])
        return dict(zip(found, ratios.tolist(), strict=True))

    def _run(self, layer: Layer, names: list[str], states: Activations, rows: slice, *, store: bool) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        linears = {layer.module.get_submodule(name): name for name in names}

        def observe(linear: torch.nn.Module, _x: Tensor, y: Tensor) -> None:
            outputs[linears[linear]] = y

        with observe_outputs(linears, observe):
            output = self._adapter.forward(layer, states.load(rows))
        if store:
            states.store(rows, output)
        return outputs
