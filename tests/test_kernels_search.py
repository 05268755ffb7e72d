"""The searches against the exhaustive one over every scale, in float64."""

import pytest
import torch
from einops import rearrange

from ptq.core.formats import MXFP4, NVFP4, choose_tensor_scale, scale_values
from ptq.core.scales import residual
from ptq.kernels.search import prepare, search_scales

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def spd(blocks, k, condition, seed=0):
    """Blocks (blocks, k, k) float32 with random eigenvectors and eigenvalues from 1 to `condition`."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(blocks, k, k, generator=g, dtype=torch.float64))[0]
    spectrum = torch.logspace(0, torch.tensor(condition).log10().item(), k, dtype=torch.float64)
    return ((Q * spectrum) @ Q.mT).float().to(DEVICE)


def exhaustive(x, s, M, format):
    """Smallest loss over every scale of the grid, and the loss at s, in float64: x (r, b, k), s (r, b)."""
    x = x.double()

    def loss(s):
        r = residual(x, s, format.elements)
        return (r if M is None else torch.einsum("rbi,bij->rbj", r, M.double())).mul(r).sum(-1)

    best = torch.full(x.shape[:-1], torch.inf, dtype=torch.float64, device=x.device)
    for value in scale_values(format.grid, x.device).double():
        best = torch.minimum(best, loss(value.expand(best.shape)))
    return best, loss(s.double())


def assert_exhaustive(W, format, M, rtol):
    """Every block's scale has the smallest loss, up to float32 rounding."""
    ts = choose_tensor_scale(W, format)
    assert_smallest(W, search_scales(W, format, ts, None if M is None else prepare(M)), format, ts, M, rtol)


def assert_smallest(W, s, format, ts, M, rtol):
    x = rearrange(W.float() / ts, "r (b k) -> r b k", k=format.block)
    best, chosen = exhaustive(x, s, M, format)
    worst = (chosen / best.clamp(min=1e-300)).amax()
    assert (chosen <= best * (1 + rtol) + 1e-300).all(), f"{worst:.8f} times the smallest loss"


def weights(rows, columns, dtype, seed=1):
    """Rows of very different magnitudes; in bfloat16 many weights sit on a rounding midpoint of some scale."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=g) * 0.02 * torch.rand(rows, 1, generator=g).mul(6).exp2()
    return W.to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "format,condition",
    [(NVFP4, None), (NVFP4, 1.0), (NVFP4, 300.0), (MXFP4, None), (MXFP4, 30.0)],
    ids=lambda value: getattr(value, "name", value),
)
def test_search_is_exhaustive(format, condition, dtype):
    M = None if condition is None else spd(2, format.block, condition)
    # A second program where the search is not a long one: under the interpreter, programs cost time and rows do not.
    rows = 31 if condition == 300.0 else 33
    assert_exhaustive(weights(rows, 2 * format.block, dtype), format, M, 2e-6)


def test_exact_ties_go_to_the_smaller_scale():
    # 12 = 12 · 1 = 8 · 1.5 = 6 · 2 …: the smallest scale that holds the value wins.
    W = torch.zeros(4, 16, device=DEVICE)
    W[:, 3] = torch.tensor([12.0, -12.0, 0.0, 2688.0])
    one = torch.ones((), device=DEVICE)
    eye = torch.eye(16, device=DEVICE)[None]
    for prepared in (None, prepare(eye), prepare(0 * eye)):
        assert search_scales(W, NVFP4, one, prepared)[:, 0].tolist() == [2.0, 2.0, 2.0**-9, 448.0]


@pytest.mark.slow
def test_dead_columns_and_extreme_weights():
    M = torch.zeros(2, 16, 16, device=DEVICE)
    M[0, 5, 5] = 1.0
    W = weights(6, 32, torch.float32)
    W[0, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    W[1] = 1e-42
    one, ts = torch.ones((), device=DEVICE), choose_tensor_scale(W[2:], NVFP4)
    s = search_scales(W, NVFP4, ts, prepare(M))
    assert s[0, 1] < 448 and s.isfinite().all() and (s[1] == 2.0**-9).all()
    assert torch.equal(s[:, 1:], search_scales(W[:, 16:], NVFP4, ts))
    assert_smallest(W[2:], s[2:], NVFP4, ts, M, 2e-6)
    tiny = search_scales(W[2:] * 2.0**-100, MXFP4, one)
    assert torch.equal(tiny * 2.0**100, search_scales(W[2:], MXFP4, one))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [NVFP4, MXFP4], ids=lambda f: f.name)
@pytest.mark.parametrize("condition,rtol", [(None, 3e-6), (1.0, 3e-6), (30.0, 3e-6), (1e3, 1e-5), (1e6, 1e-3)])
def test_search_is_exhaustive_on_many_blocks(format, condition, rtol, dtype):
    M = None if condition is None else spd(64, format.block, condition)
    assert_exhaustive(weights(1024, 64 * format.block, dtype), format, M, rtol)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    base = torch.zeros(2**17 + 3, 2**14, dtype=torch.bfloat16, device=DEVICE)
    base[-3:, -32:] = weights(3, 32, torch.bfloat16)
    W, one = base[:, -32:], torch.ones((), device=DEVICE)
    found = search_scales(W, NVFP4, one, prepare(spd(2, 16, 10.0)))[-3:]
    assert torch.equal(found, search_scales(W[-3:].contiguous(), NVFP4, one, prepare(spd(2, 16, 10.0))))
