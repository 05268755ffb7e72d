"""ptq.quantize: the bytes of the command, on a path and in memory; calibration of every form; errors that say what to give."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ptq
from ptq import settings
from ptq.core.formats import FORMATS
from ptq.core.scales import RULES
from ptq.methods import METHODS

from .test_script import main  # noqa: F401  # a fixture
from .tiny import TEXT, WORDS, save_tiny, tiny_model, tiny_tokenizer

SMALL = {"sequences": 8, "length": 64, "device": "cpu", "progress": False}


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the report, which holds times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}


@pytest.fixture
def made(tmp_path):
    """(model folder, text file)"""
    save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "model", tmp_path / "text.txt"


def test_names_are_those_of_the_tables():
    assert tuple(FORMATS) == settings.FORMAT_NAMES
    assert tuple(RULES) == settings.RULE_NAMES
    assert tuple(METHODS) == settings.METHOD_NAMES


def test_import_and_arguments_need_no_torch():
    code = (
        "import sys, ptq, ptq.cli.quantize as q; q.parse_arguments(['m', '--output', 'o']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


@pytest.mark.parametrize("changes", [{}, {"effort": "best", "format": "mxfp4"}], ids=str)
def test_the_api_writes_what_the_command_writes(main, made, tmp_path, changes):  # noqa: F811
    model, text = made
    flags = [word for name, value in changes.items() for word in (f"--{name}", value)]
    common = ["--calibration", str(text), "--sequences", "8", "--length", "64", "--device", "cpu"]
    assert main([str(model), *common, *flags, "--output", str(tmp_path / "command")]) == 0
    result = ptq.quantize(str(model), calibration=str(text), output=tmp_path / "api", **SMALL, **changes)
    assert result.folder == tmp_path / "api" and contents(tmp_path / "api") == contents(tmp_path / "command")


def test_a_model_in_memory_gives_the_same_and_is_not_changed(made, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, text = made
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = ptq.quantize(model, tokenizer=AutoTokenizer.from_pretrained(folder), calibration=text, evaluate=str(text), **SMALL)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ptq.quantize(folder, calibration=text, evaluate=str(text), output=tmp_path / "streamed", **SMALL)
    saved = result.save(tmp_path / "saved")
    assert contents(saved) == contents(tmp_path / "streamed")
    report = result.report
    assert len(report.linears) == 14 and list(report.to_pandas()["error"]) == [one["error"] for one in report.linears]
    assert report.scores["gptq"]["kl"] > 0 == report.scores["original"]["kl"] and "token ppl" in str(report)
    logits = result.model(torch.tensor([[3, 4, 5]])).logits
    assert logits.shape == (1, 3, 64) and logits.isfinite().all()
    with pytest.raises(ValueError, match="exists already"):
        result.save(tmp_path / "saved")


def test_texts_and_the_file_of_them_and_their_tokens_are_one_calibration(made, tmp_path):
    """Four sequences that are all the text there is, in the order in which they are drawn of eight."""
    model, text = made
    words = TEXT.split()[: 12 * 64]
    tokens = torch.tensor(tiny_tokenizer()(" ".join(words))["input_ids"]).view(12, 64)
    text.write_text(" ".join(words))
    runs = {"file": str(text), "texts": [" ".join(words[:100]), " ".join(words[100:])], "tokens": tokens}
    made_of = {name: ptq.quantize(model, calibration=given, output=tmp_path / name, **SMALL) for name, given in runs.items()}
    weights = [
        {name: data for name, data in contents(result.folder).items() if name.endswith(".safetensors")}
        for result in made_of.values()
    ]
    assert weights[0] == weights[1] == weights[2]
    assert made_of["tokens"].report.content["command"] is None and made_of["tokens"].report.settings["length"] == 64


def test_rules_give_linears_formats_of_their_own(made, tmp_path):
    model, text = made
    rules = [(r"re:.*\.mlp\.(gate|up)_proj", "mxfp4"), (r"re:.*layers\.1\.self_attn\.o_proj", None)]
    result = ptq.quantize(model, calibration=text, rules=rules, method="rtn", **SMALL)
    assert len(result.report.linears) == 13
    assert result.report.content["rules"][0] == r"re:.*\.mlp\.(gate|up)_proj: mxfp4"
    assert "mixed-precision" in (result.folder / "config.json").read_text()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"calibration": torch.zeros(4, 8, dtype=torch.int32)}, r"tokens are torch.int32 \(4, 8\); give token ids"),
        ({"calibration": torch.zeros(8, dtype=torch.int64)}, r"have the shape \(8,\); give \(sequences, length\)"),
        ({"calibration": torch.full((9, 8), -100)}, "hold -100; token ids are 0 or more"),
        ({"calibration": torch.full((20, 8), 64)}, "hold 64, and .* has 64 embeddings"),
        ({"calibration": torch.zeros(3, 8, dtype=torch.int64), "sequences": 8}, "gives 3 sequences of 8 tokens, fewer than the 8"),
        ({"calibration": ["a b", 3]}, r"calibration\[1\] is a int; give texts"),
        ({"calibration": []}, "calibration is empty"),
        ({"format": "fp4"}, "format 'fp4': there are nvfp4"),
        ({"ignore": "lm_head"}, r"give a list: \['lm_head'\]"),
        ({"rules": [("re:.*", "fp5")]}, "unknown format 'fp5'"),
        ({"model": 3}, "model is a int; give a folder"),
        ({"model": "untied"}, "no tokenizer is given"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_what_to_give(made, given, message):
    folder, text = made
    arguments = {"model": str(folder), "calibration": str(text), **SMALL, **given}
    if arguments["model"] == "untied":
        arguments["model"] = tiny_model()
    with pytest.raises(ValueError, match=message):
        ptq.quantize(**arguments)


def test_push_to_hub_makes_the_repository_and_uploads_the_folder(made, monkeypatch):
    from huggingface_hub import HfApi, RepoUrl

    model, text = made
    calls = []
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo, **how: calls.append(how) or RepoUrl(f"https://huggingface.co/{repo}")
    )
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **how: calls.append(how))
    result = ptq.quantize(model, calibration=text, method="rtn", rule="absmax", **SMALL)
    assert result.push_to_hub("me/tiny-NVFP4", private=True) == "https://huggingface.co/me/tiny-NVFP4"
    assert calls[0] == {"private": True, "exist_ok": True} and calls[1]["folder_path"] == result.folder


def test_a_conversation_goes_through_the_chat_template(made, tmp_path):
    import json

    model, _ = made
    messages = [{"role": "user", "content": " ".join(WORDS)}, {"role": "assistant", "content": " ".join(reversed(WORDS))}]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for _ in range(20)))
    result = ptq.quantize(model, calibration=tmp_path / "chat.jsonl", method="rtn", **SMALL)
    assert result.report.content["calibrated_on"] == "conversations through the tokenizer's chat template"
    assert "through the tokenizer's chat template" in (result.folder / "README.md").read_text()
