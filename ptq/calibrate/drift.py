"""Drift (asymmetric calibration, GPTAQ and Qronos): what the layers before a linear lost, made good by it as far as it can.

When a linear is quantized, its input is no longer the original model's x but x̂, and if its output goes to the residual stream,
that stream is no longer h but ĥ.  The weight that then comes nearest to what the original had is not W but

    T = W + s C (H + λ)⁻¹,   C = mean w (y - ŷ) x̂ᵀ,   H = mean w x̂ x̂ᵀ,   y = W x (+ h),   ŷ = W x̂ (+ ĥ),

the least squares answer of T x̂ (+ ĥ) to y, held at W by the ridge λ; s is how much of it is taken.  GPTQ then rounds T.
(GPTAQ, Li et al. 2025, and Qronos, Zhang et al. 2025, have C without the stream, and no ridge.)

It holds of x̂ as it will be, so a stage's C and H are collected when the stages before it in the same layer are quantized.
Collected all at once, each stage makes the same loss good, and more than half of it in each lets the model diverge.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ptq.calibrate.hessian import add_product, weighted
from ptq.calibrate.observe import Observed
from ptq.core.linalg import NotPositiveDefiniteError, damped, solve_from_right
from ptq.core.pieces import product


class Drift:
    """Sum over calibration tokens, weighted as those of H, of what is to be made good times x̂ᵀ (d_in).

    That is x - x̂ of the inputs (d_in, d_in), shared by the linears of a group, or with `stream` y - ĥ of the one linear that
    adds `factor` times its output to the stream (stream, d_in): W x̂ x̂ᵀ, which C lacks, is known from H.
    """

    def __init__(self, d_in: int, *, stream: int | None = None, factor: float = 1.0, device: torch.device | str = "cpu"):
        self.of_outputs = stream is not None
        self.factor = factor
        self.sum = torch.zeros(stream or d_in, d_in, device=device)

    def observe(self, ours: Observed, theirs: Observed | None, weights: Tensor | None) -> None:
        """Takes in tokens as the quantized model has them, and as the original has the same."""
        assert theirs is not None
        if not self.of_outputs:
            self.add(ours.x, theirs.x - ours.x, weights)
            return
        assert ours.stream is not None and theirs.stream is not None
        lost = theirs.stream - ours.stream
        self.add(ours.x, lost if self.factor == 1 else lost / self.factor, weights)

    def add(self, x: Tensor, lost: Tensor, weights: Tensor | None) -> None:
        """x̂ (..., d_in) of some tokens, what was lost of the same (..., d_in or stream), and what each counts for."""
        x, lost = x.flatten(0, -2), lost.flatten(0, -2)
        if weights is not None:
            x, lost = (weighted(part, weights.to(part.device).flatten()) for part in (x, lost))
        add_product(self.sum, lost, x)

    def sums(self) -> list[Tensor]:
        return [self.sum]

    def merge(self, other: "Drift") -> "Drift":
        """Takes the other's tokens in, and returns itself."""
        self.sum += other.sum
        return self

    def target(
        self, W: Tensor, H: Tensor, weight: Tensor, *, strength: float, ridge: float, rows: slice = slice(None)
    ) -> Tensor:
        """T (..., r, d_in) float32 for W (..., r, d_in), these `rows` of the stage.  H: the mean, of `weight` in all.  `ridge` is
        relative to mean(diag H).

        A dead input (zero row of H) is left as it is: no token says anything about it.
        Raises NotPositiveDefiniteError where H + ridge has no Cholesky factor.
        """
        weight = weight.float()[..., None, None]
        lost = (
            product(W, self.sum) / weight if not self.of_outputs else self.sum[..., rows, :] / weight - product(W, H, pieces=3)
        )
        added, pivot = solve_from_right(lost, damped(H, ridge))
        if pivot:
            raise NotPositiveDefiniteError(f"H + ridge {ridge} is not positive definite (pivot {pivot} of {H.shape[-1]})")
        return W + strength * added

    @classmethod
    def stack(cls, parts: Sequence["Drift"]) -> "Drift":
        """Of several groups alike, side by side: only to ask for their targets."""
        whole = copy.copy(parts[0])
        whole.sum = torch.stack([part.sum for part in parts])
        return whole
