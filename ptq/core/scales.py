"""How the scale of a block is chosen.

Every rule but `absmax` is a search for the scale with the smallest loss, over every scale of the grid that could win:

    absmax   the largest magnitude meets the largest value
    mse      r · r                            r = x - s · round(x / s), the block's rounding error
    local    rᵀ H_bb r                        what the error does to the layer's output, other blocks being exact
    schur    rᵀ (U_bbᵀ U_bb)⁻¹ r              the same, once the columns after the block have been re-optimised
    joint    Σ err² of GPTQ inside the block  run for each candidate: the exact loss GPTQ adds by this block

All work in units of tensor_scale on x (b, r, k): b column blocks, r rows, k weights.  Ties go to the smaller scale.

Which scales cannot win (so that the result equals the exhaustive search over the whole grid):

- Too small.  Every loss above is Δᵀ M Δ for the block's final error Δ and a positive definite M (for `joint` by the loss
  identity of GPTQ, M = (U_bbᵀ U_bb)⁻¹), so it is at least Δ_i² / (M⁻¹)_ii for each i (Cauchy-Schwarz in the norm of M).
  Clipping alone makes |Δ_i| ≥ |x_i| - 6 s.  Hence s < (|x_i| - √(L (M⁻¹)_ii)) / 6 for any i loses to a scale of known loss L.
  Where M is singular nothing is excluded.
- Too large.  Where |x_i| ≤ s / 4 no value is nearer to x_i than 0, so |Δ_i| ≥ |x_i|, and with |x_i| > √(L (M⁻¹)_ii) for any such
  i the scale loses, as do all larger ones.  If |x_i| ≤ s / 4 for all i, every code is 0, and so it is for all larger scales:
  the smallest of them wins the tie.  For `joint` that holds of the path x takes inside the block when every code is 0, which
  does not depend on s.
- For `mse` alone: where |x_i| ≤ 3 s for all i, each value of the grid of s within reach is also one of the grid of s/2, so s/2
  is at least as good element by element.  (This does not carry over to a loss with off-diagonal terms.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ptq.core.formats import Elements, Format, scale_values

CANDIDATES_AT_ONCE = 16
ELEMENTS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Objective:
    """What a search minimises for blocks x (b, r, k), and what is needed to bound it.

    `loss(x, s, elements)` with s (..., b, r) -> (..., b, r).  `inverse_diagonal` (b, 1, k): diagonal of M⁻¹, inf where M is
    singular.  `reach(x)` (b, r): a scale of reach / dead_zone or more makes every code 0.  `halving`: the mse bound applies.
    """

    loss: Callable[[Tensor, Tensor, Elements], Tensor]
    inverse_diagonal: Tensor
    reach: Callable[[Tensor], Tensor]
    halving: bool = False


def residual(x: Tensor, s: Tensor, elements: Elements) -> Tensor:
    """x - s · round(x / s), s without x's last dimension."""
    s = s[..., None]
    return torch.addcmul(x, s, elements.round(x / s), value=-1)  # the product is exact


def quadratic(M: Tensor) -> Objective:
    """rᵀ M r.  M (b, k, k)."""
    M = or_identity(M)

    def loss(x: Tensor, s: Tensor, elements: Elements) -> Tensor:
        r = residual(x, s, elements)
        return (r @ M * r).sum(-1)

    return Objective(loss, inverse_diagonal(M), largest_magnitude)


def or_identity(M: Tensor) -> Tensor:
    """M (b, k, k), but the identity for a block that no input reaches (M = 0): it is judged by r · r, as nothing else is known."""
    unseen = (M.diagonal(dim1=-2, dim2=-1) == 0).all(-1)[:, None, None]
    return torch.where(unseen, torch.eye(M.shape[-1], dtype=M.dtype, device=M.device), M)


def mse(x: Tensor) -> Objective:
    def loss(x: Tensor, s: Tensor, elements: Elements) -> Tensor:
        return residual(x, s, elements).square().sum(-1)

    return Objective(loss, torch.ones_like(x[:1, :1]), largest_magnitude, halving=True)


def schur(U: Tensor) -> Objective:
    """‖r U_bb⁻¹‖², with U (b, k, k) the diagonal blocks of GPTQ's upper factor."""
    return quadratic(schur_complements(U))


def schur_complements(U: Tensor) -> Tensor:
    """(UᵀU)⁻¹ of each block of U (b, k, k): H_bb once the columns after the block have been re-optimised."""
    inverse = torch.linalg.solve_triangular(U, torch.eye(U.shape[-1], dtype=U.dtype, device=U.device), upper=True)
    return inverse @ inverse.mT


def joint(U: Tensor) -> Objective:
    """Σ err² of the GPTQ recursion inside the block.  U (b, k, k) as for `schur`."""

    def loss(x: Tensor, s: Tensor, elements: Elements) -> Tensor:
        return round_with_feedback(x, s, U, elements)[1].square().sum(-1)

    def reach(x: Tensor) -> Tensor:
        left, path = x.clone(), []
        for c in range(x.shape[-1]):
            path.append(left[..., c].abs())
            left = left - (left[..., c, None] / U[:, None, c, c, None]) * U[:, None, c]
        return torch.stack(path).amax(0)

    return Objective(loss, (U * U).sum(-2)[:, None], reach)


def round_with_feedback(x: Tensor, s: Tensor, U: Tensor, elements: Elements) -> tuple[Tensor, Tensor]:
    """GPTQ inside a block: round column by column, push each column's error onto the ones after it.

    x (b, r, k), s (..., b, r), U (b, k, k) upper.  Returns the rounded values in units of s and the errors
    E_c = (x_c - s q_c) / U_cc, both (..., b, r, k).  The loss identity: Σ E² = Δᵀ (Uᵀ U)⁻¹ Δ with Δ = x - s q.
    """
    # Columns first in memory, so that what is done to one goes along it.
    (b, r, k), more = x.shape, [1] * (s.dim() - 2)
    left = x.movedim(-1, 0).reshape(k, *more, b, r).expand(k, *s.shape).clone(memory_format=torch.contiguous_format)
    q, E = torch.empty_like(left), torch.empty_like(left)
    for c in range(k):
        q[c] = elements.round(left[c] / s)
        E[c] = (left[c] - s * q[c]) / U[:, c, c, None]
        left[c + 1 :] -= E[c] * U[:, c, c + 1 :].mT.reshape(k - c - 1, *more, b, 1)
    return q.movedim(0, -1), E.movedim(0, -1).contiguous()


def largest_magnitude(x: Tensor) -> Tensor:
    return x.abs().amax(-1)


def inverse_diagonal(M: Tensor) -> Tensor:
    """Diagonal of M⁻¹ (b, 1, k), in float64 and 0.1 % too large, so that rounding cannot exclude a winner; inf if singular."""
    L, info = torch.linalg.cholesky_ex(M.double())
    L = torch.where((info > 0)[:, None, None], torch.eye(M.shape[-1], dtype=L.dtype, device=L.device), L)
    columns = torch.linalg.solve_triangular(L, torch.eye(M.shape[-1], dtype=L.dtype, device=L.device), upper=False)
    diagonal = 1.001 * columns.square().sum(-2)
    return torch.where((info > 0)[:, None], torch.inf, diagonal).to(M.dtype)[:, None]


RULES: dict[str, Callable[[Tensor, Tensor, Tensor], Objective] | None] = {
    "absmax": None,
    "mse": lambda x, H, U: mse(x),
    "local": lambda x, H, U: quadratic(H),
    "schur": lambda x, H, U: schur(U),
    "joint": lambda x, H, U: joint(U),
}


def choose_scales(x: Tensor, format: Format, rule: str, H: Tensor | None = None, U: Tensor | None = None) -> Tensor:
    """Scales (b, r), float32 values of the format's grid, for blocks x (b, r, k) in units of tensor_scale.

    H (b, k, k): diagonal blocks of the damped Hessian (rule `local`).  U (b, k, k): diagonal blocks of the factor of the damped
    inverse (`schur`, `joint`).  Raises ValueError for an unknown rule or a missing H or U.
    """
    check_rule(rule, H, U)
    make = RULES[rule]
    if make is None:
        return format.absmax(largest_magnitude(x))
    rows = max(1, ELEMENTS_AT_ONCE // (CANDIDATES_AT_ONCE * x.shape[0] * x.shape[2]))
    objective = make(x, H, U)  # type: ignore[arg-type]  # a rule that ignores H or U takes None
    return torch.cat([search(part, objective, format) for part in x.split(rows, dim=1)], dim=1)


def as_blocks(x: Tensor, block: int) -> Tensor:
    """The column blocks (b, r, block) of x (..., r, n), those of all matrices of a batch one after the other."""
    return rearrange(x, "... r (b k) -> ... b r k", k=block).flatten(0, -3)


def check_rule(rule: str, H: Tensor | None, U: Tensor | None = None) -> None:
    """Raises ValueError for an unknown rule or one that lacks its H or U."""
    if rule not in RULES:
        raise ValueError(f"unknown scale rule {rule!r}; there are {', '.join(RULES)}")
    if rule == "local" and H is None:
        raise ValueError("scale rule 'local' needs the block Hessians H")
    if rule in ("schur", "joint") and U is None:
        raise ValueError(f"scale rule {rule!r} needs the factor U, which method gptq computes")


def search(x: Tensor, objective: Objective, format: Format) -> Tensor:
    """The scale of smallest loss for each block of x (b, r, k), the smaller one on a tie: (b, r) float32."""
    values = scale_values(format.grid, x.device)
    lower, upper = window(x, objective, format, values)
    best = torch.full_like(x[..., 0], torch.inf)
    best_rank = lower.clone()
    steps = torch.arange(0, int((upper - lower).max()) + format.grid.stride, format.grid.stride, device=x.device)
    for chunk in steps.split(CANDIDATES_AT_ONCE):
        rows = (upper - lower >= chunk[0]).any(0).nonzero()[:, 0]  # of which a block has such candidates
        rank = torch.minimum(lower[:, rows] + chunk[:, None, None], upper[:, rows])
        loss, at = objective.loss(x[:, rows], values[rank].to(x.dtype), format.elements).min(dim=0)
        rank = rank.gather(0, at[None])[0]
        best_rank[:, rows] = torch.where(loss < best[:, rows], rank, best_rank[:, rows])
        best[:, rows] = torch.minimum(loss, best[:, rows])
    return values[best_rank]


def window(x: Tensor, objective: Objective, format: Format, values: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks (b, r) of the smallest and the largest scale that can win; see the module's docstring."""
    elements, grid = format.elements, format.grid
    absmax = format.absmax(largest_magnitude(x))
    known = objective.loss(x, absmax.to(x.dtype), elements)
    room = (known[..., None] * objective.inverse_diagonal).sqrt()
    clipped = (x.abs() - room).amax(-1) / elements.saturation
    zeroing = objective.reach(x).minimum(torch.where(x.abs() > room, x.abs(), torch.inf).amin(-1)) / elements.dead_zone
    if objective.halving:
        zeroing = torch.minimum(zeroing, (largest_magnitude(x) / elements.halving_range).clamp(grid.halves_from))
    start = torch.searchsorted(values, absmax)
    lower = torch.searchsorted(values, (clipped * 0.999).float()).minimum(start)
    lower = start - grid.stride * ((start - lower + grid.stride - 1) // grid.stride)
    lower = torch.where(lower < 0, lower + grid.stride, lower)
    upper = torch.searchsorted(values, (zeroing * 1.001).float()).clamp(max=len(values) - 1)
    return lower, torch.maximum(upper, start)
