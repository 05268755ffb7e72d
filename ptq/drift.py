"""What the layers before a linear lost, made good by it as far as it can.

When a linear is quantized, its input is no longer the original model's x but x̂, and if its output goes to the residual stream,
that stream is no longer h but ĥ.  The weight that then comes nearest to what the original had is not W but

    T = W + s (W D + R) (H + λ)⁻¹,   D = mean w (x - x̂) x̂ᵀ,   R = mean w (h - ĥ) x̂ᵀ,   H = mean w x̂ x̂ᵀ,

the least squares answer of T x̂ + ĥ to W x + h, held at W by the ridge λ; s is how much of it is taken.  GPTQ then rounds T.
(GPTAQ, Li et al. 2025, and Qronos, Zhang et al. 2025, take D without the stream and without the ridge.)

It holds of x̂ as it will be, so a stage's D and H are collected when the stages before it in the same layer are quantized.
Collected all at once, each stage makes the same loss good, and more than half of it in each lets the model diverge.
"""

import torch
from torch import Tensor

from ptq.hessian import NotPositiveDefiniteError, add_product, damped, weighted


class Drift:
    """Sums over calibration tokens, weighted as those of H: D (d_in, d_in), and R (d_stream, d_in) where `stream` is given."""

    def __init__(self, d_in: int, *, stream: int | None = None, device: torch.device | str = "cpu"):
        self.inputs = torch.zeros(d_in, d_in, device=device)
        self.stream = None if stream is None else torch.zeros(stream, d_in, device=device)

    def add(self, x: Tensor, original: Tensor, gap: Tensor | None, weights: Tensor | None) -> None:
        """x̂ (..., d_in) of some tokens, x of the same, h - ĥ (..., d_stream) if the stream counts, and what each counts for."""
        left = [original - x] if gap is None else [original - x, gap]
        tokens = [part.flatten(0, -2) for part in (x, *left)]
        if weights is not None:
            tokens = [weighted(part, weights.to(part.device).flatten()) for part in tokens]
        for total, part in zip((self.inputs, self.stream), tokens[1:], strict=False):
            assert total is not None
            add_product(total, part, tokens[0])

    def merge(self, other: "Drift") -> "Drift":
        """Takes the other's tokens in, and returns itself."""
        for mine, theirs in zip(self.sums(), other.sums(), strict=True):
            mine += theirs
        return self

    def sums(self) -> list[Tensor]:
        return [self.inputs] if self.stream is None else [self.inputs, self.stream]

    def target(self, W: Tensor, H: Tensor, weight: Tensor, *, strength: float, ridge: float) -> Tensor:
        """T (d_out, d_in) float32 for W (d_out, d_in).  H: the mean, of `weight` in all.  `ridge` is relative to mean(diag H).

        A dead input (zero row of H) is left as it is: no token says anything about it.
        Raises NotPositiveDefiniteError where H + ridge has no Cholesky factor.
        """
        gap = W @ (self.inputs / weight.float())
        if self.stream is not None:
            gap += self.stream / weight.float()
        factor, info = torch.linalg.cholesky_ex(damped(H, ridge))
        if int(info):
            raise NotPositiveDefiniteError(f"H + ridge {ridge} is not positive definite (pivot {int(info)} of {len(H)})")
        return W + strength * torch.cholesky_solve(gap.T, factor).T
