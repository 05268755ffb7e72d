"""GPTQ with the block scales chosen inside the loop, on the error-updated weights.

Source: Frantar et al. 2023 (GPTQ), algorithm 1.  Three things differ from it.  The scale of a block is chosen when the block is
reached, so that it fits the weights as earlier errors left them.  Columns are visited in block order: whole blocks by descending
mean diag(H), so that the stored layout stays as it is.  And the loss identity

    Σ err² = tr(Δ (H + damp · I) Δᵀ),   Δ = W - Q,

holds of a correct run up to rounding, whatever the scales: it is returned with the result, and the runner checks it.

On a GPU the E2M1 formats run in a kernel (ptq.kernels.panel), of which `sweep` is the reference.

A dead column (zero row of H) is rounded to nearest by itself: nothing is known about it, so no error enters or leaves it.
"""

import torch
from einops import rearrange
from torch import Tensor

from ptq.clock import phase
from ptq.formats import E2M1, Format
from ptq.hessian import damped, inverse_factor
from ptq.kernels import panel as kernels
from ptq.linalg import block_diagonal
from ptq.methods.solution import Solution
from ptq.packing import Quantized
from ptq.scales import choose_scales, feed_forward


def gptq(
    W: Tensor,
    H: Tensor | None,
    format: Format,
    *,
    rule: str = "local",
    tensor_scale: Tensor,
    damp: float = 0.01,
    panel: int = 128,
    block_order: bool = True,
) -> Solution:
    """W (d_out, d_in) in 4 bits, each column's rounding error pushed onto the columns not yet rounded.

    H (d_in, d_in): mean of x xᵀ.  `damp` is relative to mean(diag H).  `panel`: columns between two large matmuls, a multiple of
    the block; it changes the speed and, up to rounding, nothing else.  Computes in float64 if W is, else in float32.
    Raises NotPositiveDefiniteError where H + damp has no Cholesky factor.
    """
    if H is None or H.dim() != 2:
        raise ValueError("method gptq needs the full Hessian H (d_in, d_in)")
    W = W if W.dtype == torch.float64 else W.float()
    order = visit_order(H, format.block) if block_order else torch.arange(H.shape[0], device=W.device)
    x, A = (W / tensor_scale)[:, order], damped(H, damp).to(W.dtype)[order][:, order]
    with phase("factorization"):
        U = inverse_factor(A)
    run = kernels.sweep if x.is_cuda and format.elements is E2M1 and x.dtype == torch.float32 else sweep
    q, scales, row_loss = run(x, A, U, format, rule, max(format.block, panel // format.block * format.block))

    undo = order.argsort()
    blocks = rearrange(undo, "(b k) -> b k", k=format.block)[:, 0] // format.block
    codes = format.elements.encode(q)[:, undo]
    quantized = Quantized(codes, scales[:, blocks].float().contiguous(), tensor_scale, format)
    delta = (W - quantized.dequantize())[:, order]
    measured = ((delta @ A) * delta).sum(1, dtype=torch.float64)
    return Solution(quantized, row_loss * tensor_scale.double() ** 2, measured)


def visit_order(H: Tensor, block: int) -> Tensor:
    """Columns (d_in,) by descending mean diag(H) of their block, the order inside a block kept; ties keep their place."""
    energy = rearrange(H.diagonal(), "(b k) -> b k", k=block).mean(1)
    blocks = energy.argsort(descending=True, stable=True)
    return (blocks[:, None] * block + torch.arange(block, device=H.device)).flatten()


def sweep(x: Tensor, A: Tensor, U: Tensor, format: Format, rule: str, panel: int) -> tuple[Tensor, Tensor, Tensor]:
    """The loop over panels: values q (r, n) in units of the scale, scales (r, n/block), Σ err² per row (r,) float64.

    x (r, n) is overwritten with the error-updated weights.  A (n, n): damped Hessian.  U (n, n): its inverse factor.
    """
    H_blocks, U_blocks = block_diagonal(A, format.block), block_diagonal(U, format.block)
    x = x.clone()
    q, scales = torch.empty_like(x), x.new_empty(x.shape[0], x.shape[1] // format.block)
    row_loss = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[1], panel):
        stop = min(start + panel, x.shape[1])
        columns, blocks = slice(start, stop), slice(start // format.block, stop // format.block)
        q[:, columns], scales[:, blocks], E = sweep_panel(
            x[:, columns], H_blocks[blocks], U_blocks[blocks], U[columns, columns], format, rule
        )
        x[:, stop:] -= E @ U[columns, stop:]
        row_loss += E.square().sum(1, dtype=torch.float64)
    return q, scales, row_loss


def sweep_panel(
    x: Tensor, H_blocks: Tensor, U_blocks: Tensor, U: Tensor, format: Format, rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    """One panel: q (r, p), scales (r, p/block) and the scaled errors E (r, p), which the caller pushes onto later panels.

    x (r, p) is overwritten.  H_blocks, U_blocks (p/block, block, block): diagonal blocks.  U (p, p): the panel's own.
    """
    q, E = torch.empty_like(x), torch.empty_like(x)
    scales = x.new_empty(x.shape[0], len(H_blocks))
    for b in range(len(H_blocks)):
        columns = slice(b * format.block, (b + 1) * format.block)
        s = choose_scales(x[None, :, columns], format, rule, H_blocks[b, None], U_blocks[b, None]).to(x.dtype)
        values, errors = feed_forward(x[None, :, columns], s, U_blocks[b, None], format.elements)
        q[:, columns], E[:, columns], scales[:, b] = values[0], errors[0], s[0]
        x[:, columns.stop :] -= errors[0] @ U[columns, columns.stop :]
    return q, scales, E
