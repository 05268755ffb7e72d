"""Each pruned search against the exhaustive one, in float64 so that only true ties are ties."""

from dataclasses import replace

import pytest
import torch
from einops import rearrange

from ptq.core.formats import INT4_G128, MXFP4, NVFP4, scale_values
from ptq.core.linalg import block_diagonal, damped, inverse_factor
from ptq.core.scales import RULES, choose_scales, round_with_feedback, search

SEARCHES = ["mse", "local", "schur", "joint"]
FORMATS = [NVFP4, replace(NVFP4, block=32), MXFP4, replace(MXFP4, block=16)]


def exhaustive(x, objective, format):
    """All scales of a row at once, as if it were as many rows; of those that tie the smallest."""
    scales, rows = scale_values(format.grid, x.device), x.shape[1]
    every = objective.loss(x.repeat_interleave(len(scales), 1), scales.to(x.dtype).repeat(len(x), rows), format.elements)
    return scales[every.view(len(x), rows, -1).numpy().argmin(-1)]


def activations(kind: str, tokens: int, d: int) -> torch.Tensor:
    white = torch.randn(tokens, d, dtype=torch.float64)
    if kind == "correlated":
        return 0.1 * white + torch.randn(tokens, 1, dtype=torch.float64)
    if kind == "outliers":
        return white @ torch.randn(d, d, dtype=torch.float64) * torch.exp(1.5 * torch.randn(d, dtype=torch.float64))
    return white


def problem(kind: str, format, size: float, damp: float = 0.01):
    d = 3 * format.block
    X = activations(kind, 200, d)
    A = damped(X.T @ X / 200, damp)
    x = rearrange(torch.randn(16, d, dtype=torch.float64) * size, "r (b k) -> b r k", k=format.block)
    return x, block_diagonal(A, format.block), block_diagonal(inverse_factor(A), format.block)


@pytest.mark.parametrize("rule", SEARCHES)
@pytest.mark.parametrize("kind", ["white", "correlated", "outliers"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f.name}-{f.block}")
@pytest.mark.parametrize("size", [100.0, 0.005])
def test_search_equals_trying_every_scale(rule, kind, format, size):
    x, H, U = problem(kind, format, size)
    objective = RULES[rule](x, H, U)
    assert torch.equal(search(x, objective, format), exhaustive(x, objective, format))


@pytest.mark.parametrize("rank", [1, 5, 15])
def test_search_is_exact_for_singular_hessians(rank):
    """Where M has no inverse nothing may be pruned by clipping: a large error in its null space costs nothing."""
    x = torch.randn(2, 50, 16, dtype=torch.float64)
    V = torch.randn(2, 16, rank, dtype=torch.float64)
    objective = RULES["local"](x, V @ V.mT, None)
    # Losses that are zero up to rounding tie by chance, so the losses are compared, not the scales.
    ours, best = (f(x, objective, NVFP4) for f in (search, exhaustive))
    loss = [objective.loss(x, s.double(), NVFP4.elements) for s in (ours, best)]
    assert torch.allclose(loss[0], loss[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", SEARCHES)
def test_bfloat16_weights_on_midpoints(rule):
    """bfloat16 weights meet rounding midpoints exactly; float32 and float64 must then choose and round alike."""
    x, H, U = problem("outliers", NVFP4, 1.0)
    x = x.bfloat16().double()
    objective = RULES[rule](x, H, U)
    assert torch.equal(search(x, objective, NVFP4), exhaustive(x, objective, NVFP4))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f.name}-{f.block}")
def test_zero_blocks_and_subnormal_weights(rule, format):
    x, H, U = problem("white", format, 1.0)
    x[:, 0] = 0
    x[:, 1] *= 1e-42
    scales = choose_scales(x.float(), format, rule, H.float(), U.float())
    assert (scales[:, :2] == scale_values(format.grid, x.device)[0]).all()
    assert scales.isfinite().all()


def test_a_block_no_input_reaches_is_judged_by_its_squared_error():
    x = torch.randn(2, 30, 16)
    H = torch.stack((torch.zeros(16, 16), torch.eye(16)))
    assert torch.equal(choose_scales(x, NVFP4, "local", H), choose_scales(x, NVFP4, "mse"))


def test_int4_search_tries_every_fourth_bfloat16_and_the_absmax_scale():
    format = replace(INT4_G128, block=32)
    x = torch.randn(2, 50, 32)
    absmax, mse = choose_scales(x, format, "absmax"), choose_scales(x, format, "mse")
    steps = (mse.bfloat16().view(torch.int16) - absmax.bfloat16().view(torch.int16)) % 4
    assert (steps == 0).all()
    error = [((x - s[..., None] * format.elements.round(x / s[..., None])) ** 2).sum(-1) for s in (absmax, mse)]
    assert (error[1] <= error[0]).all() and (error[1] < error[0]).float().mean() > 0.5


def test_loss_of_the_recursion_is_the_quadratic_form_of_its_result():
    """The loss identity inside a block, on which the pruning of `joint` rests."""
    x, _, U = problem("outliers", NVFP4, 1.0)
    s = choose_scales(x.float(), NVFP4, "absmax").double()
    q, E = round_with_feedback(x, s, U, NVFP4.elements)
    delta = x - s[..., None] * q
    M = torch.linalg.inv(U.mT @ U)
    assert torch.allclose((E**2).sum(-1), ((delta @ M) * delta).sum(-1), rtol=1e-8)


def test_unknown_rule_and_missing_matrices_are_refused():
    x = torch.randn(1, 4, 16)
    with pytest.raises(ValueError, match=r"'best'.*absmax, mse, local, schur, joint"):
        choose_scales(x, NVFP4, "best")
    with pytest.raises(ValueError, match="'local' needs the block Hessians"):
        choose_scales(x, NVFP4, "local")
    with pytest.raises(ValueError, match="'joint' needs the factor U"):
        choose_scales(x, NVFP4, "joint")
