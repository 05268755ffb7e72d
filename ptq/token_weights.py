"""How much each calibration token matters: w_t = ‖∂L/∂y_t‖², the squared gradient of the loss at a stage's outputs y.

An error Δ in a stage's weights changes its output at token t by Δ x_t, and the loss by about ⟨∂L/∂y_t, Δ x_t⟩.  Weighting H by w_t
makes GPTQ spend its freedom where the model's loss feels it.  (The diagonal-in-tokens form of what GuidedQuant, Kim et al. 2025,
does per group of output channels.)

One backward pass of the unquantized model, layer by layer: the input of every layer is kept on the CPU on the way up, and on the
way down each layer is run once more with its input requiring a gradient.  Weights are frozen, so nothing else is stored.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ptq.adapter import Adapter
from ptq.watch import watch_linears

TokenWeights = dict[str, list[Tensor]]
Layer = tuple[str, nn.Module]


def token_weights(
    adapter: Adapter,
    batches: Sequence[Tensor],
    *,
    seed: int | None = None,
    progress: Callable[[list[Layer]], Iterable[Layer]] = list,
) -> TokenWeights:
    """For the first linear of each stage, by full name: one tensor (n, length) float32 per batch, not normalised.

    The loss is the sum of next-token negative log likelihoods: of the text itself, or with `seed` of labels sampled from the
    model's own predictions, which makes the weights the Fisher information of its outputs.  `progress` may wrap the layers of the
    way down to show how far it is.
    """
    generator = None if seed is None else torch.Generator(batches[0].device).manual_seed(seed)
    layers = list(adapter.layers())
    inputs: list[list[Tensor]] = []
    with torch.no_grad():
        hidden = [adapter.embed(tokens) for tokens in batches]
        for _, layer in layers:
            inputs.append([x.to("cpu") for x in hidden])
            for i, x in enumerate(hidden):
                hidden[i] = adapter.forward(layer, x)
    gradients = [loss_gradient(adapter, x, tokens, generator) for x, tokens in zip(hidden, batches, strict=True)]
    weights: TokenWeights = {}
    for prefix, layer in progress(layers[::-1]):
        kept = inputs.pop()
        for i, x in enumerate(kept):
            gradients[i] = layer_gradient(adapter, prefix, layer, x.to(gradients[i].device), gradients[i], weights)
    return weights


def loss_gradient(adapter: Adapter, hidden: Tensor, tokens: Tensor, generator: torch.Generator | None) -> Tensor:
    """∂L/∂hidden of the last layer's output (n, length, d), a sequence at a time."""
    parts = []
    for x, labels in zip(hidden.split(1), tokens.split(1), strict=True):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = adapter.logits(x)[:, :-1].float().flatten(0, 1)
            labels = labels[:, 1:].flatten()
            if generator is not None:
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            parts.append(torch.autograd.grad(loss, x)[0])
    return torch.cat(parts)


def layer_gradient(
    adapter: Adapter, prefix: str, layer: nn.Module, x: Tensor, gradient: Tensor, weights: TokenWeights
) -> Tensor:
    """∂L/∂x from ∂L/∂(layer output); appends the weights of the layer's stages to `weights` as the gradient passes."""
    outputs: dict[nn.Module, Tensor] = {}
    linears = {layer.get_submodule(name): stage[0] for stage in adapter.stages for name in stage}

    def keep(module: nn.Module, _x: Tensor, y: Tensor) -> None:
        outputs[module] = y

    with torch.enable_grad(), watch_linears(list(linears), keep):
        x = x.detach().requires_grad_()
        y = adapter.forward(layer, x)
        grads = torch.autograd.grad(y, [x, *(outputs[module] for module in linears)], gradient)
    sums: dict[str, Tensor] = {}
    for stage, g in zip(linears.values(), grads[1:], strict=True):
        energy = g.float().square().sum(-1)
        sums[stage] = sums[stage] + energy if stage in sums else energy
    for stage, energy in sums.items():
        weights.setdefault(f"{prefix}.{stage}", []).append(energy)
    return grads[0]
