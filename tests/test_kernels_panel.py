"""The GPTQ panel kernel against the plain-torch one."""

import pytest
import torch

from ptq.formats import MXFP4, NVFP4
from ptq.hessian import damped, inverse_factor
from ptq.kernels.panel import sweep, sweep_panel
from ptq.linalg import block_diagonal
from ptq.methods.gptq import sweep as reference_sweep
from ptq.methods.gptq import sweep_panel as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = ["absmax", "mse", "local", "schur", "joint"]


def problem(rows, n, seed=0):
    """x (rows, n), the damped Hessian A of correlated inputs, and U."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * n, n, generator=g) @ (torch.eye(n) + 0.3 * torch.randn(n, n, generator=g) / n**0.5)
    A = damped(X.T @ X / len(X), 0.01)
    x = torch.randn(rows, n, generator=g) * torch.rand(rows, 1, generator=g).mul(8).sub(4).exp2()
    return x.to(DEVICE), A.to(DEVICE), inverse_factor(A.double()).float().to(DEVICE)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format,n", [(NVFP4, 32), (MXFP4, 32)], ids=["nvfp4", "mxfp4"])
def test_panel_is_that_of_torch(format, n, rule):
    if format is MXFP4 and rule in ("mse", "schur"):
        pytest.skip("compiles for a minute and tests nothing new")
    x, A, U = problem(9, n)
    blocks = block_diagonal(A, format.block), block_diagonal(U, format.block)
    expected = reference(x.clone(), *blocks, U, format, rule)
    found = sweep_panel(x.clone(), *blocks, U, format, rule)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-6 * x.abs().max().item())


def loss(x, q, scales, A, k):
    """Δ A Δᵀ per row in float64."""
    delta = x.double() - q.double() * scales.double().repeat_interleave(k, 1)
    return ((delta @ A.double()) * delta).sum(1)


@pytest.mark.parametrize("panel,outer", [(16, 16), (16, 32), (48, 48)])
def test_sweep_keeps_the_loss_identity(panel, outer):
    x, A, U = problem(5, 48)
    q, scales, accumulated = sweep(x, A, U, NVFP4, "local", panel, outer)
    torch.testing.assert_close(accumulated, loss(x, q, scales, A, 16), rtol=1e-4, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "format,rule",
    [(NVFP4, rule) for rule in RULES] + [(MXFP4, "local"), (MXFP4, "joint")],
    ids=lambda value: getattr(value, "name", value),
)
def test_sweep_is_that_of_torch(format, rule):
    x, A, U = problem(300, 1024)
    expected = reference_sweep(x, A, U, format, rule, 128)
    for panel, outer in ((128, 128), (128, 512), (96, 1024)):
        q, scales, accumulated = sweep(x, A, U, format, rule, panel, outer)
        torch.testing.assert_close(accumulated, loss(x, q, scales, A, format.block), rtol=1e-4, atol=0)
        # Near-ties fall either way by the rounding of the sums, and what follows in that row then differs.
        assert (scales == expected[1]).float().mean() > 0.99
        assert (q == expected[0]).float().mean() > 0.99
        torch.testing.assert_close(accumulated.sum(), expected[2].sum(), rtol=1e-3, atol=0)
