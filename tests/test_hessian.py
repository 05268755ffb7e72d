import pytest
import torch

from ptq.calibrate.hessian import Hessian
from ptq.core import linalg
from ptq.core.linalg import (
    NotPositiveDefiniteError,
    block_diagonal,
    damped,
    inverse_cholesky,
    inverse_factor,
    pack_symmetric,
    unpack_symmetric,
)

# Two float32 sums of n products, in any order, differ by at most 2 n eps Σ|x y|.
EPS = torch.finfo(torch.float32).eps
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("block", [None, 16, 32])
@pytest.mark.parametrize("split", [[300], [1, 299], [7] * 42 + [6], [100, 100, 100]])
def test_any_split_of_the_stream_gives_the_one_shot_result(block, split):
    X = torch.randn(300, 64)
    hessian = Hessian(64, block=block)
    for part in X.split(split):
        hessian.add(part)
    exact, bound = (X.double().T @ X.double()) / 300, 2 * EPS * (X.abs().T @ X.abs())
    if block:
        exact, bound = block_diagonal(exact, block), block_diagonal(bound, block)
    assert hessian.tokens == 300
    assert ((hessian.mean() - exact).abs() <= bound).all()


def test_batched_activations_are_flattened_and_bf16_products_are_exact():
    X = torch.randn(2, 5, 32).bfloat16()
    hessian = Hessian(32)
    hessian.add(X)
    x = X.flatten(0, 1).double()
    assert hessian.tokens == 10
    assert torch.allclose(hessian.mean().double(), x.T @ x / 10, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("block", [None, 16])
def test_non_finite_activations_are_refused(value, block):
    X = torch.randn(10, 32)
    X[3, 17] = value
    hessian = Hessian(32, block=block)
    hessian.add(X)
    with pytest.raises(ValueError, match="non-finite activations"):
        hessian.mean()


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="no calibration tokens"):
        Hessian(8).mean()


@pytest.mark.gpu
@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weighted_tokens_on_a_gpu(dtype, block):
    """Weights of squared gradients' size; 16-bit tokens are rounded to bfloat16, by 2⁻⁹ of each element at most."""
    X, w = torch.randn(300, 64).to(dtype), torch.rand(300) * 1e-12
    hessian = Hessian(64, block=block, device="cuda")
    for part in (slice(0, 130), slice(130, 300)):
        hessian.add(X[part].cuda(), w[part].cuda())
    root = w.double().sqrt()[:, None] * X.double()
    exact, magnitude = root.T @ root / w.sum(), root.abs().T @ root.abs() / w.sum()
    if block:
        exact, magnitude = block_diagonal(exact, block), block_diagonal(magnitude, block)
    rounding = 2 * 300 * EPS + (2 * 2.0**-9 + 2.0**-18 if dtype != torch.float32 else 0)
    assert ((hessian.mean().cpu() - exact).abs() <= rounding * magnitude).all()


@pytest.mark.parametrize("shape", [(48, 48), (3, 16, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_damping_has_the_bits_of_its_formula_and_leaves_its_argument_alone(shape, dtype):
    H = torch.randn(shape, dtype=dtype)
    before = H.clone()
    amounts = 0.01 * H.diagonal(dim1=-2, dim2=-1).mean(-1)  # of a batch, each its own
    expected = H + amounts[..., None, None] * torch.eye(shape[-1], dtype=dtype)
    assert torch.equal(damped(H, 0.01), expected) and torch.equal(H, before)


@pytest.mark.parametrize("n", [1, 48, 1500])
def test_inverse_factor(n):
    """1500 columns are factored and inverted by halves."""
    X = torch.randn(2 * n, n, dtype=torch.float64)
    A = damped(X.T @ X / 100, 0.01)
    U = inverse_factor(A)
    assert torch.equal(U, U.triu())
    assert torch.allclose(U.T @ U @ A, torch.eye(n, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(U, torch.linalg.cholesky(torch.linalg.inv(A), upper=True), atol=1e-10)


def test_a_factorization_in_pieces_is_as_exact_as_float32(monkeypatch):
    """Three pieces leave out products below 2⁻²⁴ of a sum's largest, which is what float32 rounds away: errors of one size.  So
    does a product of them solve as exactly."""
    monkeypatch.setattr(linalg, "SMALLEST_IN_PIECES", 128)
    X = torch.randn(1200, 600, dtype=torch.float64) * torch.logspace(0, -2, 600, dtype=torch.float64)
    A, C = damped(X.T @ X / 1200, 0.01), torch.randn(50, 600, dtype=torch.float64)
    exact = torch.linalg.inv(A)
    errors = []
    for pieces in (1, 3):
        monkeypatch.setattr(linalg, "pieces_for", lambda _A, pieces=pieces: pieces)
        inverse, failed = inverse_cholesky(A.float().to(DEVICE), smallest=128)
        assert not failed
        inverse = inverse.double().cpu()
        solved = linalg.multiply_by_inverse(C.float().to(DEVICE), inverse.float().to(DEVICE)).double().cpu()
        errors.append(((inverse.T @ inverse - exact).norm() / exact.norm(), (solved - C @ exact).norm() / (C @ exact).norm()))
    for one, three in zip(*errors, strict=True):
        assert 0 < three < 4 * one


def test_a_matrix_that_is_not_positive_definite_is_refused_with_its_pivot():
    A = torch.diag(torch.tensor([1.0, 2.0, -1.0, 3.0]))
    with pytest.raises(NotPositiveDefiniteError, match="pivot 2 of 4"):
        inverse_factor(A)


@pytest.mark.parametrize("bad", [0, 700, 1499])
def test_the_pivot_is_named_in_the_whole_matrix(bad):
    A = torch.eye(1500, dtype=torch.float64) + 1e-3
    A[bad, bad] = -1
    with pytest.raises(NotPositiveDefiniteError, match=f"pivot {bad} of 1500"):
        inverse_factor(A)


@pytest.mark.parametrize("n", [1, 2, 7, 64, 100, 300])
def test_a_symmetric_matrix_is_kept_exactly_in_half_the_bytes(n):
    X = torch.randn(n, n)
    A = X.tril() + X.tril(-1).T
    packed = pack_symmetric(A, strip=16)
    assert len(packed) <= n * (n + 16) / 2 + 16 * 16  # the triangle, and what is above the diagonal in 16 rows
    assert torch.equal(unpack_symmetric(packed, n, strip=16), A) and torch.equal(unpack_symmetric(pack_symmetric(A), n), A)
    assert torch.equal(pack_symmetric(A.tril(), strip=16), packed)
