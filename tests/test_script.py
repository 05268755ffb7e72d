"""scripts/quantize_llama.py from the outside: a whole run, and one clear line for everything that cannot work."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from .conftest import PYTHONPATH, ROOT, SMOLLM2
from .tiny import TEXT, save_tiny

SCRIPT = ROOT / "scripts" / "quantize_llama.py"


@pytest.fixture(scope="session")
def main():
    spec = importlib.util.spec_from_file_location("quantize_llama", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def job(tmp_path):
    """(model folder, text file, output folder, the arguments that quantize it all)."""
    save_tiny(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    output = tmp_path / "out"
    common = ["--calibration", str(text), "--sequences", "8", "--length", "64", "--output", str(output), "--device", "cpu"]
    return tmp_path / "model", text, output, [str(tmp_path / "model"), *common]


@pytest.mark.parametrize(
    "options, label",
    [
        (["--format", "nvfp4"], "gptq"),
        (["--format", "nvfp4", "--token-importance", "sampled", "--drift", "none", "--dtype", "bfloat16"], "gptq"),
        (["--format", "mxfp4", "--method", "rtn", "--rule", "local"], "rtn-local"),
        (["--format", "int4", "--block", "32", "--rule", "mse"], "gptq"),
        (["--format", "nvfp4", "--dtype", "bfloat16", "--method", "rtn", "--rule", "absmax"], "rtn"),
    ],
)
def test_a_whole_run(main, job, capsys, options, label):
    _, text, output, arguments = job
    assert main([*arguments, *options, "--evaluate", str(text), "--windows", "4"]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["reload_max_abs_diff"] == 0 and report["seconds"] > 0 and len(report["linears"]) == 14
    assert {"original", "rtn", label} <= report.keys()
    assert all(report[name]["tokens"] == 4 * 63 and report[name]["window"] == 64 for name in ("original", "rtn", label))
    assert report["original"]["kl"] == 0 < report[label]["kl"]
    assert report["settings"]["token_importance"] == ("sampled" if "sampled" in options else "none")
    assert report["settings"]["drift"] == ("full" if label == "gptq" and "none" not in options else "none")
    dtype = "bfloat16" if "bfloat16" in options else "float32"
    assert all(report[name]["dtype"] == dtype for name in ("original", "rtn", label))
    printed = capsys.readouterr().out
    assert f"scored in {dtype}:" in printed
    assert report["samples"].keys() == {"prompt", "original", label} and len(report["samples"]["prompt"].split()) == 32
    assert "greedily, after …" in printed and report[label]["kl_stderr"] > 0
    card = (output / "README.md").read_text()
    about = yaml.safe_load(card.split("---")[1])
    assert about["pipeline_tag"] == "text-generation" and about["tags"][0] == report["settings"]["format"]
    assert f"| {label} | {report[label]['ppl']:.3f} | {report[label]['kl']:.5f} |" in card and str(output.parent) not in card
    said = card.split("## What it says")[1].split("## How")[0]
    assert all(text in said for text in report["samples"].values()) and said.count("```") == 6
    assert "token ppl" in printed and "max |logit difference| = 0" in printed


# The program as it is twice, in forks that share what is imported before: with --help, and as it is asked to.
TWICE = """
import os, runpy, sys
script, *arguments = sys.argv[1:]
runpy.run_path(script)
for argv in (["--help"], arguments):
    child = os.fork()
    if child == 0:
        sys.argv = [script, *argv]
        runpy.run_path(script, run_name="__main__")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        sys.exit(code)
    print(end="\\0", flush=True)
"""


@pytest.mark.slow
def test_the_same_command_gives_the_same_bytes(main, job):
    """In this process and in another, which hashes strings differently; all files but the report, which holds times.

    And as a program, --help is whole, and a run that is piped draws no bars."""
    *_, output, arguments = job
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": seed}
    given = [word.replace(str(output), f"{output}2") for word in arguments]
    command = [sys.executable, "-c", TWICE, str(SCRIPT), *given, "--effort", "best"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    helped, ran, nothing = run.stdout.split("\0")
    assert "--calibration" in helped and "MODEL" in helped
    assert "it/s" not in run.stderr and ran and not nothing
    assert main([*arguments, "--effort", "best"]) == 0
    one, two = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}
        for folder in (output, output.with_name(f"{output.name}2"))
    )
    assert one == two and one


def one_line_error(main, arguments, capsys) -> str:
    assert main(arguments) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ")
    return errors[0]


@pytest.mark.parametrize(
    "replaced, message",
    [
        (["{nowhere}"], "no such folder"),
        (["{model}", "--calibration", "{nowhere}"], "is not there"),
        (["{model}", "--calibration", "{empty}"], "is empty"),
        (["{model}", "--sequences", "1000"], "fewer than the 1000 asked for"),
        (["{model}", "--length", "100000"], "too few for one window"),
        (["{model}", "--output", "{model}"], "exists already"),
        (["{model}", "--format", "int4"], "--block 64, or --ignore"),
        (["{model}", "--ignore", "nothing"], "matches no linear"),
        (["{model}", "--block", "32"], "nvfp4 checkpoints have blocks of 16"),
        (["{model}", "--damp", "-1"], "damp must be positive"),
        (["{model}", "--method", "rtn", "--rule", "joint"], "which method rtn has none of"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(main, job, capsys, tmp_path, replaced, message):
    model, _, output, arguments = job
    (tmp_path / "empty.txt").write_text("")
    before = sorted(tmp_path.iterdir())
    names = {"model": model, "nowhere": tmp_path / "nowhere.d" / "x", "empty": tmp_path / "empty.txt"}
    assert message in one_line_error(main, [arg.format(**names) for arg in [*arguments, *replaced]][1:], capsys)
    assert sorted(tmp_path.iterdir()) == before and not output.exists()


def test_damaged_weights_are_named(main, job, capsys):
    model, _, output, arguments = job
    broken = save_tiny(model)
    broken.model.layers[1].mlp.gate_proj.weight.data[0, 0] = float("nan")
    broken.save_pretrained(model)
    assert "model.layers.1.mlp.gate_proj.weight holds 1 non-finite" in one_line_error(main, arguments, capsys)
    assert not output.exists()


def test_a_tokenizer_of_another_model_is_refused(main, job, capsys):
    model, _, output, arguments = job
    save_tiny(model, vocab_size=8)
    assert "its tokenizer gives token 26, but the model has" in one_line_error(main, arguments, capsys)
    assert not output.exists()


def test_a_truncated_checkpoint_is_named(main, job, capsys):
    model, _, output, arguments = job
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert f"{weights} is damaged" in one_line_error(main, arguments, capsys)
    assert not output.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give --output, --evaluate or both"),
        (["--output", "x", "--sequences", "0"], "--sequences 0: too few"),
        (["--output", "x", "--length", "1"], "--length 1: too few"),
        (["--output", "x", "--format", "fp4"], "invalid choice: 'fp4'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(main, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(["model", *arguments])
    assert message in capsys.readouterr().err


def test_stories260k_is_refused_at_once_with_a_remedy_that_works(main, shared, tmp_path, capsys):
    """A trained model whose intermediate size, 172, no block of 16 divides."""
    arguments = [
        str(shared / "stories260K"),
        "--calibration",
        "builtin",
        "--sequences",
        "2",
        "--length",
        "64",
        "--output",
        str(tmp_path / "out"),
    ]
    error = one_line_error(main, arguments, capsys)
    assert "model.layers.0.mlp.down_proj has 172 input columns" in error and r"--ignore 're:.*\.mlp\.down_proj$'" in error
    assert main([*arguments, "--ignore", r"re:.*\.mlp\.down_proj$"]) == 0


@pytest.mark.slow
def test_babyllama_loses_half_as_much_as_rtn(main, shared, tmp_path):
    """A trained model that was never quantized, on its own kind of text: calibrated on three stories, evaluated on two others."""
    stories = (shared / "eval_text" / "tinystories_sample.txt").read_text().split("<|endoftext|>")
    for name, part in (("calibration", stories[:3]), ("test", stories[3:5])):
        (tmp_path / f"{name}.txt").write_text("".join(part))
    arguments = [str(shared / "babyllama-tok105"), "--calibration", str(tmp_path / "calibration.txt"), "--length", "128"]
    arguments += ["--sequences", "12", "--validation", "2"]
    arguments += ["--evaluate", str(tmp_path / "test.txt"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["gptq"]["kl"] < 0.5 * report["rtn"]["kl"]


@pytest.mark.skipif(not SMOLLM2.exists(), reason=f"{SMOLLM2} is not there; `make {SMOLLM2.relative_to(ROOT)}` gets it")
@pytest.mark.slow
@torch.no_grad()
def test_smollm2_loads_from_gguf_and_reads_back(tmp_path: Path):
    """The first two layers of a real model, real text, real checkpoint."""
    from ptq.core.formats import NVFP4
    from ptq.data.text import all_windows, read_documents
    from ptq.export.checkpoint import layer_tensors, shard_name, write_rest
    from ptq.export.compressed_tensors import CompressedTensors
    from ptq.export.files import save_tensors
    from ptq.export.read_back import verify
    from ptq.models.adapter import ModelAdapter
    from ptq.models.loading import load_model
    from ptq.run.loop import Calibration, quantize_layers
    from ptq.run.plan import make_plan
    from ptq.run.recipe import Recipe

    model, tokenizer = load_model(str(SMOLLM2))
    del model.model.layers[2:]
    model.config.num_hidden_layers, model.config.layer_types = 2, None
    text = " ".join(read_documents("builtin"))[:20_000]
    windows = all_windows(lambda text: tokenizer(text)["input_ids"], [text], 256, "builtin")[:8]  # type: ignore[arg-type]
    adapter, layout = ModelAdapter(model), CompressedTensors()
    plan = make_plan(adapter, Recipe(NVFP4, "gptq", "mse"))
    for done in quantize_layers(adapter, plan, Calibration(windows.split(4))):
        assert all(r.error is not None and r.rtn_error is not None and r.error < r.rtn_error for r in done.records)
        tensors = layer_tensors(done.layer, done.quantized, layout)
        save_tensors(tmp_path / shard_name(done.layer.index, 2), tensors)
    write_rest(tmp_path, adapter, tokenizer, plan.formats, layout)
    assert verify(tmp_path, adapter, windows[:1, :64], plan.formats, layout) == 0
