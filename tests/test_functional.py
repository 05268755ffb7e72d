"""The drop-in API against the package it replaces, qwantize 0.1.1."""

import pytest
import qwantize
import torch

from ptq import functional
from ptq.calibrate.hessian import add_blocks

PLAIN = ["nvfp4_naive", "nvfp4_optimal", "mxfp4_naive", "mxfp4_optimal"]
HESSIAN = ["nvfp4_optimal_hessian", "mxfp4_optimal_hessian"]
# qwantize and we sum the 16 or 32 terms of a block's error in different orders, in float32: 2 · 32 · 2⁻²⁴ of the sum of
# magnitudes, which for the correlated Hessians here is up to a hundred times the sum itself.
SLACK = 1 + 1e-5


def weights(block: int, size: float, kind: str) -> torch.Tensor:
    W = torch.randn(48, 192 // block, block) * size
    if kind == "heavy-tailed":
        W = W * torch.exp(torch.randn_like(W))
    return W


def activations(kind: str) -> torch.Tensor:
    white = torch.randn(300, 192)
    if kind == "correlated":
        return white + 10 * torch.randn(300, 1)
    return white @ torch.randn(192, 192) * torch.exp(1.5 * torch.randn(192))


def hessian_error(W, dequantized, X, dim):
    r = (dequantized - W).double().movedim(dim, -1)
    H = torch.zeros(192 // r.shape[-1], r.shape[-1], r.shape[-1], dtype=torch.float64)
    add_blocks(H, X.double())
    return torch.einsum("rbi,bij,rbj->rb", r, H, r)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("size", [0.02, 1.0, 50.0])
@pytest.mark.parametrize("kind", ["gauss", "heavy-tailed"])
def test_same_scales_and_codes_and_never_a_larger_error(name, block, dim, size, kind):
    W = weights(block, size, kind).movedim(-1, dim)
    scales, quants, dequant = getattr(functional, name)(W, dim, True)
    theirs = getattr(qwantize, name)(W, dim, True)
    # torch 2.11 casts what is beyond 448 to an E4M3 NaN, before which qwantize does not clamp.
    ours_error, their_error = ((d - W).double().square().sum(dim).nan_to_num(torch.inf) for d in (dequant, theirs[2]))
    assert (ours_error <= their_error * SLACK).all() and dequant.isfinite().all()
    # Where the scales differ, qwantize's search stopped early or its absmax scale rounded to zero.
    exact = (ours_error >= their_error / SLACK) & (theirs[0] > 0)
    assert torch.equal(scales[exact], theirs[0][exact])
    same = (scales == theirs[0]).unsqueeze(dim).expand_as(quants)
    assert torch.equal(quants[same], theirs[1][same])
    assert exact.float().mean() > 0.9


@pytest.mark.parametrize("name", HESSIAN)
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("size", [0.02, 1.0])
@pytest.mark.parametrize("kind", ["correlated", "outliers"])
def test_hessian_search_is_never_worse(name, block, dim, size, kind):
    W, X = weights(block, size, "gauss").movedim(-1, dim), activations(kind)
    ours = getattr(functional, name)(W, dim, True, X)
    theirs = getattr(qwantize, name)(W, dim, True, X)
    ours_error, their_error = (hessian_error(W, result[2], X, dim) for result in (ours, theirs))
    assert (ours_error <= their_error * SLACK).all()
    exact = (ours_error >= their_error / SLACK) & (theirs[0].reshape(ours_error.shape) > 0)
    same = ours[0].reshape(exact.shape) == theirs[0].reshape(exact.shape)
    near_tie = exact & ~same & (ours_error <= their_error * SLACK)
    assert same[exact & ~near_tie].all() and near_tie.float().mean() < 0.01
    assert exact.float().mean() > 0.5


def test_block_hessians_in_place_of_activations():
    W, X = weights(16, 1.0, "gauss"), activations("outliers")
    H = torch.zeros(12, 16, 16)
    add_blocks(H, X)
    for ours, theirs in zip(functional.nvfp4_optimal_hessian(W, X=X), functional.nvfp4_optimal_hessian(W, H=H), strict=True):
        assert torch.equal(ours, theirs)


def test_tensor_scale_lifts_small_weights_out_of_the_subnormals():
    W = torch.randn(64, 12, 16) * 0.005
    scale = 2.0**-17
    scales, quants, dequant = functional.nvfp4_naive(W, return_dequant=True, tensor_scale=scale)
    assert torch.equal(dequant, functional.nvfp4_dequantize(scales, quants, tensor_scale=scale))
    plain = functional.nvfp4_naive(W, return_dequant=True)[2]
    assert (W - plain).norm() > 1.2 * (W - dequant).norm()


def test_zero_blocks_report_what_qwantize_reports():
    W = torch.zeros(2, 3, 16)
    for name in PLAIN:
        ours, theirs = (getattr(module, name)(W, return_dequant=True) for module in (functional, qwantize))
        assert torch.equal(ours[2], theirs[2]) and (name.startswith("mx") or torch.equal(ours[0], theirs[0]))


def test_metrics():
    W, X = torch.randn(20, 32), torch.randn(5000, 32)
    for arguments in ((W, W + 0.1), (W, W + 0.1, X)):
        ours, theirs = functional.compute_metrics(*arguments), qwantize.compute_metrics(*arguments)
        assert ours.keys() == theirs.keys()
        # float32 norms of 640 and 100 000 terms
        assert all(abs(ours[key] / theirs[key] - 1) < 1e-5 for key in ours)


def test_bad_arguments_are_refused():
    W, X = torch.randn(4, 2, 16), torch.randn(10, 32)
    with pytest.raises(ValueError, match="either the activations X"):
        functional.nvfp4_optimal_hessian(W)
    with pytest.raises(ValueError, match="either the activations X"):
        functional.nvfp4_optimal_hessian(W, X=X, H=torch.zeros(2, 16, 16))
    with pytest.raises(ValueError, match="is 15; it must be one block"):
        functional.nvfp4_naive(torch.randn(4, 15))
    with pytest.raises(ValueError, match=r"block Hessians \(3, 16, 16\) do not fit W \(4, 2, 16\)"):
        functional.nvfp4_optimal_hessian(W, H=torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match="non-finite"):
        functional.nvfp4_naive(torch.full((1, 16), float("nan")))
