"""GPTQ's loop over panels on the GPU, around the kernels of ptq.kernels.panel (E2M1) and ptq.kernels.int4."""

from collections.abc import Callable

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
    run = launcher(A, U, format, rule)
    x = x.clone(memory_format=torch.contiguous_format)
    q, scales = torch.empty_like(x), x.new_empty(*batch, rows, n // k)
    loss = torch.zeros(*batch, rows, dtype=torch.float64, device=x.device)
    outer = max(panel, outer // panel * panel)
    for group in range(0, n, outer):
        end = min(group + outer, n)
        E = x.new_empty(*batch, rows, end - group)
        for start in range(group, end, panel):
            stop = min(start + panel, end)
            columns, blocks, own = slice(start, stop), slice(start // k, stop // k), slice(start - group, stop - group)
            run(columns, blocks, x[..., columns], q[..., columns], scales[..., blocks], E[..., own], loss)
            add_product(x[..., stop:end], E[..., own], U[..., columns, stop:end], alpha=-1)
        subtract_product(x[..., end:], E, U[..., group:end, end:])
    return q, scales, loss


def launcher(A: Tensor, U: Tensor, format: Format, rule: str) -> Callable[..., None]:
    """run(columns, blocks, x, q, scales, E, loss) for one panel, given by its slices of columns and of blocks."""
    alone = U.dim() == 2
    A, U = (A[None], U[None]) if alone else (A, U)
    factors = block_parts(A, U, format, rule)

    def run(columns: slice, blocks: slice, *parts: Tensor) -> None:
        x, q, scales, E, loss = (part[None] for part in parts) if alone else parts
        launch(x, U[:, columns, columns], [part[:, blocks] for part in factors], q, scales, E, loss, format, rule)

    return run


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
