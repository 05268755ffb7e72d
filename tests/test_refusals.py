"""What callers are told: the sentences that no other file's subject covers."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file

import ptq
from ptq.core.activations import ACTIVATIONS
from ptq.core.activations import fake_quantize as reference
from ptq.core.formats import INT4_G128, NVFP4
from ptq.core.packing import pack
from ptq.eval.harness import load
from ptq.eval.logits import check_finite
from ptq.eval.perplexity import summarize
from ptq.eval.tasks import check_file
from ptq.export.convert import convert
from ptq.export.files import check_output
from ptq.export.gguf_blocks import to_blocks
from ptq.export.gguf_layout import ggml_name
from ptq.export.gguf_model import ARCHITECTURES, add_settings, architecture_of
from ptq.export.gguf_tokenizer import add_tokenizer, llama_name
from ptq.export.gptq_layout import GPTQLayout
from ptq.export.reader import open_checkpoint
from ptq.functional import block_hessians
from ptq.kernels.activations import fake_quantize_fused
from ptq.kernels.hessian import block_hessian
from ptq.kernels.quantize import check as check_weight
from ptq.kernels.search import search_scales
from ptq.kernels.sweep import sweep
from ptq.models.adapter import ModelAdapter
from ptq.models.configuration import LARGEST_CONFIG, check_config, read_config
from ptq.models.gguf_header import check_gguf
from ptq.models.headers import from_headers
from ptq.models.shards import LARGEST_INDEX, Shards, shard_paths
from ptq.pipeline.source import open_source
from ptq.run.allocate import measure
from ptq.run.loop import Calibration, check_calibration, quantize_model
from ptq.run.plan import make_plan
from ptq.run.recipe import Choice, Recipe
from ptq.run.recipe_file import parse_recipe, recipe_text
from ptq.run.rules import all_rules, file_rules
from ptq.settings import Settings

from .test_hostile import CORRUPT
from .test_layouts import INT4, exported, random_weight
from .tiny import save_tiny, tiny_model, tiny_tokenizer

TOKENS = torch.zeros(2, 8, dtype=torch.long)
LLAMA = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "max_position_embeddings": 8, "vocab_size": 8}
LLAMA |= {"intermediate_size": 64, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}
CHOICE = Choice((Recipe(), Recipe(method="rtn", rule="absmax")), 5.0)
LAST = [("re:.*", CHOICE), ("re:.*", Recipe())]
SQUARE = torch.eye(32)
TINY_SCALES = replace(random_weight(INT4), scales=torch.full((16, 4), 1e-9))


def shared_drift() -> None:
    check_calibration(make_plan(ModelAdapter(tiny_model()), Recipe(drift=1.0)), Calibration(), lambda *_: {})


def shared_activations() -> None:
    plan = make_plan(ModelAdapter(tiny_model()), Recipe(activation=ACTIVATIONS["nvfp4"]))
    check_calibration(plan, Calibration(), lambda *_: {})


def no_ridge() -> None:
    recipe = Recipe(rule="absmax", drift=1.0, ridge=1e-30)
    list(quantize_model(ModelAdapter(tiny_model()), recipe, Calibration([TOKENS])))


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: ptq.nothing, "module 'ptq' has no attribute 'nothing'"),
        (lambda: pack(torch.zeros(2, 3, dtype=torch.uint8)), "cannot pack an odd number of codes"),
        (lambda: reference(SQUARE, ACTIVATIONS["nvfp4"], None), "activation format nvfp4 needs a global scale"),
        (lambda: fake_quantize_fused(SQUARE.double(), ACTIVATIONS["mxfp4"]), "inputs of dtype .* cannot be rounded; cast"),
        (lambda: check_weight(SQUARE, INT4_G128), "these kernels round to E2M1; format 'int4'"),
        (lambda: check_weight(torch.zeros(2, 20), NVFP4), r"with d_in divisible by 16 is needed, not \(2, 20\)"),
        (lambda: search_scales(SQUARE, NVFP4, torch.tensor(1.0), (SQUARE,) * 3), "M must have 2 blocks of 16, not"),
        (lambda: sweep(SQUARE.double(), SQUARE, SQUARE, NVFP4, "absmax", 32), "the GPTQ kernels are for float32, not"),
        (lambda: block_hessians(SQUARE, -1, torch.zeros(3, 17), None), r"X \(3, 17\) must be \(tokens, d_in\) with d_in a"),
        (lambda: check_output(Path("nowhere"), 10**18), "output nowhere needs about 1000000000.00 GB; .* GB free"),
        (lambda: architecture_of({"model_type": "phi3"}), "model type 'phi3' cannot be written as GGUF here; llama"),
        (
            lambda: ggml_name("model.layers.0.mlp.x.weight", ARCHITECTURES["llama"], 1),
            "has no place in llama.cpp's architecture",
        ),
        (lambda: add_settings(gguf.GGUFWriter(None, "llama"), LLAMA, {"MXFP4"}), "rope type 'longrope' cannot be written as"),
        (lambda: llama_name((("Split", "x"),), Path("t")), "t splits text by .*, for which no name of llama.cpp is known"),
        (lambda: measure(ModelAdapter(tiny_model()), LAST, TOKENS, 2), "the rule with target_bits is the last to match no"),
        (shared_activations, "Hessians that several methods share are of activations as they are; leave activations out"),
        (shared_drift, "drift is of one run of quantized layers; Hessians that several"),
        (no_ridge, r"model\.layers\.0\.self_attn\.q_proj.*H \+ ridge 1e-30 is not positive definite \(pivot \d+ of 64\)"),
        (lambda: block_hessian(torch.zeros(3, 17), 16), "17 input columns do not divide into blocks of 16"),
        (lambda: to_blocks("a", TINY_SCALES), "a has scale 1e-09, which float16 and so GGUF's Q4_0 cannot hold"),
        (lambda: GPTQLayout().pack("a", random_weight(INT4, 12)), r"a has shape \(12, 128\); GPTQ's layout packs eight a word"),
        (lambda: GPTQLayout().config_files({"a": INT4, "b": INT4_G128}, ()), r"blocks of \[32, 128\] in one model; GPTQ's"),
        (lambda: summarize([]), "no windows to evaluate on"),
        (lambda: Recipe(method="rtn", frozen=True), "frozen scales are a variant of method gptq; rtn has no loop"),
        (lambda: recipe_text([("a", Recipe(frozen=True))]), "a recipe file has no word for frozen scales"),
        (lambda: parse_recipe("a: [", "r.yaml"), "recipe r.yaml is no YAML: "),
        (lambda: Settings(sequences=0), "sequences 0: too few, give 1 or more"),
        (lambda: Settings(batch=4, deterministic=True), "batch 4: --deterministic runs one sequence at a time"),
        (lambda: Settings(recipe="r", format="int4"), "recipe says formats and activations by linear; leave out format"),
    ],
)
def test_a_call_that_cannot_work_says_why(call, said):
    with pytest.raises((ValueError, AttributeError), match=said):
        call()


def test_choices_are_measured_by_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="target bits are measured by one process; run ptq plan in one"):
        measure(ModelAdapter(tiny_model()), [("re:.*", CHOICE)], TOKENS, 2)


def test_a_missing_gguf_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="the layout gguf needs the package gguf: pip install"):
        architecture_of({"model_type": "llama"})


def test_models_and_tokens_that_do_not_fit(tmp_path):
    save_tiny(tmp_path)
    quantize = partial(ptq.quantize, method="rtn", device="cpu", progress=False, validation=0, sequences=2, length=8)
    with pytest.raises(ValueError, match=r"calibration tokens hold 64, and .* has 64 embeddings"):
        quantize(tmp_path, calibration=TOKENS + 64)
    with pytest.raises(ValueError, match=r"has tensors on the meta device \(offloaded\); give its folder or hub id"):
        quantize(tiny_model().to("meta"), tokenizer=tiny_tokenizer(), calibration=TOKENS)


def test_models_in_memory_that_cannot_be_taken(tmp_path):
    changed, quantized = tiny_model(), tiny_model()
    changed.model.layers[1].mlp.up_proj.weight.data = torch.zeros(8, 64)
    quantized.config.quantization_config = {"quant_method": "awq"}
    tiny_model().save_pretrained(tmp_path)
    bare = type(changed).from_pretrained(tmp_path)
    cases = [
        (quantized, tiny_tokenizer(), "is quantized already; give the original"),
        (bare, None, f"no tokenizer is given, and none is found at '{tmp_path}': "),
        (str(tmp_path), tiny_tokenizer(), "a tokenizer is given beside a path; the checkpoint's own is used: leave it out"),
    ]
    for model, tokenizer, said in cases:
        with pytest.raises(ValueError, match=said):
            open_source(model, tokenizer)
    said = r"model\.layers\.1\.mlp\.up_proj\.weight has shape \(8, 64\) where the config says \(128, 64\)"
    with pytest.raises(ValueError, match=said):
        list(open_source(changed, tiny_tokenizer()).adapter.layers())


def test_row_feedback_of_a_rule_needs_the_loss(tmp_path):
    (tmp_path / "recipe.yaml").write_text("- linears: re:.*\n  row_feedback: true\n")
    settings = Settings(recipe=str(tmp_path / "recipe.yaml"), token_importance="none")
    with pytest.raises(ValueError, match="a rule has row feedback, which needs --token-importance text or sampled"):
        all_rules(settings, file_rules(settings), ())


def test_data_of_a_task_that_is_missing_is_said(tmp_path):
    from lm_eval.tasks import TaskManager

    text = "task: missing\ndataset_path: json\ndataset_kwargs: {data_files: nowhere.json}\ntest_split: train\ndoc_to_text: a\n"
    (tmp_path / "missing.yaml").write_text(text)
    with pytest.raises(ValueError, match="lm-eval cannot load the data of missing: "):
        load(["missing"], TaskManager(include_path=str(tmp_path), include_defaults=False), None)


def test_logits_that_are_not_finite_are_traced_to_their_layer():
    model = tiny_model()
    model.model.norm.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match=r"window 3; .*model\.norm, whose parameters hold 64 such values"):
        check_finite(model(TOKENS).logits, model, TOKENS, "window 3")


ASYMMETRIC = {"config_groups": {"0": {"weights": {"num_bits": 4, "symmetric": False}}}}


@pytest.mark.parametrize(
    "change, extra, said",
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, None, "has kv_cache_scheme .*, which only its own layout says: keep it"),
        (ASYMMETRIC, None, "has weights .*; only symmetric 4-bit ones are converted"),
        ({}, "model.layers.0.self_attn.k_scale", "its cache is quantized, which no other layout here holds"),
        ({}, "x.weight_packed", "x has no weight_scale: copy its file again"),
        ({}, "lm_head.weight_packed lm_head.weight_scale", "has a quantized lm_head, which no conversion here carries"),
        ({"quant_method": "awq"}, None, "is quantized by 'awq'; layouts read here are compressed-tensors, modelopt, gptq and"),
        ({"quant_method": "gptq"}, None, "has no tensor '.qweight', so no linear quantized in the layout gptq"),
        ({"quant_method": "gptq", "checkpoint_format": "v9"}, None, "has checkpoint_format 'v9'; GPTQ's known here are"),
    ],
)
def test_what_a_conversion_would_lose_is_refused(tmp_path, change, extra, said):
    folder = exported(tmp_path / "source", NVFP4)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    if extra:
        save_file({name: torch.ones(4, 4, dtype=torch.uint8) for name in extra.split()}, folder / "more.safetensors")
    with pytest.raises(ValueError, match=said):
        convert(folder, tmp_path / "out", "modelopt")


def large(path: Path, size: int) -> Path:
    """A file of so many bytes that takes no room."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_files_that_are_not_what_they_seem(tmp_path):
    save_tiny(tmp_path / "model")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "list.json").write_text("[]")
    config = large(tmp_path / "large.json", LARGEST_CONFIG + 1)
    (tmp_path / "long").mkdir()
    tensors = {"model.layers.1.a": torch.zeros(100_000), "b": torch.zeros(2, dtype=torch.int64)}
    save_file(tensors, tmp_path / "long" / "model.safetensors")
    (tmp_path / "long" / "config.json").write_text('{"hidden_size": 64, "num_hidden_layers": 2, "num_experts": 100000}')
    long = Shards(tmp_path / "long")
    broken = exported(tmp_path / "broken", NVFP4)
    (broken / "config.json").write_text("{")
    cases = [
        (lambda: check_file(tmp_path / "empty.jsonl", {}), "empty.jsonl is empty"),
        (lambda: check_file(tmp_path / "bad.jsonl", {"text": (str,)}), 'line 1: field "text" is not a string'),
        (lambda: read_config(tmp_path / "list.json"), "list.json holds no JSON object"),
        (lambda: read_config(config), "10000001 bytes, too many for a config"),
        (lambda: open_checkpoint(broken), r"config.json is not JSON \(.*\): copy it again"),
        (
            lambda: check_config(long.folder, long.tensors),
            r"its layers cannot be in the \d+ bytes of the weight files; it is not",
        ),
        (lambda: long.read(["b"]), r"b is in I64; give the original, in F64, F32, F16, BF16"),
        (lambda: Shards(tmp_path / "model").read(["x"]), "model holds no tensor x"),
        (
            lambda: add_tokenizer(gguf.GGUFWriter(None, "llama"), tmp_path / "model", 64),
            "is a WordLevel tokenizer; llama.cpp's",
        ),
    ]
    for call, said in cases:
        with pytest.raises(ValueError, match=said):
            call()


def test_what_headers_do_not_say_is_left_to_the_model(tmp_path):
    save_tiny(tmp_path, "qwen3_moe", intermediate_size=32)
    config, tokenizer = tmp_path / "config.json", tmp_path / "tokenizer.json"
    assert from_headers(str(tmp_path))
    said = config.read_text()
    config.write_text(json.dumps({key: value for key, value in json.loads(said).items() if key != "moe_intermediate_size"}))
    assert from_headers(str(tmp_path)) is None
    config.write_text(said)
    tokenizer.write_text("{")
    assert from_headers(str(tmp_path)) is None


@pytest.mark.parametrize(
    "content, said",
    [
        (b"{", "index.json is damaged"),
        (b'{"weight_map": {"a": "b.safetensors"}}', "lacks 'b.safetensors', which model.safetensors.index.json names"),
        (None, "100000001 bytes, too many for an index"),
    ],
)
def test_an_index_that_is_wrong(tmp_path, content, said):
    path = large(tmp_path / "model.safetensors.index.json", LARGEST_INDEX + 1)
    if content:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        shard_paths(tmp_path)


@pytest.mark.parametrize(
    "kind, said",
    [
        ("another kind", "it is no GGUF file"),
        ("version", "GGUF version 9; supported are 2 and 3"),
        ("long name", "4611686018427387904 bytes are to follow byte"),
        ("type", "a value of type 77 before byte"),
        ("twice", "field 'a' twice"),
        ("dimensions", "tensor 'a' is there twice, or has 2147483648 dimensions"),
        ("offset", "a tensor starts 1125899906842624 bytes after the tables"),
        ("layer", "tensor 'blk.x.w' has no layer number"),
    ],
)
def test_what_is_wrong_in_the_tables_of_a_gguf_file_is_said(tmp_path, kind, said):
    (tmp_path / "model.gguf").write_bytes(CORRUPT[kind])
    with pytest.raises(ValueError, match=said):
        check_gguf(tmp_path / "model.gguf")
