"""Token importance (Fisher): w_t = ‖∂L/∂y_t‖², the squared gradient of the loss at the outputs y of linears with one input.

An error Δ in their weights changes its output at token t by Δ x_t, and the loss by about ⟨∂L/∂y_t, Δ x_t⟩.  Weighting H by w_t
makes GPTQ spend its freedom where the model's loss feels it.  (The diagonal-in-tokens form of what GuidedQuant, Kim et al. 2025,
does per group of output channels.)

The same pass can leave, for each linear, the curvature G = Σ g gᵀ of the loss in its outputs, g = ∂L/∂y, for GPTQ's feedback over
rows (ptq.methods.gptq).

One backward pass of the unquantized model, a segment of layers at a time.  On the way up the input of each segment is kept; on the
way down a small batch runs through a segment with its graph, and the gradient comes back through it.  Weights are frozen, so
the graph holds activations only.  Every layer is run twice but those of the last segment, which are run once.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from ptq.calibrate.activations import Activations, belongs_on_host, each_batch, embed_all, propagate
from ptq.calibrate.hessian import add_lower
from ptq.core.linalg import pack_symmetric
from ptq.runtime.adapter import Adapter, Layer
from ptq.runtime.clock import phase
from ptq.runtime.hooks import observe_outputs, observed_tokens

TokenImportance = dict[str, list[Tensor]]
KeepCurvature = Callable[[str, Tensor], object]
Gradient = tuple[nn.Linear, Tensor, Tensor]
"""A linear, its input x (..., d_in) and the gradient g (..., d_out) of the loss at its output."""
SEGMENT = 8
POSITIONS_AT_ONCE = 1024


class Watcher(Protocol):
    """What looks at the backward pass as it goes by."""

    def begin(self, part: Sequence[Layer], inputs: Activations) -> None:
        """The pass comes to these layers, the first of which reads `inputs`."""
        ...

    def see(self, gradients: Sequence[Gradient]) -> None:
        """Of all their linears, for one batch."""
        ...


def token_importance(
    adapter: Adapter,
    batches: Sequence[Tensor],
    *,
    seed: int | None = None,
    first: int = 0,
    segment: int = SEGMENT,
    on_host: bool | None = None,
    groups: Sequence[slice] | None = None,
    curvature: KeepCurvature | None = None,
    watcher: Watcher | None = None,
    progress: Callable[[str], object] = lambda layer: None,
) -> TokenImportance:
    """For the first linear of each group, by full name, and for the head: one tensor (n, length) float32 per batch, not
    normalised.

    The loss is the sum of next-token negative log likelihoods: of the text itself, or with `seed` of labels sampled from the
    model's own predictions, which makes the weights the Fisher information of its outputs.  `first`: the number of the first
    sequence, by which labels are drawn.  `segment`: layers whose graph is kept at once, for two `segment`-ths of a batch;
    `groups`: sequences that no batch mixes.  `curvature` is called with the full name of every linear and its G (d_out, d_out)
    float32, on the device, of which what is above the diagonal may be missing; `progress` with each layer's name on the way
    down.  `watcher` is shown every gradient.
    """
    tokens = torch.cat(list(batches))
    with phase("importance"), torch.no_grad():
        hidden = embed_all(adapter, batches, on_host, groups)
        starts = list(range(0, len(adapter.names), segment))
        kept = climb(adapter, hidden, starts, on_host)
        weights: dict[str, Tensor] = {}
        stops = [*starts[1:], len(adapter.names)]
        layers = adapter.layers(
            [i for start, stop in reversed(list(zip(starts, stops, strict=True))) for i in range(start, stop)]
        )
        for start, stop in reversed(list(zip(starts, stops, strict=True))):
            part = list(islice(layers, stop - start))
            inputs = hidden if stop == len(adapter.names) else kept.pop()
            if watcher is not None:
                watcher.begin(part, inputs)
            ends = tokens if inputs is hidden else None
            descend(adapter, part, inputs, hidden, ends, weights, curvature, watcher, seed, first)
            for layer in reversed(part):
                progress(layer.name)
            del part, inputs
    return {name: list(weight.split(len(batches[0]))) for name, weight in weights.items()}


def climb(adapter: Adapter, hidden: Activations, starts: list[int], on_host: bool | None) -> list[Activations]:
    """Runs `hidden` up to the last segment; returns the inputs of the segments before it."""
    size = hidden.data.numel() * hidden.data.itemsize * len(starts)
    host = belongs_on_host(size, hidden.device) if on_host is None else on_host
    kept: list[Activations] = []
    for layer in adapter.layers(range(starts[-1])):
        if layer.index in starts:
            kept.append(hidden.copy(host))
        propagate(adapter, layer, hidden, "importance")
    return kept


def descend(
    adapter: Adapter,
    part: list[Layer],
    inputs: Activations,
    hidden: Activations,
    tokens: Tensor | None,
    weights: dict[str, Tensor],
    curvature: KeepCurvature | None,
    watcher: Watcher | None,
    seed: int | None,
    first: int,
) -> None:
    """Overwrites `hidden`, which holds ∂L/∂(output of the segment), with ∂L/∂(its input), fills in the segment's `weights` and
    gives away its `curvature`.

    With `tokens` the segment is the last, and the gradient of its output is that of the loss.
    """
    names: dict[nn.Module, tuple[str, str]] = {  # its own, and the first's of its group
        layer.linear(name): (layer.full_name(name), layer.full_name(group[0]))
        for layer in part
        for group in adapter.plan(layer).groups
        for name in group
    }
    head = adapter.head().name
    for first_name in [first_name for _, first_name in names.values()] + ([head] if tokens is not None else []):
        weights[first_name] = torch.zeros(hidden.data.shape[:2], device=hidden.device)
    G = {} if curvature is None else {linear: square(linear.out_features, hidden.device) for linear in names}  # type: ignore[arg-type]

    def work(rows: slice) -> None:
        gradients: list[Gradient] = []
        for _, first_name in names.values():
            weights[first_name][rows] = 0

        def observe(linear: nn.Module, x: Tensor, y: Tensor) -> None:
            tokens, x = observed_tokens(), x.detach()
            assert isinstance(linear, nn.Linear)

            def add(gradient: Tensor) -> None:
                squares = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32).square()
                found = weights[names[linear][1]][rows]
                if tokens is None:
                    found += squares.view_as(found)
                else:
                    found.view(-1).index_add_(0, tokens, squares)
                if curvature is not None or watcher is not None:
                    gradients.append((linear, x, gradient))

            y.register_hook(add)

        with torch.enable_grad(), observe_outputs(names, observe):
            x = y = inputs.load(rows).detach().requires_grad_()
            for layer in part:
                y = adapter.forward(layer, y)
            if tokens is None:
                gradient = hidden.load(rows)
            else:
                gradient, weights[head][rows] = loss_gradient(adapter, y.detach(), tokens[rows], seed, first + rows.start)
            (gradient,) = torch.autograd.grad(y, x, gradient)
        if curvature is not None:  # only now: a batch that runs out of memory comes again
            for linear, _, g in gradients:
                add_lower(G[linear], g.flatten(0, -2))
        if watcher is not None:
            watcher.see(gradients)
        hidden.store(rows, gradient)

    each_batch(hidden, "importance", work, divisor=max(1, len(part) // 2))
    check_gradients({first_name: weights[first_name] for _, first_name in names.values()})
    if curvature is not None:
        for linear, (name, _) in names.items():
            curvature(name, G.pop(linear))


def check_gradients(weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError that names the linear, the last one to run of those whose outputs have a gradient, squared, that is not
    finite: where it came from, on the way down."""
    finite = torch.stack([weight.isfinite().all() for weight in weights.values()]).tolist()
    bad = [name for name, whole in zip(weights, finite, strict=True) if not whole]
    if bad:
        count, size = int((~weights[bad[-1]].isfinite()).sum()), weights[bad[-1]].numel()
        raise ValueError(
            f"{bad[-1]}: the gradient of the loss by its output is not finite, or its square is not, for {count} of {size} tokens; "
            "token importance cannot be had: leave it out with --token-importance none --no-row-feedback, or look at the layers "
            "after this one"
        )


def keep_in(found: dict[str, Tensor]) -> KeepCurvature:
    """Keeps G of every linear in `found` by full name, packed, on the CPU, in G's dtype.

    The sums above the diagonal may differ from those below by their rounding; those below stand for both.  (bfloat16 would take
    the same bytes, and a G of which few directions have most is indefinite in it.)
    """
    return lambda name, G: found.update({name: pack_symmetric(G).cpu()})


def square(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, size, device=device)


def loss_gradient(adapter: Adapter, hidden: Tensor, tokens: Tensor, seed: int | None, first: int) -> tuple[Tensor, Tensor]:
    """∂L/∂hidden of the last layer's output (n, length, d), a sequence and some positions at a time, and the squared gradient at
    the logits (n, length) float32.  `first`: as above.

    The gradient at the logits is softmax - label.  Labels are drawn by exponential races: the smallest E_v / p_v, E_v ~ Exp(1).
    """
    result, squares = torch.zeros_like(hidden), torch.zeros(hidden.shape[:2], device=hidden.device)
    for n in range(len(tokens)):
        generator = None if seed is None else torch.Generator(hidden.device).manual_seed(seed * 1_000_003 + first + n)
        for start in range(0, tokens.shape[1] - 1, POSITIONS_AT_ONCE):
            stop = min(start + POSITIONS_AT_ONCE, tokens.shape[1] - 1)
            with torch.enable_grad():
                x = hidden[n : n + 1, start:stop].detach().requires_grad_()
                logits = adapter.logits(x)
            p = logits.detach().float().softmax(-1)
            labels = tokens[n : n + 1, start + 1 : stop + 1]
            if generator is not None:
                labels = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)
            positions = torch.arange(labels.numel(), device=p.device)
            p.flatten(0, -2).index_put_((positions, labels.flatten()), -torch.ones((), device=p.device), accumulate=True)
            squares[n, start:stop] = p[0].square().sum(-1)
            result[n, start:stop] = torch.autograd.grad(logits, x, p.to(logits.dtype))[0][0]
    return result, squares
