"""The kernels of GPTQ against plain torch."""

from dataclasses import replace

import pytest
import torch

from ptq.core.formats import INT4_G128, MXFP4, NVFP4
from ptq.core.linalg import block_diagonal, damped, inverse_factor
from ptq.kernels import int4
from ptq.kernels.sweep import sweep
from ptq.methods.gptq import sweep as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = ["absmax", "mse", "local", "schur", "joint"]
SMALL_INT4 = replace(INT4_G128, name="int4 in blocks of 32", block=32)


def problem(rows, n, seed=0):
    """x (rows, n), the damped Hessian A of correlated inputs, and U."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * n, n, generator=g) @ (torch.eye(n) + 0.3 * torch.randn(n, n, generator=g) / n**0.5)
    A = damped(X.T @ X / len(X), 0.01)
    x = torch.randn(rows, n, generator=g) * torch.rand(rows, 1, generator=g).mul(8).sub(4).exp2()
    return x.to(DEVICE), A.to(DEVICE), inverse_factor(A.double()).float().to(DEVICE)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", [NVFP4, MXFP4, SMALL_INT4], ids=lambda format: format.name)
def test_a_panel_is_that_of_torch(format, rule):
    if format is MXFP4 and rule in ("mse", "schur"):
        pytest.skip("compiles for a minute and tests nothing new")
    x, A, U = problem(9, 32)
    expected = reference(x, A, U, format, rule, 32)
    q, scales, accumulated = sweep(x, A, U, format, rule, 32)
    assert torch.equal(scales, expected[1])
    assert torch.equal(q, expected[0])
    torch.testing.assert_close(accumulated, expected[2], rtol=1e-4, atol=0)


@pytest.mark.parametrize("rule", ["mse", "joint"])
def test_int4_of_zeros_and_of_one_weight(rule):
    x, A, U = problem(3, 32)
    x[0] = 0
    x[1, 1:] = 0
    x[2] *= 2.0**-130  # subnormal: the smallest scale makes every code 0
    expected = reference(x, A, U, SMALL_INT4, rule, 32)
    q, scales, _ = sweep(x, A, U, SMALL_INT4, rule, 32)
    assert torch.equal(scales, expected[1]) and torch.equal(q, expected[0])
    assert scales[0] == scales[2] == 2.0**-126 and not q[0].any() and not q[2].any() and q[1, 0] and not q[1, 1:].any()


def test_int4_of_a_batch_is_that_of_torch():
    x, A, U = (torch.stack(part) for part in zip(problem(5, 32), problem(5, 32, seed=1), strict=True))
    expected = reference(x, A, U, SMALL_INT4, "joint", 32)
    q, scales, _ = sweep(x, A, U, SMALL_INT4, "joint", 32)
    assert torch.equal(scales, expected[1]) and torch.equal(q, expected[0])


def test_int4_factors_give_the_quadratic_form_and_its_bound():
    _, A, U = problem(1, 64)
    H, V = block_diagonal(A, 32), block_diagonal(U, 32)
    H[1] = -H[1]  # has no Cholesky factor
    *_, R, _, d, c = int4.block_factors(H, V, "local")
    G = R * d[:, None]
    torch.testing.assert_close(G[0] @ G[0].T, H[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(d, G.diagonal(dim1=-2, dim2=-1)) and torch.equal(G[1], torch.eye(32, device=DEVICE))
    torch.testing.assert_close(c[0].square(), torch.linalg.inv(H[0]).diagonal(), rtol=1e-3, atol=0)
    assert (c[1] == 1e18).all()


def loss(x, q, scales, A, k):
    """Δ A Δᵀ per row in float64."""
    delta = x.double() - q.double() * scales.double().repeat_interleave(k, 1)
    return ((delta @ A.double()) * delta).sum(1)


@pytest.mark.parametrize(
    "format,panel,outer",
    [(NVFP4, 16, 16), (NVFP4, 16, 32), (NVFP4, 64, 64), (SMALL_INT4, 64, 64)],
    ids=lambda value: getattr(value, "name", value),
)
def test_sweep_keeps_the_loss_identity(format, panel, outer):
    x, A, U = problem(5, 64)
    q, scales, accumulated = sweep(x, A, U, format, "local", panel, outer)
    torch.testing.assert_close(accumulated, loss(x, q, scales, A, format.block), rtol=1e-4, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "format,rule",
    [(NVFP4, rule) for rule in RULES]
    + [(MXFP4, "local"), (MXFP4, "joint")]
    + [(INT4_G128, rule) for rule in RULES]
    + [(replace(INT4_G128, name="int4 in blocks of 256", block=256), "joint")],
    ids=lambda value: getattr(value, "name", value),
)
def test_sweep_is_that_of_torch(format, rule):
    x, A, U = problem(300, 1024)
    expected = reference(x, A, U, format, rule, 256)
    for panel, outer in ((128, 128), (128, 512), (96, 1024)):
        q, scales, accumulated = sweep(x, A, U, format, rule, panel, outer)
        torch.testing.assert_close(accumulated, loss(x, q, scales, A, format.block), rtol=1e-4, atol=0)
        # Near-ties fall either way by the rounding of the sums, and what follows in that row then differs.
        assert (scales == expected[1]).float().mean() > 0.99
        assert (q == expected[0]).float().mean() > 0.99
        torch.testing.assert_close(accumulated.sum(), expected[2].sum(), rtol=1e-3, atol=0)
