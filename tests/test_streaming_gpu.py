"""What only a GPU can show: no loop over batches waits for the device, and hidden states may stay on the host."""

import pytest
import torch
from transformers import LlamaConfig

from ptq.calibrate.activations import embed_all, propagate
from ptq.calibrate.collect import collect_part
from ptq.calibrate.importance import descend, token_importance
from ptq.calibrate.passes import Original, Passes, Stream
from ptq.run.loop import Calibration, quantize_model
from ptq.run.recipe import Recipe
from ptq.runtime.distributed import Ranks

from .tiny import random_model

pytestmark = pytest.mark.gpu

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TOKENS = torch.randint(0, 512, (16, 128), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_no_loop_over_batches_waits_for_the_device():
    """torch raises where a call synchronizes."""
    adapter = random_model.random_adapter(CONFIG, torch.device("cuda"))
    tokens = TOKENS.cuda()
    for on_host in (False, True):
        hidden = embed_all(adapter, tokens.split(4), on_host)
        layer, *_ = part = list(adapter.layers())
        plan = adapter.plan(layer)
        weights = {layer.full_name(group[0]): torch.rand(16, 128, device="cuda") for group in plan.groups}
        original = Original(layer, hidden.copy(on_host))
        adapter.logits(hidden.load(slice(0, 1)))  # reads the head
        propagate(adapter, layer, hidden, "forward")  # first calls may set libraries up
        descend(adapter, part, hidden.copy(on_host), hidden, tokens, {}, None, None, 0, 0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for beside in (None, original):
                stream = Stream(hidden, Ranks(), 16, weights, beside)
                collect_part(Passes(adapter, layer, plan, stream), plan.groups, hidden.groups)
            propagate(adapter, layer, hidden, "forward")
            descend(adapter, part, hidden.copy(on_host), hidden, tokens, {}, None, None, 0, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_hidden_states_on_the_host_change_nothing():
    adapter = random_model.random_adapter(CONFIG, torch.device("cuda"))
    batches = TOKENS.cuda().split(3)
    here, there = (token_importance(adapter, batches, seed=0, on_host=on_host, segment=2) for on_host in (False, True))
    for name, weights in here.items():
        # the backward pass of attention adds in no fixed order, in bfloat16
        assert torch.allclose(torch.cat(weights), torch.cat(there[name]), rtol=0.1, atol=1e-2 * float(torch.cat(weights).max()))
    done = [dict((r.name, q.codes) for r, q in quantize_model(adapter, Recipe(), Calibration(batches, here))) for _ in range(2)]
    assert all(torch.equal(codes, done[1][name]) for name, codes in done[0].items())
