"""The searches against the exhaustive one over every scale, in float64."""

import pytest
import torch
from einops import rearrange

from ptq.formats import MXFP4, NVFP4, choose_tensor_scale, scale_values
from ptq.kernels.search import prepare, search_scales
from ptq.scales import residual

ONE = torch.ones(())


def spd(blocks, k, condition, seed=0):
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(blocks, k, k, generator=g, dtype=torch.float64))[0]
    spectrum = torch.logspace(0, torch.tensor(condition).log10().item(), k, dtype=torch.float64)
    return ((Q * spectrum) @ Q.mT).float()


def exhaustive(x, s, M):
    """Smallest loss over every scale and the loss at s, float64: x (r, b, k), s (r, b)."""
    x, values = x.double(), scale_values(FORMAT_OF[x.shape[-1]].grid, x.device).double()

    def loss(s):
        r = residual(x, s, NVFP4.elements)
        return r.square().sum(-1) if M is None else torch.einsum("rbi,bij,rbj->rb", r, M.double(), r)

    best = torch.stack([loss(v.expand(x.shape[:-1])) for v in values]).amin(0)
    return best, loss(s.double())


FORMAT_OF = {16: NVFP4, 32: MXFP4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [NVFP4, MXFP4], ids=lambda f: f.name)
@pytest.mark.parametrize("condition", [None, 1.0, 100.0, 1e6])
def test_search_is_exhaustive(format, condition, dtype):
    k = format.block
    g = torch.Generator().manual_seed(1)
    W = (torch.randn(37, 3 * k, generator=g) * 0.02 * torch.rand(37, 1, generator=g).mul(6).exp2()).to(dtype)
    ts = choose_tensor_scale(W, format)
    M = None if condition is None else spd(3, k, condition)
    s = search_scales(W, format, ts, None if M is None else prepare(M))
    x = rearrange(W.float() / ts, "r (b k) -> r b k", k=k)
    best, chosen = exhaustive(x, s, M)
    assert (chosen <= best * (1 + 2e-6)).all(), (chosen / best).max()
