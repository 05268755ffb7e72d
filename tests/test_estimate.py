"""The plan before the run: problems, sizes, and times against those measured on an H200."""

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ptq.cost.estimate import EXPERT_CALL, floor_seconds, memory, seconds, solve_seconds
from ptq.cost.preview import make_preview
from ptq.cost.shape import operations, shape_of
from ptq.export.files import existing_parent
from ptq.models.families import FAMILIES
from ptq.models.headers import Headers, from_headers
from ptq.models.loading import open_model
from ptq.run.plan import make_plan
from ptq.run.recipe import Recipe
from ptq.run.rules import all_rules
from ptq.run.settings import DRIFTS
from ptq.settings import Settings

from .conftest import ROOT
from .test_script import main  # noqa: F401  # a fixture
from .tiny import TEXT, random_model, save_tiny

ROWS = list(csv.DictReader((ROOT / "benchmarks" / "models.csv").open()))
# Drift at full strength since passes pause between waves; without it, or with half, before that as well.
MEASURED = [
    row
    for row in ROWS
    if row["commit"] in ("9f16ffc", "ca200eab", "9310115f")
    or (row["commit"] == "816dc82" and row["drift"] != "full")
    or (row["commit"] == "8ffc03c5" and "1B" in row["shape"])
    if row["format"] == "nvfp4" and "A3B" not in row["shape"]
]
MIXTURES = [row for row in ROWS if "A3B" in row["shape"] and row["commit"] == "8ffc03c5"]
NAMED = ("commit", "shape", "layers", "sequences", "gpus", "rule", "token_importance", "drift", "row_feedback")


def shape(name, layers, sequences=128, length=2048, importance="sampled", drift="none", rows=False):
    adapter = random_model.random_adapter(random_model.shape_config(name, layers), torch.device("cpu"))
    config = Recipe(rule="joint", row_feedback=rows, **DRIFTS[drift])
    return shape_of(make_plan(adapter, config), adapter, sequences, length, importance)


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: "-".join(row[key] for key in NAMED))
def test_estimates_are_near_what_was_measured(row):
    size = (int(row["layers"]), int(row["sequences"]), int(row["length"]))
    found = shape(row["shape"], *size, row["token_importance"], row["drift"], row["row_feedback"] == "True")
    total, gpus = float(row["seconds_total"]), int(row["gpus"])
    assert total / 1.3 < sum(seconds(found, gpus).values()) < total * 1.3
    assert floor_seconds(found) / gpus == pytest.approx(float(row["floor_seconds"]), abs=0.01)
    if row["deterministic"] == "False":  # partial sums of deterministic runs are not in the estimate
        peak = memory(found, int(row["batch"]), ranks=gpus).gpu / 1e9
        assert peak == pytest.approx(float(row["peak_gpu_gb"]), rel=0.3)


@pytest.mark.parametrize("row", MIXTURES, ids=lambda row: "-".join(row[key] for key in NAMED))
def test_estimates_of_mixtures_are_near_what_was_measured(row):
    found = shape(row["shape"], *(int(row[key]) for key in ("layers", "sequences", "length")), "none", row["drift"])
    total, batch = float(row["seconds_total"]), int(row["batch"])
    assert total / 1.3 < sum(seconds(found, int(row["gpus"]), batch).values()) < total * 1.3
    assert memory(found, batch).gpu / 1e9 == pytest.approx(float(row["peak_gpu_gb"]), rel=0.3)


def test_a_mixtures_launches_go_by_batches_and_its_matrices_are_solved_together():
    found = shape("Qwen3-30B-A3B", 1, importance="none", drift="full")
    small, large = (seconds(found, 1, batch) for batch in (16, 64))
    assert small["forward"] - large["forward"] == pytest.approx((8 - 2) * 2 * 128 * EXPERT_CALL["forward"])
    assert small["hessian"] - large["hessian"] == pytest.approx((8 - 2) * 2 * 128 * EXPERT_CALL["hessian"])
    alone = 128 * solve_seconds(1536, 2048)[0]
    assert solve_seconds(1536, 2048, 128)[0] < alone / 2 and solve_seconds(1536, 2048, 1)[0] == alone / 128
    dense = shape("Llama-3.2-1B", 2, importance="none", drift="full")
    assert seconds(dense, 1, 1) == seconds(dense, 1, 128)


def test_operations_are_those_of_a_count_by_hand():
    """One layer of Llama-3.1-8B, 2048 tokens."""
    one = shape("Llama-3.1-8B", 1, sequences=1)
    weights = 4096 * (4096 + 1024 + 1024) + 4096 * 4096 + 3 * 4096 * 14336
    counts = operations(one)
    attention = 2 * 2 * 4096 * 2048 * 2048 / 2  # two products with half of a square of scores each
    assert counts["forward"] == 2 * (2 * 2048 * weights + attention)
    assert counts["factorization"] == pytest.approx(2 / 3 * (3 * 4096**3 + 14336**3))


def test_a_70b_model_keeps_the_inputs_of_its_segments_on_the_host():
    whole = memory(shape("Llama-3.1-70B", 80), 4)
    assert whole.kept_on_host and whole.kept == 9 * 128 * 2048 * 8192 * 2 and whole.gpu < 60e9


def test_the_plan_lists_everything_that_will_not_work(main, tmp_path, capsys, monkeypatch):  # noqa: F811
    save_tiny(tmp_path / "model", intermediate_size=172)
    arguments = [str(tmp_path / "model"), "--plan", "--sequences", "2", "--length", "64", "--ignore", "re:.*q_proj", "nothing"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "172 input columns, which blocks of 16 do not divide" in printed
    assert "leaves model.layers.0.self_attn.q_proj alone but not model.layers.0.self_attn.k_proj" in printed
    assert "--ignore 'nothing' matches no linear" in printed
    assert "128 calibration tokens are fewer than the 172 input columns" in printed
    assert len(re.findall("^problem: ", printed, flags=re.M)) == 5
    assert main([*arguments[:-3], "--ignore", "re:.*"]) == 1
    assert "--ignore leaves nothing to quantize" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_headers_tell_what_the_model_itself_tells(tmp_path, family, tied):
    """Plan, shape, sizes and costs; to the last field."""
    save_tiny(tmp_path, family, tie_word_embeddings=tied)
    adapters = from_headers(str(tmp_path)), open_model(str(tmp_path))[0]
    rules = all_rules(Settings(effort="best"), [], ())
    how = {"batch": None, "on_host": None, "ranks": 1, "output": tmp_path, "cores": 2}
    found, known = (replace(make_preview(adapter, rules, 64, 128, "sampled", **how), free=0) for adapter in adapters)
    assert isinstance(adapters[0], Headers) and found == known and len(known.plan.linears) >= 8


@pytest.mark.parametrize(
    "changes",
    [{"attention_bias": True}, {"num_hidden_layers": 1}, {"intermediate_size": 64}, {"quantization_config": {"a": 1}}],
)
def test_models_that_their_config_does_not_describe_are_opened(tmp_path, changes):
    save_tiny(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert from_headers(str(tmp_path)) is None


@pytest.mark.slow
def test_a_plan_of_a_plain_model_loads_no_transformers(tmp_path):
    """Which takes twice as long as all of the rest."""
    save_tiny(tmp_path)
    code = "import sys; from ptq.cli import main; main(sys.argv[1:]); print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "plan", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-2:] == ["nothing that cannot work was found", "False"], done.stderr


def test_the_plan_tells_the_size_of_the_checkpoint(main, tmp_path, capsys):  # noqa: F811
    save_tiny(tmp_path / "model")
    (tmp_path / "text").write_text(TEXT)
    common = [str(tmp_path / "model"), "--sequences", "8", "--length", "64", "--device", "cpu"]
    assert main([*common, "--plan"]) == 0
    planned = capsys.readouterr().out
    assert re.search(r"on this CPU about \d+ s with \d+ cores? to itself: rough", planned)
    assert "14 linears" in planned and "4.5 bits a weight" in planned and "nothing that cannot work was found" in planned
    assert main([*common, "--plan", "--effort", "best"]) == 0
    squares = 2 * sum(d * d for d in (64, 64, 64, 32, 32, 128, 128))  # of up to 128 rows all is kept
    assert f"{4 * squares / 1e6:.3g} MB for row feedback" in capsys.readouterr().out
    assert main([*common, "--calibration", str(tmp_path / "text"), "--output", str(tmp_path / "out")]) == 0
    stored = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    found = re.search(r"over the whole checkpoint, ([\d.]+) MB", planned)
    # three digits are printed, and tensor scales are not counted
    assert found and float(found[1]) * 1e6 == pytest.approx(stored, rel=1e-2)
    assert existing_parent(tmp_path / "a" / "b") == tmp_path
