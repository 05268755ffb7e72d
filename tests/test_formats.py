"""Element and scale rounding against the definitions, over whole domains where they are small."""

import pytest
import torch

from ptq.core.formats import (
    BF16,
    E2M1,
    E4M3,
    E8M0,
    FORMATS,
    INT4,
    MXFP4,
    NVFP4,
    choose_tensor_scale,
    decode_scales,
    encode_scales,
    floor_exponent,
    get_format,
    nearest_e4m3,
    round_e2m1,
    round_exponent,
    scale_values,
)

LEVELS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def every_bfloat16() -> torch.Tensor:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return x[x.isfinite()]


def test_e2m1_ties_go_to_the_even_mantissa():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(round_e2m1(ties), expected)
    assert torch.equal(round_e2m1(-ties), -expected)


def test_e2m1_is_the_nearest_level_for_every_bfloat16():
    x = every_bfloat16().double()
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    distance = (x.abs()[:, None] - levels).abs()
    assert torch.equal((round_e2m1(x) - x).abs(), distance.amin(1))
    assert torch.equal(round_e2m1(round_e2m1(x)), round_e2m1(x))


@pytest.mark.parametrize("elements", [E2M1, INT4], ids=lambda e: e.name)
def test_every_code_survives(elements):
    values = torch.tensor(elements.values)
    codes = elements.encode(values)
    kept = [c for c in range(16) if not (elements is E2M1 and c == 8)]  # code 8 is E2M1's negative zero, stored as 0
    assert codes[kept].tolist() == kept
    assert torch.equal(elements.round(values), values)


@pytest.mark.parametrize("elements", [E2M1, INT4], ids=lambda e: e.name)
def test_dead_zone_and_saturation_are_what_they_say(elements):
    zone = torch.tensor([elements.dead_zone, -elements.dead_zone])
    assert (elements.round(zone) == 0).all() and (elements.round(1.001 * zone) != 0).all()
    assert elements.round(torch.tensor([1e9, -1e9])).abs().max() == elements.saturation


@pytest.mark.parametrize("elements", [E2M1, INT4], ids=lambda e: e.name)
def test_half_the_scale_is_no_worse_within_the_halving_range(elements):
    x = torch.linspace(-elements.halving_range, elements.halving_range, 100_001, dtype=torch.float64)
    coarse = (x - elements.round(x)).abs()
    fine = (x - elements.round(2 * x) / 2).abs()
    assert (fine <= coarse).all()


@pytest.mark.parametrize("grid", [E4M3, E8M0, BF16], ids=["e4m3", "e8m0", "bf16"])
def test_scale_grid_is_ascending_and_survives_storage(grid):
    values = scale_values(grid, torch.device("cpu"))
    assert (values.diff() > 0).all() and values[0] > 0 and values.isfinite().all()
    stored = encode_scales(values, grid)
    assert stored.dtype == grid.dtype
    integers = stored if grid.dtype == torch.uint8 else stored.view(torch.uint8 if grid.dtype.itemsize == 1 else torch.int16)
    assert torch.equal(decode_scales(integers.int(), grid), values)
    halves = values[values >= grid.halves_from] / 2
    assert torch.isin(halves, values).all()


def test_e4m3_grid_is_all_126_positive_codes():
    values = scale_values(E4M3, torch.device("cpu"))
    assert len(values) == 126 and values[0] == 2.0**-9 and values[-1] == 448


def test_absmax_scales():
    amax = torch.tensor([0.0, 1e-9, 6.0, 6 * 448.0, 1e9])
    assert nearest_e4m3(amax).tolist() == [2.0**-9, 2.0**-9, 1.0, 448.0, 448.0]
    amax = torch.tensor([4.0, 6.9, 7.0, 7.9, 8.0, 0.0])
    assert floor_exponent(amax).tolist() == [1.0, 1.0, 1.0, 1.0, 2.0, 2.0**-126]
    assert round_exponent(amax).tolist() == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0**-126]


@pytest.mark.parametrize("exponent", range(-85, 126, 5))
def test_tensor_scale_is_the_smallest_sufficient_power_of_two(exponent):
    """Over 63 decades no block scale saturates, and half the tensor_scale would not have been enough."""
    W = torch.ldexp(torch.rand(4, 32) + 0.5, torch.tensor(exponent))
    scale = choose_tensor_scale(W, NVFP4)
    assert torch.frexp(scale).mantissa == 0.5
    assert W.abs().max() <= 6 * 448 * scale and W.abs().max() > 6 * 448 * scale / 2


def test_tensor_scale_at_its_edges():
    assert choose_tensor_scale(torch.tensor([[6 * 448.0]]), NVFP4) == 1
    assert choose_tensor_scale(torch.zeros(2, 16), NVFP4) == 1
    assert choose_tensor_scale(torch.ones(2, 32), MXFP4) == 1


def test_unknown_format_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'fp5'.*nvfp4, mxfp4"):
        get_format("fp5")
    assert {get_format(name).name for name in FORMATS} == set(FORMATS)
