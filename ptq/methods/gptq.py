"""GPTQ with the block scales chosen inside the loop, on the error-updated weights.

Source: Frantar et al. 2023 (GPTQ), algorithm 1.  Three things differ from it.  The scale of a block is chosen when the block is
reached, so that it fits the weights as earlier errors left them.  Columns are visited in block order: whole blocks by descending
mean diag(H), so that the stored layout stays as it is.  And the loss identity

    Σ err² = tr(Δ (H + damp · I) Δᵀ),   Δ = W - Q,

holds of a correct run up to rounding, whatever the scales: it is returned with the result, and the runner checks it.

With the curvature G of the loss in the linear's outputs, the loss is taken as tr(G Δ H Δᵀ) (Tseng et al. 2025, YAQA), and the same
recursion runs over rows: when a panel of rows is done, what its error does to the loss is made good by the rows still to come.
The rows of a panel are rounded as if their outputs were independent.

On a GPU float32 runs in kernels (ptq.kernels.sweep), of which `sweep` is the reference; with row feedback in
ptq.kernels.wavefront, of which `sweep_one_by_one` is.

A dead column (zero row of H) is rounded to nearest by itself: nothing is known about it, so no error enters or leaves it.

Matrices of one shape (the experts of a mixture) may come as a batch: everything then has one more dimension in front.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import gcd

import torch
from einops import rearrange
from torch import Tensor

from ptq.core.formats import Format
from ptq.core.linalg import block_diagonal, damped, in_order, inverse_factor
from ptq.core.packing import Quantized
from ptq.core.pieces import product
from ptq.core.scales import as_blocks, choose_scales, round_with_feedback
from ptq.kernels import sweep as kernels
from ptq.kernels.wavefront import sweep_tiles
from ptq.methods.solution import Solution
from ptq.runtime.checks import check_float32
from ptq.runtime.clock import phase
from ptq.runtime.threads import threads_for

# Relative to mean(diag G).  Output gradients of neighbouring channels are less alike than inputs, and G is known less well than H.
DAMP_ROWS = 0.1
REMEDY_ROWS = "more calibration tokens help, or leave row feedback out (--no-row-feedback)"


def gptq(
    W: Tensor,
    H: Tensor | None,
    format: Format,
    *,
    rule: str = "local",
    tensor_scale: Tensor,
    damp: float = 0.01,
    G: Tensor | None = None,
    panel: int = 128,
    row_panel: int | None = None,
    block_order: bool = True,
    frozen: bool = False,
) -> Solution:
    """W (..., d_out, d_in) in 4 bits, each column's rounding error pushed onto the columns not yet rounded.

    H (..., d_in, d_in): mean of x xᵀ.  tensor_scale (...).  `damp` is relative to mean(diag H).  `panel`: columns between two
    large matmuls, a multiple of the block; it changes the speed and, up to rounding, nothing else.  G (..., d_out, d_out): mean
    of g gᵀ over tokens, g being the gradient of the loss at the outputs; rows are then visited by descending G_ii, `row_panel`
    at a time (without: `rows_at_once`).  `frozen`: scales are those of W, chosen before any error is fed forward, as other
    systems have it; for comparison, and in plain torch everywhere.  Computes in float64 if W is, else in float32.  Raises
    NotPositiveDefiniteError where H + damp or G + damp has no Cholesky factor, and ValueError for weights that are not finite
    and as `check_float32`.
    """
    check_float32()
    if H is None or H.dim() != W.dim():
        raise ValueError("method gptq needs the full Hessian H (d_in, d_in)")
    if not W.isfinite().all():  # the factorization waits for the device too
        raise ValueError("W holds non-finite values")
    W = W if W.dtype == torch.float64 else W.float()
    columns = torch.arange(H.shape[-1], device=W.device).expand(H.shape[:-1])
    order, units = visit_order(H, format.block or 1) if block_order else columns, tensor_scale[..., None, None]
    x, A = in_order(W / units, order, -1), damped(H, damp, order).to(W.dtype)
    with phase("factorization"):
        U = inverse_factor(A)
    run = kernels.sweep if x.is_cuda and x.dtype == torch.float32 and format.block else sweep
    run = partial(sweep, frozen=True) if frozen else run
    panel = max(format.block, panel // format.block * format.block) if format.block else panel
    sweep_rows = partial(run, A=A, U=U, format=format, rule=rule, panel=panel)
    if G is None:
        q, scales, row_loss = sweep_rows(x)
    else:
        in_tiles = partial(sweep_tiles, A=A, U=U, format=format, rule=rule, panel=panel)
        sweep_panels = in_tiles if run is kernels.sweep else partial(sweep_one_by_one, sweep_rows=sweep_rows)
        q, scales, row_loss = sweep_row_panels(x, G, sweep_panels, row_panel or rows_at_once(x.shape[-2]))

    undo, span = order.argsort(), format.span(x.shape[-1])
    codes = in_order(format.elements.encode(q), undo, -1)
    scales = in_order(scales, undo[..., ::span] // span, -1).float().contiguous()
    quantized = Quantized(codes, scales, tensor_scale, format)
    delta = x * units - in_order(quantized.dequantize(), order, -1).to(W.dtype)
    measured = (product(delta, A) * delta).sum(-1, dtype=torch.float64)
    return Solution(quantized, row_loss * tensor_scale.double()[..., None] ** 2, measured)


def rows_at_once(rows: int) -> int:
    """32, or a 48th of the rows where that is more (docs/log.md has what it costs)."""
    return max(32, rows // 48)


def sweep_row_panels(
    x: Tensor, G: Tensor, sweep_panels: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]], row_panel: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What sweep_panels(x, V, row_panel) returns, `sweep_one_by_one` or the like, of rows by descending diag(G).

    V (..., r, r): the factor of (G + damp)⁻¹ = Vᵀ V in that order.  x (..., r, n) is overwritten with the weights each panel was
    swept from.
    """
    order = G.diagonal(dim1=-2, dim2=-1).argsort(descending=True, stable=True)
    undo, moved = order.argsort(), in_order(x, order, -2)
    V = inverse_factor(damped(G.to(x.dtype), DAMP_ROWS, order), name="G", remedy=REMEDY_ROWS)
    parts = sweep_panels(moved, V, row_panel)
    x.copy_(in_order(moved, undo, -2))
    q, scales, loss = (in_order(part, undo, -2) for part in (*parts[:2], parts[2][..., None]))
    return q, scales, loss[..., 0]


def sweep_one_by_one(
    x: Tensor, V: Tensor, row_panel: int, sweep_rows: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """What sweep_rows(x) returns, but for one panel of rows after the other.

    Panel p of x (..., r, n) leaves the error Δ_p = x_p - Q_p, and the rows after it move by -V_p,laterᵀ V_pp⁻ᵀ Δ_p, in place.
    """
    parts = []
    for start in range(0, x.shape[-2], row_panel):
        own, later = slice(start, start + row_panel), slice(start + row_panel, None)
        target = x[..., own, :]
        q, scales, loss = sweep_rows(target)
        values = (rearrange(q, "... (b k) -> ... b k", b=scales.shape[-1]) * scales[..., None]).flatten(-2)
        E = torch.linalg.solve_triangular(V[..., own, own].mT, target - values, upper=False)
        x[..., later, :] -= V[..., own, later].mT @ E
        parts.append((q, scales, loss))
    q, scales, loss = zip(*parts, strict=True)
    return torch.cat(q, -2), torch.cat(scales, -2), torch.cat(loss, -1)


def visit_order(H: Tensor, block: int) -> Tensor:
    """Columns (..., d_in) by descending mean diag(H) of their block, the order inside a block kept; ties keep their place."""
    energy = rearrange(H.diagonal(dim1=-2, dim2=-1), "... (b k) -> ... b k", k=block).mean(-1)
    blocks = energy.argsort(descending=True, stable=True)
    return (blocks[..., None] * block + torch.arange(block, device=H.device)).flatten(-2)


def sweep(
    x: Tensor,
    A: Tensor,
    U: Tensor,
    format: Format,
    rule: str,
    panel: int,
    frozen: bool = False,
    fixed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loop over panels: values q (..., r, n) in units of the scale, scales (..., r, n/block), Σ err² per row (..., r) float64.

    A (..., n, n): damped Hessian.  U (..., n, n): its inverse factor.  `frozen`: scales are those of x (..., r, n) as it comes;
    where a row has one scale there are no others.  `fixed` (..., n/block, r): scales to take instead of the rule's.
    """
    *batch, rows, n = x.shape
    if not format.block:
        scale = choose_scales(x.view(-1, rows, n), format, rule).view(*batch, 1, rows)
        parts = replace(format, block=gcd(n, panel))
        q, scales, loss = sweep(x, A, U, parts, rule, panel, fixed=scale.expand(*batch, n // parts.block, rows))
        return q, scales[..., :1], loss
    H_blocks, U_blocks = block_diagonal(A, format.block), block_diagonal(U, format.block)
    if frozen:
        parts = as_blocks(x, format.block)
        fixed = choose_scales(parts, format, rule, H_blocks.flatten(0, -3), U_blocks.flatten(0, -3)).view(*batch, -1, rows)
    x = x.clone()
    q, scales = torch.empty_like(x), x.new_empty(*batch, rows, n // format.block)
    row_loss = torch.zeros(*batch, rows, dtype=torch.float64, device=x.device)
    with threads_for(x.shape[:-1].numel()):
        for start in range(0, n, panel):
            stop = min(start + panel, n)
            columns, blocks = slice(start, stop), slice(start // format.block, stop // format.block)
            q[..., columns], scales[..., blocks], E = sweep_panel(
                x[..., columns],
                H_blocks[..., blocks, :, :],
                U_blocks[..., blocks, :, :],
                U[..., columns, columns],
                format,
                rule,
                None if fixed is None else fixed[..., blocks, :],
            )
            x[..., stop:] -= E @ U[..., columns, stop:]
            row_loss += E.square().sum(-1, dtype=torch.float64)
    return q, scales, row_loss


def sweep_panel(
    x: Tensor, H_blocks: Tensor, U_blocks: Tensor, U: Tensor, format: Format, rule: str, fixed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One panel: q (..., r, p), scales (..., r, p/block) and the scaled errors E (..., r, p), which the caller pushes onto later
    panels.

    x (..., r, p) is overwritten.  H_blocks, U_blocks (..., p/block, block, block): diagonal blocks.  U (..., p, p): the panel's
    own.  `fixed` (..., p/block, r): scales to take instead of the rule's.
    """
    q, E = torch.empty_like(x), torch.empty_like(x)
    scales = x.new_empty(*x.shape[:-1], H_blocks.shape[-3])
    for b in range(scales.shape[-1]):
        columns = slice(b * format.block, (b + 1) * format.block)
        own, H_block, U_block = (as_batch(part) for part in (x[..., columns], H_blocks[..., b, :, :], U_blocks[..., b, :, :]))
        s = choose_scales(own, format, rule, H_block, U_block) if fixed is None else fixed[..., b, :].view(own.shape[:-1])
        values, errors = round_with_feedback(own, s.to(x.dtype), U_block, format.elements)
        q[..., columns], scales[..., b] = values.view_as(q[..., columns]), s.view(x.shape[:-1])
        E[..., columns] = errors = errors.view_as(q[..., columns])
        x[..., columns.stop :] -= errors @ U[..., columns, columns.stop :]
    return q, scales, E


def as_batch(x: Tensor) -> Tensor:
    """One matrix as a batch of one."""
    return x if x.dim() == 3 else x[None]
