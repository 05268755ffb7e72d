"""What must hold of rounding whatever the numbers: properties, over shapes, dtypes, strides and magnitudes that hypothesis draws.

Derivations stand with each property.  The suite draws the same examples every time; `--hypothesis-profile long` draws others, and
twenty times as many.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ptq.calibrate.drift import Drift
from ptq.calibrate.hessian import Hessian
from ptq.core.formats import E2M1, INT4_G128, MXFP4, MXFP4_ROUND, NVFP4, Format, choose_tensor_scale, scale_values
from ptq.core.linalg import NotPositiveDefiniteError, block_diagonal, damped, inverse_factor
from ptq.core.scales import RULES, choose_scales
from ptq.methods.gptq import gptq
from ptq.methods.rtn import quantize, rtn
from ptq.models.adapter import ModelAdapter
from ptq.run.loop import Calibration, quantize_model
from ptq.run.recipe import Recipe
from ptq.run.record import LEAST_LOSS
from ptq.run.solve import Statistics, drift_target

from .tiny import tiny_model

INT4_SMALL = replace(INT4_G128, block=32)
FORMATS = [NVFP4, MXFP4, MXFP4_ROUND, INT4_SMALL]
SYMMETRIC = [NVFP4, MXFP4, MXFP4_ROUND]
MAGNITUDES = st.integers(-60, 40)
EPSILON = 2.0**-23
DAMP = 0.01


def examples(count: int):
    """`count` in the suite, in other profiles (conftest.py) in proportion."""
    return settings(max_examples=count * settings().max_examples // 100)


@dataclass(frozen=True)
class Problem:
    """A weight and its inputs.  `W` (d_out, d_in), `X` (tokens, d_in), float32."""

    format: Format
    W: torch.Tensor
    X: torch.Tensor

    @property
    def tensor_scale(self) -> torch.Tensor:
        return choose_tensor_scale(self.W, self.format)

    def hessian(self) -> torch.Tensor:
        hessian = Hessian(self.X.shape[1])
        hessian.add(self.X)
        return hessian.mean()


HOLES = [
    "nothing",
    "zero row",
    "zero column",
    "zero block",
    "all zero",
    "one weight",
    "a large channel",
    "grid",
    "denormal row",
]
INPUTS = ["many", "few", "one", "dead", "a large channel", "the same"]


@st.composite
def problems(draw, formats=FORMATS, magnitudes=MAGNITUDES, inputs=INPUTS) -> Problem:
    format = draw(st.sampled_from(formats))
    rows, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    columns = blocks * format.block
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    W = torch.randn(rows, columns, generator=generator).exp() * torch.randn(rows, columns, generator=generator)
    W = with_holes(W, draw(st.sampled_from(HOLES)), format)
    W = torch.ldexp(W, torch.tensor(draw(magnitudes)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    W = W.clamp(-6e4, 6e4).half().float() if dtype == torch.float16 else W.to(dtype).float()
    if draw(st.booleans()):
        W = torch.stack([W, W], -1).flatten(1)[:, ::2]  # the same values, every other place of memory
    X = activations(draw(st.sampled_from(inputs)), columns, generator) * draw(st.sampled_from([1e4, 1.0, 1e-6]))
    return Problem(format, W, X)


def with_holes(W: torch.Tensor, hole: str, format: Format) -> torch.Tensor:
    if hole == "zero row":
        W[0] = 0
    elif hole == "zero column":
        W[:, 1] = 0
    elif hole == "zero block":
        W[:, : format.block] = 0
    elif hole == "all zero":
        W.zero_()
    elif hole == "one weight":
        W[:, 1:] = 0
    elif hole == "a large channel":
        W[:, 3] *= 1e6
    elif hole == "grid":
        W = W.round().clamp(-6, 6)
    elif hole == "denormal row":
        W[-1] *= 1e-38
    return W


def activations(kind: str, columns: int, generator: torch.Generator) -> torch.Tensor:
    tokens = {"many": 4 * columns, "few": max(2, columns // 3), "one": 1}.get(kind, 2 * columns)
    X = torch.randn(tokens, columns, generator=generator)
    if kind == "dead":
        X[:, ::5] = 0
    elif kind == "a large channel":
        X[:, 2] *= 1e6
    elif kind == "the same":
        X = X[:1].expand(tokens, -1).clone()
    return X


def solve(problem: Problem, method: str, rule: str, W: torch.Tensor | None = None, scale: torch.Tensor | None = None):
    W = problem.W if W is None else W
    scale = choose_tensor_scale(W, problem.format) if scale is None else scale
    return {"gptq": gptq, "rtn": rtn}[method](W, problem.hessian(), problem.format, rule=rule, tensor_scale=scale, damp=DAMP)


HOWS = [(method, rule) for method in ("rtn", "gptq") for rule in RULES if method == "gptq" or rule not in ("schur", "joint")]
hows = st.sampled_from(HOWS)


@examples(150)
@given(problems(), hows)
def test_what_comes_out_can_be_stored(problem, how):
    """Codes of four bits, none a negative zero, scales on the grid, nothing that is not finite."""
    found = solve(problem, *how).quantized
    assert found.codes.shape == problem.W.shape and int(found.codes.max()) <= 15
    assert problem.format.elements is not E2M1 or not (found.codes == 8).any()
    assert torch.isin(found.scales, scale_values(problem.format.grid, found.scales.device)).all()
    assert found.dequantize().isfinite().all()


@examples(100)
@given(problems(formats=SYMMETRIC), hows)
def test_the_sign_goes_through(problem, how):
    """E2M1 is symmetric and rounds ties to even, and float32 sums of negated terms are the negated sums: -W gives -Q, bit for bit.

    (INT4 reaches to -8 and to 7.)"""
    one, other = (solve(problem, *how, W=W).quantized for W in (problem.W, -problem.W))
    assert torch.equal(one.scales, other.scales) and torch.equal(one.dequantize(), -other.dequantize())


@examples(100)
@given(problems(magnitudes=st.integers(-8, 8)), hows, st.integers(-20, 20), st.integers(-6, 6))
def test_powers_of_two_go_through(problem, how, k, j):
    """W · 2^k and H · 4^j: every product, quotient, root and sum is the old one times a power of two, so no bit of a code changes.
    What is scaled is the tensor_scale where there is one, else the block's scale.

    Unless float32's range ends: r · H · r is kept within it by the magnitudes drawn, but a row of denormals would not be, and
    absmax scales of E8M0 and bfloat16 end at 2⁻¹²⁶."""
    live = problem.W[problem.W != 0].abs()
    assume(not len(live) or float(live.min()) > 2.0**-40)
    bigger = Problem(problem.format, torch.ldexp(problem.W, torch.tensor(k)), torch.ldexp(problem.X, torch.tensor(j)))
    one, other = solve(problem, *how).quantized, solve(bigger, *how).quantized
    assert torch.equal(one.codes, other.codes)
    if not live.numel():
        return
    if problem.format.tensor_scale:
        assert torch.equal(one.scales, other.scales) and other.tensor_scale == one.tensor_scale * 2.0**k
    else:
        written = (problem.W.unflatten(1, (-1, problem.format.block)) != 0).any(-1)  # an empty block has the smallest scale
        assert torch.equal(one.scales[written] * 2.0**k, other.scales[written]) or how[0] == "gptq"


@examples(100)
@given(problems(formats=SYMMETRIC, magnitudes=st.integers(-8, 8)))
def test_absmax_again_changes_nothing(problem):
    """Q rounded by absmax again is Q, bit for bit, codes and scales.

    floor_exponent: amax / s is in [4, 8), so the largest value is 4 s or 6 s, of the same exponent.  round_exponent: in
    [3.5, 7), so 4 s or 6 s (mantissa 1.5 < 1.75).  E4M3: amax / 6 s is within 1 ± 2⁻⁴ where s is normal, so amax / s > 5
    rounds to 6; of the subnormal k · 2⁻⁹, k = 1 stays (every amax up to 6 gives it), and from 3 on (amax / s > 5) all do,
    but k = 2 may have amax / s = 4.5, which rounds to 4 and has k = 1.  INT4 has amax / s = 7.5 and no value of that size:
    it is not idempotent."""
    first = rtn(problem.W, None, problem.format, rule="absmax", tensor_scale=problem.tensor_scale).quantized
    again = rtn(first.dequantize(), None, problem.format, rule="absmax", tensor_scale=problem.tensor_scale).quantized
    smallest = scale_values(problem.format.grid, torch.device("cpu"))[0]
    holds = first.scales != 2 * smallest if problem.format is NVFP4 else first.scales > 4 * smallest
    where = holds.repeat_interleave(problem.format.block, 1)
    assert torch.equal(first.codes[where], again.codes[where])
    full = (first.dequantize().unflatten(1, (-1, problem.format.block)) != 0).any(-1) & holds
    assert torch.equal(first.scales[full], again.scales[full])


@examples(100)
@given(problems(formats=SYMMETRIC, magnitudes=st.integers(-8, 8), inputs=["many", "few", "one", "dead", "the same"]), hows)
def test_a_search_finds_what_is_on_the_grid(problem, how):
    """Q of any method, quantized by a search: a scale of loss 0 is among those tried (Q's own), and a positive definite form
    is 0 only for Δ = 0.  In GPTQ nothing is fed forward then, so it holds block after block.  The values are Q's; a scale may
    be half of what it was.  (INT4's search does not try every scale.)"""
    assume(how[1] != "absmax")
    live = problem.W[problem.W != 0].abs()
    assume(not len(live) or float(live.min()) > 2.0**-40)  # r · H · r of what is smaller may be 0 in float32
    Q = rtn(problem.W, None, problem.format, rule="absmax", tensor_scale=problem.tensor_scale).quantized.dequantize()
    assert torch.equal(solve(problem, *how, W=Q, scale=problem.tensor_scale).quantized.dequantize(), Q)


@examples(150)
@given(problems(), st.sampled_from(["mse", "local", "schur", "joint"]))
def test_a_search_is_never_above_absmax_in_its_own_objective(problem, rule):
    """absmax is among the scales tried.  Two evaluations of one loss may differ by the rounding of a sum over a block: k² terms of
    |r| |M| |r|, each off by (k + 2) ε."""
    x = (problem.W / problem.tensor_scale).unflatten(1, (-1, problem.format.block)).transpose(0, 1)
    A = damped(problem.hessian(), DAMP)
    assume(float(A.diagonal().mean()) > 0)
    H, U = block_diagonal(A, problem.format.block), block_diagonal(inverse_factor(A), problem.format.block)
    loss = RULES[rule](x, H, U).loss
    ours, absmax = choose_scales(x, problem.format, rule, H, U), problem.format.absmax(x.abs().amax(-1))
    best, known = (loss(x, s, problem.format.elements) for s in (ours, absmax))
    room = (problem.format.block + 2) * EPSILON * (known.abs() + best.abs()) * conditions(rule, H, U)
    assert (best <= known + room).all()


def conditions(rule: str, H: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
    """(b, 1): by how much |r| |M| |r| may exceed r M r, at most k times M's condition number; sums of squares cancel nothing."""
    if rule in ("mse", "joint"):
        return torch.ones(len(H), 1)
    M = H if rule == "local" else torch.linalg.inv(U.mT.double() @ U.double()).float()
    return (M.shape[-1] * torch.linalg.cond(M.double())).float()[:, None]


@examples(100)
@given(problems(magnitudes=st.integers(-8, 8)), st.sampled_from([rule for rule in RULES if rule != "mse"]))
def test_the_certificate_holds(problem, rule):
    """Σ err² = tr(Δ (H + damp) Δᵀ) up to the rounding of U, which is relative to the condition number of H + damp: the largest
    eigenvalue is at most its trace d · m, the smallest at least damp · m, so it is at most d (1 + 1 / damp), 10⁴ here, also
    for H of rank 1.  In float64 that leaves 10⁴ · d · 1e-16 = 1e-10; what is left is Q in float32, exact.  In float32
    8 √d ε times it is what a Cholesky factor and its inverse lose at worst; many tokens leave 1e-4."""
    solution = gptq(
        problem.W.double(), problem.hessian().double(), problem.format, rule=rule, tensor_scale=problem.tensor_scale, damp=DAMP
    )
    assert certificate(solution) <= 1e-4
    A = damped(problem.hessian(), DAMP)
    bound = 8 * math.sqrt(len(A)) * EPSILON * float(torch.linalg.cond(A.double())) if A.any() else 0.0
    assert certificate(solve(problem, "gptq", rule)) <= max(1e-4, bound)


def certificate(solution) -> float:
    """Relative, and 0 where both sides are rounding noise: weights on the grid leave none."""
    accumulated, measured = solution.accumulated.sum(), solution.measured.sum()
    energy = solution.quantized.dequantize().double().square().sum() * 1e-30
    return float((accumulated - measured).abs() / max(measured, energy, LEAST_LOSS))


@examples(60)
@given(problems(magnitudes=st.just(0), inputs=["many", "few", "a large channel"]), st.data())
def test_one_value_that_is_not_finite_is_named(problem, data):
    bad = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    row, column = data.draw(st.integers(0, len(problem.W) - 1)), data.draw(st.integers(0, problem.W.shape[1] - 1))
    W, X, H = problem.W.clone(), problem.X.clone(), problem.hessian()
    W[row, column] = bad
    with pytest.raises(ValueError, match="W holds non-finite values"):
        quantize(W, problem.format)
    with pytest.raises(ValueError, match="W holds non-finite values"):
        gptq(W, H, problem.format, tensor_scale=problem.tensor_scale)
    X[0, column] = bad
    hessian = Hessian(X.shape[1])
    hessian.add(X)
    with pytest.raises(
        ValueError, match=f"non-finite activations in .* input columns, the first {0 if math.isnan(bad) else ''}|non-finite"
    ):
        hessian.mean()
    weighted = Hessian(X.shape[1])
    weighted.add(problem.X, torch.full((len(X),), 1.0).index_fill(0, torch.tensor([0]), bad))
    with pytest.raises(ValueError, match=r"add up to|non-finite activations"):
        weighted.mean()
    broken = H.clone()
    broken[column, column] = bad
    with pytest.raises(NotPositiveDefiniteError):
        gptq(problem.W, broken, problem.format, tensor_scale=problem.tensor_scale)


@examples(40)
@given(problems(formats=[NVFP4], magnitudes=st.just(0)), st.sampled_from([0.5, 1.0]), st.sampled_from([0.0, 1e-6, 1e4]))
def test_drift_of_nothing_is_nothing_and_any_is_finite(problem, strength, size):
    hessian, drift = Hessian(problem.X.shape[1]), Drift(problem.X.shape[1])
    hessian.add(problem.X)
    drift.add(problem.X, size * problem.X.flip(0), None)
    assume(float(hessian.mean().diagonal().mean()) > 0)
    statistics = Statistics(hessian.mean(), [hessian.tokens], hessian.weight, drift)
    T = drift_target(problem.W, Recipe(drift=strength), statistics, range(len(problem.W)))
    assert T.isfinite().all() and (size > 0 or torch.equal(T, problem.W))
    drift.sum[0, 0] = float("inf")
    with pytest.raises(ValueError, match="what was lost before it is not finite"):
        drift_target(problem.W + 1, Recipe(drift=strength), statistics, range(len(problem.W)))


@pytest.mark.parametrize("size", [1e30, 3e38, 1e-40, 1e-45])
def test_nvfp4_spans_float32(size):
    """tensor_scale brings any magnitude into range: the relative error of a row stays that of size 1.  Denormals have fewer."""
    W = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    scaled = (W.double() * size).float()
    result = quantize(scaled, NVFP4).dequantize().double()
    assert result.isfinite().all()
    allowed = 0.15 if size > 1e-38 else 1.0
    assert float((result - scaled.double()).norm()) <= allowed * float(scaled.double().norm())


@pytest.mark.parametrize("size", [1e-12, 1e-16, 1e-18, 1e-20, 1e-22, 1e-37])
def test_a_linear_of_tiny_weights_is_no_error(size):
    """Of weights of 1e-22, a dead expert's, the loss underflows to 0 in float32, and what was added up in float64 does not."""
    model = tiny_model()
    model.model.layers[0].mlp.down_proj.weight.data *= size
    tokens = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    records = [record for record, _ in quantize_model(ModelAdapter(model), Recipe(), Calibration([tokens]))]
    assert len(records) == 14 and all(record.certificate < 1e-4 for record in records)
