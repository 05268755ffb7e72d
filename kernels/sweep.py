"""GPTQ's loop over panels on the GPU, around the kernels of ptq.kernels.panel (E2M1) and ptq.kernels.int4."""

import torch
from torch import Tensor

from ptq.core.formats import E2M1, Format
from ptq.core.linalg import block_diagonal
from ptq.core.pieces import add_product, subtract_product
from ptq.core.scales import check_rule
from ptq.kernels import int4
from ptq.kernels import panel as e2m1


def sweep(
    x: Tensor, A: Tensor, U: Tensor, format: Format, rule: str, panel: int, outer: int = 1024
) -> tuple[Tensor, Tensor, Tensor]:
    """As ptq.methods.gptq.sweep: values q (..., r, n), scales (..., r, n/block), Σ err² per row (..., r) float64.

    x (..., r, n) float32, not changed.  A (..., n, n): damped Hessian.  U (..., n, n): its inverse factor.  Two levels: errors
    of a panel go at once to the columns of its group of `outer`, and to those after the group in one matmul when the group is
    done: the same sums, with fewer passes over x.  The panels of INT4 are single blocks.  Raises ValueError for an unknown rule
    or another dtype.
    """
    check_rule(rule, A, U)
    if x.dtype != torch.float32:
        raise ValueError(f"the GPTQ kernels are for float32, not {x.dtype}")
    (*batch, rows, n), k = x.shape, format.block
    panel = panel if format.elements is E2M1 else k
    outer = max(panel, outer // panel * panel)
    x = x.clone(memory_format=torch.contiguous_format)
    q, scales = torch.empty_like(x), x.new_empty(*batch, rows, n // k)
    loss = torch.zeros(*batch, rows, dtype=torch.float64, device=x.device)

    def matrices(*parts: Tensor) -> tuple[Tensor, ...]:
        return parts if batch else tuple(part[None] for part in parts)

    A, own_U, own_x, own_q, own_scales, own_loss = matrices(A, U, x, q, scales, loss)
    factors = [part.split(panel // k, 1) for part in block_parts(A, own_U, format, rule)]
    # Views of all panels at once: made one by one, they take the host as long as the panels take the GPU.
    views = (own_x.split(panel, -1), own_q.split(panel, -1), own_scales.split(panel // k, -1))
    panels = zip(*views, diagonal_panels(own_U, panel), U.split(panel, -2), *factors, strict=True)
    for group in range(0, n, outer):
        stop, end = group, min(group + outer, n)
        E = x.new_empty(*batch, rows, end - group)
        for E_panel, own_E in zip(E.split(panel, -1), matrices(E)[0].split(panel, -1), strict=True):
            x_panel, q_panel, scales_panel, U_panel, U_right, *parts = next(panels)
            launch(x_panel, U_panel, parts, q_panel, scales_panel, own_E, own_loss, format, rule)
            stop += E_panel.shape[-1]
            if left := end - stop:
                add_product(x.narrow(-1, stop, left), E_panel, U_right.narrow(-1, stop, left), alpha=-1)
        subtract_product(x[..., end:], E, U[..., group:end, end:])
    return q, scales, loss


def diagonal_panels(U: Tensor, panel: int) -> list[Tensor]:
    """The diagonal blocks (e, panel, panel) of U (e, n, n), contiguous; the last is smaller where n is no multiple of `panel`."""
    whole = U.shape[-1] // panel * panel
    found = list(block_diagonal(U[:, :whole, :whole], panel).transpose(0, 1).contiguous()) if whole else []
    return found + ([U[:, whole:, whole:].contiguous()] if whole < U.shape[-1] else [])


def block_parts(A: Tensor, U: Tensor, format: Format, rule: str) -> list[Tensor]:
    """What `launch` takes of each block, (e, n/block, …): U's diagonal blocks and the kernel's factors."""
    H_blocks, U_blocks = (block_diagonal(part, format.block).flatten(0, -3) for part in (A, U))
    make = e2m1.block_factors if format.elements is E2M1 else int4.block_factors
    return [part.unflatten(0, (len(U), -1)) for part in (U_blocks, *make(H_blocks, U_blocks, rule))]


def launch(
    x: Tensor, U: Tensor, parts: list[Tensor], q: Tensor, scales: Tensor, E: Tensor, loss: Tensor, format: Format, rule: str
) -> None:
    """One panel, as `e2m1.launch_panel` or `int4.launch_block`.  parts: as `block_parts` gives, of the panel's blocks."""
    U_blocks, *factors = parts
    if format.elements is E2M1:
        e2m1.launch_panel(x, U, U_blocks, factors, q, scales, E, loss, format, rule)
    else:
        int4.launch_block(x, factors, q, scales, E, loss, format, rule)
