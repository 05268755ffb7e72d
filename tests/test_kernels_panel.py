"""The GPTQ panel kernel against the plain-torch one."""

import pytest
import torch

from ptq.formats import MXFP4, NVFP4
from ptq.hessian import block_diagonal, damped, inverse_factor
from ptq.kernels.panel import sweep, sweep_panel
from ptq.methods.gptq import sweep_panel as reference

RULES = ["absmax", "mse", "local", "schur", "joint"]


def problem(rows, n, seed=0):
    """x (rows, n), the damped Hessian A of correlated inputs, and U."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * n, n, generator=g) @ (torch.eye(n) + 0.3 * torch.randn(n, n, generator=g) / n**0.5)
    A = damped(X.T @ X / len(X), 0.01)
    return torch.randn(rows, n, generator=g) * torch.rand(rows, 1, generator=g).mul(8).sub(4).exp2(), A, inverse_factor(A)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format,n", [(NVFP4, 32), (MXFP4, 32)], ids=["nvfp4", "mxfp4"])
def test_panel_is_that_of_torch(format, n, rule):
    if format is MXFP4 and rule == "schur":
        pytest.skip("as local")
    x, A, U = problem(9, n)
    blocks = block_diagonal(A, format.block), block_diagonal(U, format.block)
    expected = reference(x.clone(), *blocks, U, format, rule)
    found = sweep_panel(x.clone(), *blocks, U, format, rule)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-6 * x.abs().max().item())
