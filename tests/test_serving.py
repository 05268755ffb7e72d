"""What engines are held against: the NLL and the words of a checkpoint as transformers loads it."""

import csv
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import ptq
from ptq.eval.perplexity import evaluate
from ptq.export.read_back import load_checkpoint

from .conftest import ROOT
from .test_evaluate import module_of
from .tiny import save_tiny


@pytest.fixture(scope="module")
def serve():
    return module_of("serve_check")


def test_the_reference_is_the_checkpoint_in_the_dtype_asked_for(serve, tmp_path):
    save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    tokens = torch.randint(0, 28, (4, 64), generator=torch.Generator().manual_seed(0))
    settings = {"method": "rtn", "device": "cpu", "progress": False, "output": tmp_path / "out"}
    ptq.quantize(tmp_path / "model", calibration=tokens, validation=0, **settings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    how = {"experts": False, "attention": "sdpa", "device": "cpu"}
    for dtype in (torch.bfloat16, torch.float32):
        model = load_checkpoint(tmp_path / "out", **how, dtype=dtype)
        said = serve.transformers_says(tmp_path / "out", tokens, dtype)
        assert said.nll == pytest.approx(math.log(evaluate({"it": model}, tokens)["it"].ppl), rel=1e-12)
        assert model.dtype == dtype and torch.equal(model.model.rotary_emb.inv_freq, loaded.model.rotary_emb.inv_freq)
        assert dtype == torch.float32 or torch.equal(model(tokens).logits, loaded(tokens).logits)
        assert len(said.following) == serve.FOLLOWING and said.engine == "transformers"


def test_rows_say_how_far_the_words_agree(serve):
    one, other = serve.Said(1.0, [1, 2, 3, 4]), serve.Said(1.25, [1, 2, 9, 4], "engine 1", "kernel")
    row = serve.beside(one, other)
    assert row["difference"] == 0.25 and row["same_greedy"] == "2 of 4" and row["kernel"] == "kernel"
    assert serve.beside(one, one)["same_greedy"] == "4 of 4"
    assert tuple(next(csv.reader((ROOT / "benchmarks" / "serving.csv").open()))) == serve.FIELDS
