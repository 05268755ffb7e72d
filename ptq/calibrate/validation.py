"""How far the quantized model's linears are from the original's, on tokens that were not calibrated on."""

import torch
from torch import Tensor, nn

from ptq.calibrate.hooks import observe_outputs
from ptq.runtime.adapter import Adapter


class Validation:
    """A few sequences on their way through both models, layer by layer: tokens (n, length) at first."""

    def __init__(self, adapter: Adapter, tokens: Tensor):
        self._adapter = adapter
        self._original = self._quantized = adapter.embed(tokens)
        self._outputs: dict[str, Tensor] = {}

    def before(self, layer: nn.Module) -> None:
        """Runs the original's layer; to be called before it is quantized."""
        self._outputs, self._original = self._run(layer, self._original)

    def after(self, layer: nn.Module) -> dict[str, float]:
        """Runs the quantized layer.  By name inside it, ‖ŷ - y‖ / ‖y‖ of each linear's outputs, y being the original's: what its
        own rounding and all that was quantized before it do together."""
        outputs, self._quantized = self._run(layer, self._quantized)
        before, self._outputs = self._outputs, {}
        errors = torch.stack([(outputs[name] - y).float().norm() / y.float().norm() for name, y in before.items()])
        return dict(zip(before, errors.tolist(), strict=True))

    @torch.no_grad()
    def _run(self, layer: nn.Module, hidden: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        outputs: dict[str, Tensor] = {}
        names = {layer.get_submodule(name): name for stage in self._adapter.stages for name in stage}

        def observe(linear: nn.Module, _x: Tensor, y: Tensor) -> None:
            outputs[names[linear]] = y

        with observe_outputs(names, observe):
            return outputs, self._adapter.forward(layer, hidden)
