"""Matrices alike are solved at once, each to the same bits as alone: LAPACK and the products take them one by one on a CPU."""

from dataclasses import replace

import pytest
import torch

from ptq.calibrate.collect import Sums
from ptq.calibrate.hessian import Hessian
from ptq.calibrate.importance import keep_in, token_importance
from ptq.core.formats import E2M1, FP8_ROWS, INT4_G128, MXFP4, NVFP4, choose_tensor_scale, tensor_scale_of
from ptq.core.linalg import NotPositiveDefiniteError, damped, inverse_cholesky, inverse_factor, solve_from_right
from ptq.kernels.sweep import sweep
from ptq.methods import METHODS
from ptq.models.adapter import ModelAdapter
from ptq.run import batch
from ptq.run.loop import Calibration, quantize_layers, quantize_model
from ptq.run.plan import make_plan
from ptq.run.recipe import Recipe
from ptq.run.settings import make_recipe, settings_of

from .test_runner import tokens
from .tiny import tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL_INT4 = replace(INT4_G128, name="int4 in blocks of 32", block=32)


def problem(count: int, rows: int, n: int):
    """W (count, rows, n), of which the second is a thousand times as large, H (count, n, n), and G (count, rows, rows)."""
    X = torch.randn(count, 2 * n, n) * torch.exp(0.7 * torch.randn(count, 1, n))
    X[0, :, 5] = 0  # a dead column
    W = 0.02 * torch.randn(count, rows, n)
    W[1] *= 1000
    Y = torch.randn(count, 2 * rows, rows)
    return W, X.mT @ X / (2 * n), Y.mT @ Y / (2 * rows)


@pytest.mark.parametrize(
    "format,case",
    [(format, case) for format in (NVFP4, MXFP4, SMALL_INT4) for case in ("rtn-mse", "rtn-local", "gptq-local", "gptq-joint")]
    + [(FP8_ROWS, "rtn-mse"), (FP8_ROWS, "gptq-mse"), (NVFP4, "gptq-schur-rows"), (NVFP4, "gptq-joint-frozen")],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_batch_is_what_each_is_alone(format, case):
    method, rule, *more = case.split("-")
    W, H, G = problem(3, 40, 96)
    scales = tensor_scale_of(W.abs().amax((1, 2)), format)
    assert torch.equal(scales, torch.stack([choose_tensor_scale(one, format) for one in W]))

    def solve(index):
        options = {"G": G[index], "row_panel": 16} if "rows" in more else {"frozen": True} if "frozen" in more else {}
        return METHODS[method](W[index], H[index], format, rule=rule, tensor_scale=scales[index], **options)

    whole = solve(slice(None))
    for number in range(3):
        alone = solve(number)
        assert torch.equal(whole.quantized.codes[number], alone.quantized.codes)
        assert torch.equal(whole.quantized.scales[number], alone.quantized.scales)
        assert torch.equal(whole.quantized.dequantize()[number], alone.quantized.dequantize())
        for ours, theirs in ((whole.accumulated, alone.accumulated), (whole.measured, alone.measured)):
            assert ours is theirs or torch.equal(ours[number], theirs)  # type: ignore[index,arg-type]


@pytest.mark.parametrize(
    "format,rule", [(NVFP4, "local"), (NVFP4, "joint"), (SMALL_INT4, "joint")], ids=lambda part: getattr(part, "name", part)
)
def test_kernels_take_a_batch(format, rule):
    rows, columns = (17, 48) if format.elements is E2M1 else (5, 64)  # a search's program has 16 rows, of INT4 4
    W, H, _ = problem(2, rows, columns)
    A = damped(H, 0.01)
    x, A, U = (part.to(DEVICE) for part in (W / W.abs().amax((1, 2), keepdim=True), A, inverse_factor(A)))
    whole = sweep(x, A, U, format, rule, 32)
    for number in range(2):
        alone = sweep(x[number], A[number], U[number], format, rule, 32)
        assert all(torch.equal(ours[number], theirs) for ours, theirs in zip(whole, alone, strict=True))


def test_a_factor_of_a_batch_and_its_first_bad_pivot():
    A = damped(problem(3, 8, 300)[1], 0.01)
    inverse, failed = inverse_cholesky(A.clone(), smallest=128)
    assert not failed and all(torch.equal(inverse[i], inverse_cholesky(A[i].clone(), smallest=128)[0]) for i in range(3))
    A[1, 200, 200] = -1
    assert inverse_cholesky(A.clone(), smallest=128)[1] == 201
    with pytest.raises(NotPositiveDefiniteError, match=r"H \+ damping is not positive definite"):
        inverse_factor(A)


@pytest.mark.gpu
def test_solving_a_batch_from_the_right():
    W, H, _ = problem(3, 200, 1000)
    A = damped(H, 0.1).cuda()
    found, failed = solve_from_right(W.cuda(), A.clone())
    expected = torch.linalg.solve(A.double(), W.cuda().double(), left=False)
    alone = torch.stack([solve_from_right(w, a.clone())[0] for w, a in zip(W.cuda(), A, strict=True)])
    errors = [float((part - expected).norm() / expected.norm()) for part in (found, alone)]
    assert not failed and errors[0] < 2 * errors[1]  # products with an inverse factor, as good as substitution


def facts(model, recipe, calibration):
    """Codes and scales by name, and the records without their seconds."""
    done = list(quantize_model(ModelAdapter(model), recipe, calibration))
    return [(replace(record, seconds=0), weight.codes, weight.scales, weight.tensor_scale) for record, weight in done]


@pytest.mark.parametrize("case", ["default", "best", "rtn-local-none"])
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_a_mixture_solved_in_batches_is_that_solved_one_by_one(family, case, monkeypatch):
    batches, importance, curvature = tokens(4).split(2), None, {}
    settings = settings_of(case)
    if settings["token_importance"] != "none":
        importance = token_importance(ModelAdapter(tiny_model(family)), batches, seed=0, curvature=keep_in(curvature))
    calibration, recipe = Calibration(batches, importance, curvature), make_recipe(NVFP4, settings)
    at_once = facts(tiny_model(family), recipe, calibration)
    monkeypatch.setattr(batch, "HESSIANS_AT_ONCE", 2 * 64 * 64)  # two experts' gate and up, eight downs
    in_pairs = facts(tiny_model(family), recipe, calibration)
    monkeypatch.setattr(batch, "HESSIANS_AT_ONCE", 1)
    alone = facts(tiny_model(family), recipe, calibration)
    for ours, theirs, third in zip(at_once, in_pairs, alone, strict=True):
        assert ours[0] == theirs[0] == third[0]
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(ours[1:], theirs[1:], third[1:], strict=True))


def test_the_expert_whose_hessian_is_bad_is_named_alone():
    adapter = ModelAdapter(tiny_model("qwen3_moe"))
    plan = make_plan(adapter, Recipe())

    def sums_of(layer, _plan, groups, _shards):
        found = []
        for group in groups:
            hessian = Hessian(group.matrices[0].d_in)
            hessian.add(torch.randn(200, group.matrices[0].d_in))
            if group.names[0] == "mlp.experts.2.gate_proj":
                hessian.sum[7, 7] = -1e3
            found.append(Sums(hessian))
        return found

    with pytest.raises(NotPositiveDefiniteError) as caught:
        list(quantize_layers(adapter, plan, Calibration(), sums_of=sums_of))
    assert str(caught.value).startswith(
        "model.layers.0.mlp.experts.2.gate_proj, model.layers.0.mlp.experts.2.up_proj: H + damp"
    )


def test_the_expert_whose_activations_overflow_is_named_alone():
    """Its weights are finite, and what it gives its last linear squares to infinity."""
    model = tiny_model("qwen3_moe")
    model.model.layers[0].mlp.experts.gate_up_proj.data[2] *= 1e14
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.experts\.2\.down_proj: non-finite activations in \d+ input"):
        next(quantize_model(ModelAdapter(model), Recipe(rule="absmax"), Calibration(tokens(4).split(2))))
