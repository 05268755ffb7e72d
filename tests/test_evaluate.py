"""scripts/evaluate.py from the outside."""

import importlib.util
import json
import math
import re

import pytest
import torch

from ptq.eval.checkpoint import gguf_bits, load_any
from ptq.pipeline import evaluate

from .conftest import ROOT, SMOLLM2
from .tiny import TEXT, WORDS, save_tiny, tiny_tokenizer

IMPORTANCES = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)


def module_of(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return module_of("evaluate")


@pytest.fixture
def job(tmp_path):
    """(folder, arguments) for an original and a model that is a little different."""
    save_tiny(tmp_path / "first")
    other = save_tiny(tmp_path / "other")
    other.lm_head.weight.data.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "tasks").mkdir()
    rows = [
        {
            "question": " ".join(WORDS[i : i + 3]),
            "choices": {"text": ["a b", "c"], "label": ["A", "B"]},
            "answerKey": "AB"[i % 2],
        }
        for i in range(8)
    ]
    (tmp_path / "tasks" / "arc_easy.test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = ["--text", str(tmp_path / "text.txt"), "--length", "64", "--windows", "5"]
    tasks = ["--tasks", "arc_easy", "--task-data", str(tmp_path / "tasks"), "--limit", "6"]
    models = [str(tmp_path / name) for name in ("first", "other")]
    return tmp_path, [*models, *text, *tasks, "--output", str(tmp_path / "out" / "run"), "--device", "cpu"]


def result(folder, label: str) -> dict:
    return json.loads((folder / "out" / f"run.{label}.json").read_text())


def test_a_whole_run(script, job, capsys):
    folder, arguments = job
    assert script.main(arguments) == 0
    first, other = result(folder, "first"), result(folder, "other")
    assert first["text"]["kl"] == 0 < other["text"]["kl"] and first["text"]["agreement"] == 1 == other["text"]["agreement"]
    assert first["text"]["tokens"] == 5 * 63 and first["text"]["protocol"]["stride"] == 64
    tokens, size = 3000, len(TEXT)
    assert first["text"]["bits_per_byte"] == pytest.approx(math.log2(first["text"]["token_ppl"]) * tokens / size)
    assert first["bits_per_weight"] == 32 and first["bytes"] == (folder / "first" / "model.safetensors").stat().st_size
    assert first["tasks"]["arc_easy"]["samples"] == 6
    printed = capsys.readouterr().out
    assert printed.strip() == (folder / "out" / "run.md").read_text().strip()
    assert (
        "| KL to first (nats a token) | token perplexity, windows of 64 |" in printed
        and "arc_easy acc_norm" in printed
        and "ln token_ppl" in printed
    )
    page = (folder / "out" / "run.html").read_text()
    assert len(first["text"]["sample"]["prompt"].split()) == 32 and first["text"]["sample"] == other["text"]["sample"]
    assert (
        page.count('class="dot"') >= 4
        and 'class="unsure"' in page
        and not re.search(r"(src|href)=|url\(|@import|<script", page)
    )


def test_results_survive_an_interruption_and_are_reused_on_request_only(script, job, capsys, monkeypatch):
    folder, arguments = job
    run_tasks, calls = evaluate.run_tasks, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_tasks(*args, **options)

    monkeypatch.setattr(evaluate, "run_tasks", interrupted)
    assert script.main(arguments) == 130
    assert result(folder, "first")["tasks"] and not (folder / "out" / "run.other.json").exists()
    assert script.main(arguments) == 1 and "is there already; --reuse takes it" in capsys.readouterr().err
    elsewhere = ["--output", str(folder / "text.txt" / "run")]
    assert script.main([*arguments, *elsewhere]) == 1
    assert f"cannot be made: {folder / 'text.txt'} is not a folder one may write to" in capsys.readouterr().err
    assert script.main([*arguments, "--reuse"]) == 0 and len(calls) == 3
    assert result(folder, "other")["text"]["kl"] > 0
    assert script.main([*arguments, "--reuse"]) == 0 and len(calls) == 3
    assert script.main([*arguments, "--reuse", "--limit", "5"]) == 0 and len(calls) == 5


def test_the_first_models_logits_are_computed_once(script, job, monkeypatch):
    folder, arguments = job
    arguments = [str(folder / "first"), *arguments[:8], "--output", str(folder / "out" / "run"), "--device", "cpu"]
    calls, run_model = [], evaluate.run_model

    def counted(model, name):
        def logits(index, window):
            calls.append((name, index))
            return run_model(model, name)(index, window)

        return logits

    monkeypatch.setattr(evaluate, "run_model", counted)
    assert script.main(arguments) == 0
    assert sorted(calls) == [(name, i) for name in ("first", "first-2", "other") for i in range(5)]
    kept = result(folder, "other")["text"]
    for path in (folder / "out").iterdir():
        path.unlink()
    assert script.main([*arguments, "--logits", "again"]) == 0
    assert result(folder, "other")["text"] == kept and len(calls) == 15 + 25


@pytest.mark.parametrize(
    "format, bits", [("nvfp4", 4.5 + 32 * 14 / IMPORTANCES), ("mxfp4", 4.25), ("int4", 4.5 + 128 * 14 / IMPORTANCES)]
)
def test_quantized_checkpoints_count_their_scales(script, job, format, bits):
    """NVFP4 stores a tensor scale of 32 bits for each linear, INT4 its shape in 128 bits."""
    folder, arguments = job
    quantized = folder / "quantized"
    made = [str(folder / "first"), "--method", "rtn", "--output", str(quantized), "--device", "cpu", "--format", format]
    calibration = ["--calibration", str(folder / "text.txt"), "--sequences", "2", "--length", "32"]
    block = ["--block", "32"] if format == "int4" else []
    assert module_of("quantize_llama").main([*made, *calibration, *block]) == 0
    texts = [arg for arg in arguments[2:8]]
    output = ["--output", str(folder / "out" / "run"), "--device", "cpu"]
    assert script.main([str(folder / "first"), str(quantized), *texts, *output]) == 0
    score = result(folder, "quantized")
    assert score["bits_per_weight"] == pytest.approx(bits)
    assert score["dtype"] == score["text"]["dtype"] == "bfloat16" and score["text"]["kl"] > 0
    assert score["made_by"] == f"ptq {format}, rtn, local, none" and score["quantize_seconds"] > 0


@pytest.mark.parametrize("method, package", [("gptq", "optimum"), ("awq", "gptqmodel")])
def test_a_format_whose_package_is_missing_names_it(tmp_path, method, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    save_tiny(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"model cannot be loaded: .*{package}"):
        load_any(str(tmp_path / "model"))


def test_a_gguf_file_counts_the_scales_of_its_blocks():
    """SmolLM2's file: Q4_1, 32 weights in 16 bytes and two float16, but for what llama.cpp keeps at 8 bits."""
    if not SMOLLM2.is_file():
        pytest.skip(f"{SMOLLM2} is not there; make demo downloads it")
    assert 5 <= gguf_bits(SMOLLM2) < 5.6


def test_a_hub_id_that_is_not_there_is_refused(script, job, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert script.main(["no/body", *job[1]]) == 1
    assert capsys.readouterr().err.startswith("error: no/body cannot be loaded: ")


def test_batch_size_auto_gives_the_same_numbers(script, job):
    folder, arguments = job
    assert script.main(arguments) == 0
    fixed = result(folder, "first")["tasks"]["arc_easy"]["metrics"]
    arguments[arguments.index("--output") + 1] = str(folder / "auto" / "run")
    assert script.main([*arguments, "--batch-size", "auto"]) == 0
    auto = json.loads((folder / "auto" / "run.first.json").read_text())["tasks"]["arc_easy"]["metrics"]
    assert {key: metric["value"] for key, metric in auto.items()} == {key: metric["value"] for key, metric in fixed.items()}


def test_other_tokens_give_no_kl(script, job):
    folder, arguments = job
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.add_tokens([TEXT[:3]])
    tokenizer.save_pretrained(folder / "other")
    assert script.main([*arguments[:8], "--output", str(folder / "out" / "run"), "--device", "cpu"]) == 0
    assert result(folder, "other")["text"]["kl"] is None and "other tokens" in (folder / "out" / "run.md").read_text()


@pytest.mark.parametrize(
    "replaced, message",
    [
        (["--tasks", "arc_esay"], "'arc_esay' is not known to the offline tasks (with --task-data); nearest: arc_easy"),
        (["--task-data", "{folder}"], "arc_easy.test.jsonl or .jsonl.gz, which is not there"),
        (["--length", "512"], "has a context of 256 tokens; give --length 256 or less"),
        (["--text", "{folder}/none.txt"], "is not there"),
        (["{folder}/nowhere/x"], "no such folder"),
        (["--fewshot", "2"], "few-shot examples need arc_easy.train.jsonl"),
    ],
)
def test_bad_input_ends_in_one_line_before_anything_is_evaluated(script, job, capsys, replaced, message):
    folder, arguments = job
    extra = [part.format(folder=folder) for part in replaced]
    given = extra + arguments if not extra[0].startswith("--") else arguments + extra
    assert script.main(given) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert not (folder / "out").exists()


def test_a_model_and_a_tokenizer_that_do_not_fit_are_refused(tmp_path):
    save_tiny(tmp_path / "model", vocab_size=8)
    with pytest.raises(ValueError, match="its tokenizer gives token 27, but the model has 8 embeddings"):
        load_any(str(tmp_path / "model"))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of the model, among them model.layers.1.mlp.up_proj.weight"):
        load_any(str(tmp_path / "model"))
