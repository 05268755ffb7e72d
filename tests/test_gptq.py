"""GPTQ against a textbook oracle, and the relations a correct one satisfies."""

from dataclasses import replace

import pytest
import torch
from einops import rearrange

from ptq.calibrate.importance import keep_in
from ptq.core.formats import FORMATS, INT4_G128, MXFP4, NVFP4, choose_tensor_scale, get_format
from ptq.core.linalg import NotPositiveDefiniteError, block_diagonal, damped, unpack_symmetric
from ptq.core.scales import RULES, choose_scales
from ptq.methods.gptq import DAMP_ROWS, gptq, visit_order
from ptq.methods.rtn import rtn
from ptq.run.curvature import Curvature
from ptq.runtime.threads import ROWS_PER_THREAD, threads_for

SMALL_INT4 = replace(INT4_G128, block=32)
SMALL = [NVFP4, MXFP4, SMALL_INT4]


def problem(d_out: int = 24, d_in: int = 96, dtype: torch.dtype = torch.float64):
    X = torch.randn(400, d_in, dtype=dtype) @ torch.randn(d_in, d_in, dtype=dtype) / d_in**0.5
    X = X * torch.exp(0.7 * torch.randn(d_in, dtype=dtype))
    return torch.randn(d_out, d_in, dtype=dtype) * 0.02, X.T @ X / 400


def loss(W, quantized, H):
    delta = W.double() - quantized.dequantize().double()
    return float(((delta @ H.double()) * delta).sum())


def brain_surgeon(W, A, format, rule, tensor_scale):
    """OBQ in its textbook form: after each column, invert what is left of A again."""
    W = (W / tensor_scale).clone()
    Q, left = torch.zeros_like(W), list(range(W.shape[1]))
    for c in range(W.shape[1]):
        block = slice(c // format.block * format.block, c // format.block * format.block + format.block)
        if c % format.block == 0:
            s = choose_scales(W[None, :, block], format, rule, A[None, block, block])[0].double()
        inverse = torch.linalg.inv(A[left][:, left])
        Q[:, c] = s * format.elements.round(W[:, c] / s)
        W[:, left] -= ((W[:, c] - Q[:, c]) / inverse[0, 0])[:, None] * inverse[0]
        left = left[1:]
    return Q * tensor_scale


@pytest.mark.parametrize("rule", ["absmax", "mse", "local"])
@pytest.mark.parametrize("format", SMALL, ids=lambda f: f.name)
def test_equals_optimal_brain_surgeon(format, rule):
    W, H = problem()
    scale = choose_tensor_scale(W, format).double()
    result = gptq(W, H, format, rule=rule, tensor_scale=scale, block_order=False)
    expected = brain_surgeon(W, damped(H, 0.01), format, rule, scale)
    assert torch.equal(result.quantized.dequantize(), expected.float())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", SMALL, ids=lambda f: f.name)
def test_panel_size_does_not_change_the_result(format, rule):
    W, H = problem()
    scale = choose_tensor_scale(W, format).double()
    results = [gptq(W, H, format, rule=rule, tensor_scale=scale, panel=p).quantized for p in (1, 32, 64, 96, 1000)]
    for other in results[1:]:
        assert torch.equal(other.codes, results[0].codes) and torch.equal(other.scales, results[0].scales)


@pytest.mark.parametrize("rule", ["absmax", "mse", "local"])
@pytest.mark.parametrize("format", SMALL, ids=lambda f: f.name)
def test_uncorrelated_inputs_make_gptq_round_to_nearest(format, rule):
    W = torch.randn(24, 96) * 0.02
    scale, H = choose_tensor_scale(W, format), torch.eye(96)
    ours = gptq(W, H, format, rule=rule, tensor_scale=scale).quantized
    nearest = rtn(W, H, format, rule=rule, tensor_scale=scale).quantized
    assert torch.equal(ours.codes, nearest.codes) and torch.equal(ours.scales, nearest.scales)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", SMALL, ids=lambda f: f.name)
def test_loss_identity_holds_row_by_row(format, rule):
    """In float32 its sides differ by rounding: about 2 √d_in eps ‖W‖/‖Δ‖ ≈ 2e-5 here."""
    W, H = problem(dtype=torch.float32)
    solution = gptq(W, H, format, rule=rule, tensor_scale=choose_tensor_scale(W, format))
    assert torch.allclose(solution.accumulated, solution.measured, rtol=2e-5)


@pytest.mark.parametrize("rule", ["absmax", "mse", "local"])
@pytest.mark.parametrize("format", SMALL, ids=lambda f: f.name)
def test_error_feedback_lowers_the_loss(format, rule):
    W, H = problem(d_out=64)
    scale = choose_tensor_scale(W, format)
    losses = [loss(W, method(W, H, format, rule=rule, tensor_scale=scale).quantized, H) for method in (gptq, rtn)]
    assert losses[0] < losses[1]


def test_rules_that_know_more_lose_less():
    W, H = problem(d_out=128)
    scale = choose_tensor_scale(W, NVFP4)
    losses = [loss(W, gptq(W, H, NVFP4, rule=r, tensor_scale=scale).quantized, H) for r in ("absmax", "mse", "local", "joint")]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", SMALL, ids=lambda f: f.name)
def test_frozen_scales_are_those_of_the_weights_as_they_were(format, rule):
    W, H = problem()
    scale = choose_tensor_scale(W, format).double()
    frozen, loose = (gptq(W, H, format, rule=rule, tensor_scale=scale, frozen=one) for one in (True, False))
    assert torch.allclose(frozen.accumulated, frozen.measured, rtol=1e-9)
    if rule in ("absmax", "mse", "local"):
        blocks = rearrange(W / scale, "r (b k) -> b r k", k=format.block)
        expected = choose_scales(blocks, format, rule, block_diagonal(damped(H, 0.01), format.block))
        assert torch.equal(frozen.quantized.scales, expected.T)
    assert not torch.equal(frozen.quantized.scales, loose.quantized.scales)


def test_block_order_moves_whole_blocks_by_descending_energy():
    H = torch.diag(torch.tensor([1.0] * 16 + [5.0] * 16 + [5.0] * 16 + [9.0] * 16))
    assert visit_order(H, 16)[::16].tolist() == [48, 16, 32, 0]
    assert visit_order(H, 16)[:16].tolist() == list(range(48, 64))


def test_dead_columns_are_rounded_to_nearest_and_disturb_nothing():
    W, H = problem()
    H[17], H[:, 17] = 0, 0
    scale = choose_tensor_scale(W, NVFP4)
    solution = gptq(W, H, NVFP4, rule="local", tensor_scale=scale)
    step = solution.quantized.scales[:, 1] * scale
    assert torch.equal(solution.quantized.dequantize()[:, 17], step * NVFP4.elements.round(W[:, 17].float() / step))
    assert torch.allclose(solution.accumulated, solution.measured)


def test_one_row_and_one_block():
    W, H = problem(d_out=1, d_in=32)
    for name in FORMATS:
        format = replace(get_format(name), block=32)
        solution = gptq(W, H, format, rule="local", tensor_scale=choose_tensor_scale(W, format))
        assert solution.quantized.scales.shape == (1, 1)


def test_a_missing_hessian_is_refused():
    W, _ = problem()
    with pytest.raises(ValueError, match="needs the full Hessian"):
        gptq(W, None, NVFP4, tensor_scale=torch.ones(()))


def curvature(d_out: int):
    gradients = torch.randn(300, d_out, dtype=torch.float64) @ torch.randn(d_out, d_out, dtype=torch.float64) / d_out**0.5
    return gradients.T @ gradients / 300


@pytest.mark.parametrize("row_panel", [1, 7, 24])
def test_row_feedback_is_the_best_answer_to_each_panel_of_rows(row_panel):
    """Against the textbook form: given Δ of the rows done, tr(G Δ A Δᵀ) is least for Δ_later = -G_ll⁻¹ G_ld Δ_done."""
    W, H = problem()
    G, scale = curvature(24), choose_tensor_scale(W, NVFP4).double()
    A = damped(G, DAMP_ROWS)
    order, target, Q = G.diagonal().argsort(descending=True), W.clone(), torch.zeros_like(W)
    for start in range(0, 24, row_panel):
        own, done, later = order[start : start + row_panel], order[: start + row_panel], order[start + row_panel :]
        Q[own] = gptq(target[own], H, NVFP4, rule="joint", tensor_scale=scale).quantized.dequantize().double()
        # The rows done before are in `target` already, as what is left: their own error is counted from W.
        shift = torch.linalg.solve(A[later][:, later], A[later][:, done] @ (W - Q)[done])
        target[later] = W[later] + shift
    result = gptq(W, H, NVFP4, rule="joint", tensor_scale=scale, G=G, row_panel=row_panel)
    assert torch.equal(result.quantized.dequantize().double(), Q)
    assert torch.allclose(result.accumulated, result.measured, rtol=1e-9)


def lopsided_curvature(d_out: int) -> torch.Tensor:
    """G (d_out, d_out) float32 with mean diagonal 1, of which one direction has 90 %; the rest is white."""
    direction = torch.randn(d_out, dtype=torch.float64)
    G = 0.9 * d_out * torch.outer(direction, direction) / direction.square().sum() + 0.1 * torch.eye(d_out)
    return G.float()


def test_a_curvature_of_which_one_direction_has_most_is_kept_exactly(tmp_path):
    """In bfloat16 it is indefinite by more than its damping."""
    W, H = problem(d_out=1024)
    G = lopsided_curvature(1024)
    scale = choose_tensor_scale(W, NVFP4)
    with pytest.raises(NotPositiveDefiniteError):
        gptq(W, H, NVFP4, tensor_scale=scale, G=G.bfloat16().float())
    in_memory, on_disk = {}, Curvature(tmp_path / "curvature")
    keep_in(in_memory)("q", G)
    with on_disk.writer() as keep:
        keep("q", G)
    for kept in (in_memory, on_disk):
        assert list(kept) == ["q"] and torch.equal(unpack_symmetric(kept["q"], 1024), G)
    fed, plain = (gptq(W, H, NVFP4, tensor_scale=scale, G=g).quantized.dequantize() for g in (G, None))
    loss_of = [float((G.double() @ delta @ H * delta).sum()) for delta in (W - fed, W - plain)]
    assert loss_of[0] < loss_of[1]


def test_an_indefinite_curvature_is_named_with_a_remedy_that_fits():
    W, H = problem()
    G = torch.eye(24)
    G[3, 3] = -1
    with pytest.raises(NotPositiveDefiniteError, match=r"^G \+ damping .*--no-row-feedback"):
        gptq(W, H, NVFP4, tensor_scale=choose_tensor_scale(W, NVFP4), G=G)
    H[0, 0] = -H[0, 0]
    with pytest.raises(NotPositiveDefiniteError, match=r"^H \+ damping .*more damping"):
        gptq(W, H, NVFP4, tensor_scale=choose_tensor_scale(W, NVFP4))


def test_row_feedback_lowers_the_loss_it_is_for():
    W, H = problem(d_out=96)
    G, scale = curvature(96), choose_tensor_scale(W, NVFP4)
    deltas = [W - gptq(W, H, NVFP4, rule="joint", tensor_scale=scale, G=g).quantized.dequantize() for g in (None, G)]
    plain, fed = (float((G @ delta @ H * delta).sum()) for delta in deltas)
    assert fed < 0.9 * plain


def test_uncorrelated_outputs_leave_row_feedback_nothing_to_do():
    W, H = problem(d_out=40)
    scale = choose_tensor_scale(W, NVFP4)
    plain, fed = (gptq(W, H, NVFP4, rule="joint", tensor_scale=scale, G=g).quantized for g in (None, torch.eye(40)))
    assert torch.equal(plain.codes, fed.codes) and torch.equal(plain.scales, fed.scales)


def test_small_matrices_are_swept_on_one_thread_and_the_others_come_back():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for rows, threads in ((1, 1), (2 * ROWS_PER_THREAD, 2), (9 * ROWS_PER_THREAD, 3)):
            with pytest.raises(ZeroDivisionError), threads_for(rows):
                assert torch.get_num_threads() == threads
                _ = 1 / 0
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
