"""Formats by measured cost in KL: what is measured, the integer program, and the run."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ptq
from ptq.calibrate.importance import token_importance
from ptq.core.activations import MXFP4_INPUT
from ptq.core.formats import MXFP4, NVFP4
from ptq.kernels.activations import fake_quantize
from ptq.models.adapter import ModelAdapter
from ptq.run.allocate import allocate, solve
from ptq.run.plan import make_plan
from ptq.run.recipe import Choice, Recipe, recipe_of
from ptq.run.recipe_file import choice_of, parse_recipe, recipe_text
from ptq.run.sensitivity import Sensitivity, quantized

from .test_api import SMALL, made  # noqa: F401  # a fixture
from .test_script import main  # noqa: F401  # a fixture
from .tiny import tiny_model

TOKENS = torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(5))
FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def weights(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert found
    return found


def test_energies_are_those_of_one_backward_pass_through_the_whole_model():
    model = tiny_model()
    recipes = (Recipe(NVFP4, "rtn", "mse"), None, Recipe(MXFP4, "rtn", "absmax", activation=MXFP4_INPUT))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in name}
    watcher = Sensitivity(ModelAdapter(model), dict.fromkeys(linears, recipes))
    token_importance(ModelAdapter(model), TOKENS.split(4), watcher=watcher)
    seen = {}
    for name, linear in linears.items():
        linear.register_forward_hook(lambda _m, x, y, name=name: seen.update({name: (x[0], y)}))
    loss = nn.functional.cross_entropy(model(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")
    gradients = dict(zip(seen, torch.autograd.grad(loss, [y for _, y in seen.values()]), strict=True))
    for first, energies in watcher.energies.items():
        layer = first.removesuffix(FUSED[0])
        names = [layer + name for name in FUSED] if first.endswith(FUSED[0]) else [first]
        names = [first, first.replace("gate", "up")] if "gate" in first else names
        W, eye = torch.cat([linears[name].weight for name in names]).detach(), torch.eye(linears[first].in_features)
        for recipe, energy in zip(recipes, energies, strict=True):
            if recipe is None:
                assert energy == 0
                continue
            x, g = seen[first][0], torch.cat([gradients[name] for name in names], -1)
            rounded = fake_quantize(x, recipe.activation) if recipe.activation else x
            d = ((rounded @ quantized(W, eye, recipe).T - x @ W.T) * g).sum(-1).detach()
            # The forward pass in float32, then differences of products: 1e-3 leaves room for both.
            assert float(energy) == pytest.approx(float(d.square().sum() / 2), rel=1e-3)


def test_the_program_finds_the_best_of_all_assignments():
    random = np.random.default_rng(3)
    bits = [4.5, 8.0, 16.0]
    for target in (4.5, 5.0, 6.3, 16.0):
        weights = random.integers(1, 9, 6)
        costs = random.random((6, 3)) ** 3 * [1e-3, 1e-4, 0]
        best = min(
            costs[np.arange(6), list(pick)].sum()
            for pick in itertools.product(range(3), repeat=6)
            if (weights * np.array(bits)[list(pick)]).sum() <= target * weights.sum() * (1 + 1e-9)
        )
        found = solve(costs, list(weights), bits, target)
        assert (weights * np.array(bits)[found]).sum() <= target * weights.sum() * (1 + 1e-8)
        assert costs[np.arange(6), found].sum() <= best + 1e-4 * costs.max()  # the gap asked for


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "cohere2"])
def test_what_is_chosen_is_a_plan_that_keeps_fused_linears_together(family):
    adapter = ModelAdapter(tiny_model(family))
    choice = choice_of(Recipe(NVFP4, "gptq", "local", activation=None), 6.0)
    kept = "re:.*layers\\.1\\.self_attn"
    rules = [("re:.*", choice), (kept, None)]
    found = allocate(adapter, rules, TOKENS, 2)
    plan = make_plan(adapter, found.rules)  # raises where fused linears differ
    assert recipe_of("model.layers.1.self_attn.q_proj", found.rules) is None
    sizes = {name: m.weight.numel() for name, m in adapter.model.named_modules() if isinstance(m, nn.Linear)}
    assert 4.5 < found.bits <= 6.0 and len({recipe.format.name for recipe in plan.recipes.values()}) == 2
    taken = {name: plan.recipes[name].format.bits_per_weight if name in plan.recipes else 16.0 for name in plan.linears}
    if family == "llama":
        left = {name: bits for name, bits in taken.items()}
        others = [name for name in sizes if "layers" in name and "layers.1.self_attn" not in name]
        bits = sum(left.get(name, 16.0) * sizes[name] for name in others) / sum(sizes[name] for name in others)
        assert bits == pytest.approx(found.bits)
    assert found.predicted <= found.uniform[0][2] and found.uniform[-1] == ("kept in bfloat16", 16.0, 0.0)
    experts = {recipe for name, recipe in plan.recipes.items() if "layers.1." in name and ".experts." in name}
    assert len(experts) <= 1


def test_recipes_go_into_yaml_and_back():
    rules = [
        ("re:.*", Recipe(NVFP4, "gptq", "joint", drift=1.0, row_feedback=True)),
        ("re:a", Recipe(MXFP4, "rtn", "local", activation=MXFP4_INPUT, damp=0.02)),
        ("b", None),
    ]
    assert parse_recipe(recipe_text(rules), "x") == rules
    with pytest.raises(ValueError, match=r"drift 0\.25"):
        recipe_text([("a", Recipe(drift=0.25))])


def test_choices_that_cannot_be_made():
    adapter, base = ModelAdapter(tiny_model()), Recipe(NVFP4)
    with pytest.raises(ValueError, match=r"target bits 4\.4: no format here has fewer than 4\.5 a weight"):
        choice_of(base, 4.4)
    choice = choice_of(base, 5.0)
    assert str(Choice((base, None), 5.0)) == "nvfp4 by gptq with local or kept at 5 bits a weight"
    with pytest.raises(ValueError, match="2 rules have target_bits; one can"):
        allocate(adapter, [("re:.*", choice), ("re:.*mlp", choice)], TOKENS, 2)
    with pytest.raises(ValueError, match="match no linear"):
        allocate(adapter, [("re:.*", choice), ("re:.*", None)], TOKENS, 2)
    with pytest.raises(ValueError, match=r"recipe.*target_bits"):
        ptq.Settings(recipe="x.yaml", target_bits=5.0)


ROWS = {"rule": "local", "drift": "none", "row_feedback": True, "token_importance": "sampled"}


@pytest.mark.parametrize("more", [{"activations": "nvfp4"}, ROWS], ids=["activations", "rows"])
def test_a_run_says_what_it_chose_and_its_recipe_gives_the_same_bytes(made, tmp_path, more):  # noqa: F811
    model, text = made
    result = ptq.quantize(str(model), calibration=str(text), target_bits=5.5, **SMALL, **more)
    chosen = result.report.content["allocation"]
    assert chosen["target_bits"] == 5.5 and 4.5 < chosen["bits"] <= 5.5
    assert chosen["predicted_kl"] < chosen["uniform"][0][2] and "predicted KL" in str(result.report)
    (tmp_path / "recipe.yaml").write_text(chosen["recipe"])
    again = ptq.quantize(
        str(model), calibration=str(text), recipe=str(tmp_path / "recipe.yaml"), **SMALL,
        token_importance=result.report.settings["token_importance"],
    )  # fmt: skip
    assert weights(result.folder) == weights(again.folder)


def test_the_command_plans_and_a_file_may_leave_the_choice(main, made, tmp_path, capsys):  # noqa: F811
    model, text = made
    common = [str(model), "--calibration", str(text), "--sequences", "8", "--length", "64", "--device", "cpu", "--plan"]
    assert main([*common, "--target-bits", "5.5"]) == 0
    told = capsys.readouterr().out
    recipe = told.split("as a recipe:\n")[1].split("nothing that cannot work")[0]
    (tmp_path / "open.yaml").write_text("- linears: re:.*\n  target_bits: 5.5\n")
    assert main([*common, "--recipe", str(tmp_path / "open.yaml")]) == 0
    assert recipe in capsys.readouterr().out and parse_recipe(recipe, "the plan's")


def test_a_run_goes_on_with_what_it_chose(made, tmp_path, monkeypatch):  # noqa: F811
    from ptq.pipeline import run

    model, text = made
    settings = ptq.Settings(calibration=str(text), target_bits=5.5, sequences=8, length=64, device="cpu")
    run.run(str(model), settings, tmp_path / "whole", hidden=True)
    with monkeypatch.context() as patch:
        patch.setattr(run, "finish", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.run(str(model), settings, tmp_path / "cut", hidden=True)
    kept = json.loads((tmp_path / "cut.unfinished" / "fingerprint.json").read_text())["settings"]["allocation"]
    run.run(str(model), replace(settings, resume=True), tmp_path / "cut", hidden=True)
    report = json.loads((tmp_path / "cut" / "report.json").read_text())
    assert report["allocation"] == kept
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
