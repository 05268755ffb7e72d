"""scripts/compare.py and the Hessians it shares."""

import copy
import json
import re

import pytest
import torch

from ptq.cli.compare import parse_arguments
from ptq.core.formats import NVFP4
from ptq.models.adapter import ModelAdapter
from ptq.pipeline import compare
from ptq.run.loop import Calibration, quantize_model
from ptq.run.recipe import Recipe
from ptq.run.shared_hessians import quantize_from, store_hessians

from .test_evaluate import module_of
from .tiny import TEXT, save_tiny, tiny_model


@pytest.fixture(scope="module")
def script():
    return module_of("compare")


def batches() -> list[torch.Tensor]:
    return list(torch.randint(0, 64, (6, 32), generator=torch.Generator().manual_seed(2)).split(2))


def test_the_first_layer_is_the_sequential_runners_and_the_others_see_the_original(tmp_path):
    model = tiny_model()
    store_hessians(ModelAdapter(model), batches(), {"none": None}, tmp_path)
    config = Recipe(NVFP4, "gptq", "local")
    shared, sequential = copy.deepcopy(model), copy.deepcopy(model)
    names = [record.name for record, _ in quantize_from(ModelAdapter(shared), tmp_path, "none", config)]
    assert len(names) == 14 and len(set(names)) == 14
    for _ in quantize_model(ModelAdapter(sequential), config, Calibration(batches())):
        pass
    first, second = ({k: v for k, v in shared.state_dict().items() if f"layers.{i}." in k} for i in (0, 1))
    theirs = sequential.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, theirs[name]) for name, tensor in second.items())
    partly = copy.deepcopy(model)  # the second layer quantized alone has the Hessians of the original
    partly.model.layers[1].load_state_dict(shared.model.layers[1].state_dict())
    again = copy.deepcopy(model)
    seen = {record.name: q for record, q in quantize_from(ModelAdapter(again), tmp_path, "none", config)}
    weight = partly.model.layers[1].mlp.up_proj.weight
    assert torch.equal(seen["model.layers.1.mlp.up_proj"].dequantize(), weight)


def test_activations_that_are_not_finite_name_the_stage(tmp_path):
    model = tiny_model()
    model.model.layers[1].input_layernorm.weight.data[3] = float("inf")
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.q_proj: non-finite activations in 1 input columns"):
        store_hessians(ModelAdapter(model), batches(), {"none": None}, tmp_path)


@pytest.fixture
def job(tmp_path):
    save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    (tmp_path / "text.txt").write_text(TEXT)
    text = str(tmp_path / "text.txt")
    calibration = ["--calibration", text, "--sequences", "4", "--length", "32"]
    cases = ["--cases", "rtn-absmax-none", "gptq-local-none", "gptq-joint-sampled", "--formats", "nvfp4", "mxfp4"]
    evaluation = ["--text", text, "--windows", "3", "--device", "cpu"]
    return tmp_path, [str(tmp_path / "model"), *cases, *calibration, *evaluation, "--output", str(tmp_path / "out")]


def test_cases_are_kept_one_by_one_and_a_second_run_goes_on(script, job, capsys, monkeypatch):
    folder, arguments = job
    quantize, done = compare.quantize_from, []

    def interrupted(*args):
        done.append(args[2])
        if len(done) == 3:
            raise KeyboardInterrupt
        return quantize(*args)

    monkeypatch.setattr(compare, "quantize_from", interrupted)
    assert script.main(arguments) == 130
    assert sorted(path.stem for path in (folder / "out").glob("*.json")) == [
        "nvfp4-gptq-local-none",
        "nvfp4-rtn-absmax-none",
        "original",
    ]
    capsys.readouterr()
    monkeypatch.setattr(compare, "store_hessians", None)  # they are there
    assert script.main(arguments) == 0 and len(done) == 3 + 4
    printed = capsys.readouterr().out
    assert "mxfp4-gptq-joint-sampled" in printed and printed.strip() == (folder / "out" / "report.md").read_text().strip()
    result = json.loads((folder / "out" / "mxfp4-gptq-local-none.json").read_text())
    assert result["text"]["protocol"]["window"] == 32 and result["text"]["dtype"] == "float32"
    assert result["bits_per_weight"] == 4.25 and result["text"]["kl"] > 0 and result["quantize_seconds"] > 0
    assert (folder / "out" / "report.html").read_text().count('class="dot"') == 2 * 6
    assert script.main([*arguments, "--damp", "0.1"]) == 1
    assert "was measured with another damp; name another --output" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # not taken for --windows
        script.main([*arguments, "--window", "64"])


def test_cases_with_drift_run_alone_beside_those_that_share_hessians(script, job, capsys, monkeypatch):
    folder, arguments = job
    cases = ["gptq-local-none", "gptq-local-none-full", "gptq-joint-sampled-half-rows"]
    assert script.main([*arguments, "--cases", *cases, "--formats", "nvfp4"]) == 0
    results = {name: json.loads((folder / "out" / f"nvfp4-{name}.json").read_text()) for name in cases}
    assert [result["made_by"] for result in results.values()] == ["shared Hessians", "sequential", "sequential"]
    printed = capsys.readouterr().out
    assert re.search(r"\| nvfp4-gptq-local-none-full \|.*\| sequential \|", printed)
    alone = [*arguments[:-1], str(folder / "alone"), "--cases", cases[1], "--formats", "nvfp4"]
    monkeypatch.setattr(compare, "store_hessians", None)  # nobody shares
    assert script.main(alone) == 0
    again = json.loads((folder / "alone" / f"nvfp4-{cases[1]}.json").read_text())
    assert again["text"] == results[cases[1]]["text"]
    config = Recipe(NVFP4, "gptq", "local", drift=1.0)
    case = compare.parse_case("nvfp4", cases[1], parse_arguments(alone))
    assert case.recipe == config and case.sequential


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--cases", "gptq-local"], "no such case: 'gptq-local'; write fast"),
        (["--cases", "gptq-local-none-ful"], "no such case: 'gptq-local-none-ful'; write fast"),
        (["--cases", "gptq-local-none-rows"], "row feedback needs the backward pass of token importance text or sampled"),
        (["--cases", "rtn-joint-none"], "scale rule 'joint' follows GPTQ's error feedback"),
        (["--formats", "int4"], "which blocks of 128 do not divide"),
        (["--text", "nowhere.txt"], "is not there"),
    ],
)
def test_bad_input_ends_in_one_line_before_any_work(script, job, capsys, extra, message):
    folder, arguments = job
    assert script.main([*arguments, *extra]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and message in errors[0] and not (folder / "out").exists()
