"""Forward passes that pause between the waves of a layer and go on with the weights as they are then."""

import copy
import gc
import weakref
from functools import partial
from itertools import count

import pytest
import torch

from ptq.calibrate import passes
from ptq.calibrate.activations import embed_all
from ptq.calibrate.collect import collect
from ptq.calibrate.observe import LayerPass
from ptq.calibrate.passes import Original, Passes, Stream
from ptq.models.adapter import ModelAdapter
from ptq.models.families import FAMILIES
from ptq.run import loop
from ptq.run.loop import Calibration, quantize_model
from ptq.run.recipe import Recipe
from ptq.runtime.distributed import Ranks
from ptq.runtime.hooks import Forward
from ptq.settings import DRIFTS

from .test_runner import tokens
from .tiny import tiny_model


def change(layer, group) -> None:
    for name in group:
        weight = layer.linear(name).weight
        weight.mul_(0.75).add_(0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_pass_goes_on_with_the_weights_as_they_are_then(family, dtype):
    """Every wave's linears change after it has been observed.  What is observed, and the output, are a whole pass's to the bit;
    and of a layer that does not change, too."""
    adapter = ModelAdapter(tiny_model(family, dtype))
    hidden = adapter.embed(tokens(2))
    for layer in adapter.layers():
        plan = adapter.plan(layer)
        going, seen = LayerPass(adapter, layer, plan, hidden), {}
        frozen = LayerPass(adapter, copy_of(layer), plan, hidden, frozen=True)
        before = adapter.forward(layer, hidden)
        for wave in plan.waves:
            names = [group[0] for group in wave]
            frozen.observe(names, lambda one: None, streams=True)
            going.observe(names, lambda one, seen=seen: seen.update({one.name: one}), streams=True)
            alone = {}
            anew = LayerPass(adapter, layer, plan, hidden)
            anew.observe(names, lambda one, alone=alone: alone.update({one.name: one}), streams=True)
            anew.close()
            for name in alone:
                assert torch.equal(seen[name].x, alone[name].x)
                assert (seen[name].stream is None) == (alone[name].stream is None)
                if alone[name].stream is not None:
                    assert torch.equal(seen[name].stream, alone[name].stream)
            for group in wave:
                change(layer, group)
        assert torch.equal(going.finish(), adapter.forward(layer, hidden))
        assert torch.equal(frozen.finish(), before)
        hidden = before


def copy_of(layer):
    return type(layer)(layer.index, layer.name, copy.deepcopy(layer.module), layer.renamed)


@pytest.mark.parametrize("drift", ["half", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2_moe", "mixtral"])
def test_passes_that_were_let_go_change_nothing(family, drift, monkeypatch):
    """Where there is no memory to keep one it begins again from the layer's input."""
    original, found = tiny_model(family, num_hidden_layers=2), []
    for reserve in (0.0, 2.0):
        monkeypatch.setattr(passes, "RESERVE", reserve)
        model = copy.deepcopy(original)
        results = quantize_model(ModelAdapter(model), Recipe(rule="mse", **DRIFTS[drift]), Calibration(tokens(6).split(2)))
        found.append({record.name: weight for record, weight in results})
    for name, weight in found[0].items():
        assert torch.equal(weight.codes, found[1][name].codes) and torch.equal(weight.scales, found[1][name].scales)
    assert found[0].keys() == found[1].keys()


@pytest.mark.parametrize("kept", [True, False])
def test_a_kept_pass_runs_every_linear_once(kept, monkeypatch):
    monkeypatch.setattr(passes, "RESERVE", 0.0 if kept else 2.0)
    model, calls = tiny_model(num_hidden_layers=1), dict.fromkeys(("q_proj", "up_proj"), 0)
    for name in calls:
        linear = next(module for full, module in model.named_modules() if full.endswith(name))
        linear.register_forward_hook(partial(add_one, calls, name))
    list(quantize_model(ModelAdapter(model), Recipe(drift=1.0), Calibration(tokens(4).split(2))))
    # Two batches, and one run to see how the layer's linears hang together.  Passes that are let go come to q_proj for the
    # inputs of o_proj, of the MLP, of down_proj and for the output; to up_proj for the last two.
    assert calls == ({"q_proj": 2 + 1, "up_proj": 2 + 1} if kept else {"q_proj": 8 + 1, "up_proj": 4 + 1})


def add_one(calls, name, *_):
    calls[name] += 1


def test_a_pass_holds_nothing_when_it_is_closed():
    """Nor while it pauses what its observer held: the sums of a wave are large."""
    adapter = ModelAdapter(tiny_model(num_hidden_layers=1))
    (layer,) = adapter.layers()
    plan, hidden = adapter.plan(layer), adapter.embed(tokens(2))
    holders = [Holder(), Holder()]
    references = [weakref.ref(holder) for holder in holders]
    gc.collect()
    gc.disable()
    try:
        going = LayerPass(adapter, layer, plan, hidden)
        going.observe(["self_attn.q_proj"], holders[0].see, streams=False)
        held = weakref.ref(holders[0].x)
        holders.pop(0)
        assert references[0]() is None and held() is not None
        going.close()
        assert held() is None and not going.can_finish
        with pytest.raises(RuntimeError, match="broken"):
            Forward(lambda: broken(hidden)).observe((), lambda *_: None)
    finally:
        gc.enable()


class Holder:
    def see(self, seen) -> None:
        self.x = seen.x


def broken(hidden):
    raise RuntimeError("broken")


def paused() -> int:
    """Passes that wait to go on."""
    gc.collect()
    return sum(type(one) is Forward and not one.dead for one in gc.get_objects())


class Full:
    """A hook that says there is no memory for more than two sequences, at the second batch that comes to it."""

    def __init__(self, module, *, original: bool):
        self.module, self.original, self.calls = module, original, count(1)
        module.register_forward_pre_hook(self)

    def __call__(self, module, args) -> None:
        if (module is not self.module) == self.original and len(args[0]) > 2 and next(self.calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    def __deepcopy__(self, memo) -> "Full":
        return self


@pytest.mark.parametrize("original", [False, True], ids=["ours", "original"])
@pytest.mark.parametrize(
    "wave, place", [(0, "post_attention_layernorm"), (1, "self_attn.o_proj"), (2, "post_attention_layernorm")]
)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_out_of_memory_in_a_wave_does_it_again_with_half_the_batch(family, wave, place, original, monkeypatch):
    """The first batch of the wave has been taken in by then.  The same as a run that goes over to half the batch before it.
    Where half of the drift is made good all is collected in wave 0."""
    found, waves = [], count()
    recipe = Recipe(rule="mse", drift=1.0) if wave else Recipe(rule="mse", drift=0.5, stagewise=False)

    def collect_with_less(passes, *arguments):
        if next(waves) == wave:
            passes.stream.hidden.batch = 2
        return collect(passes, *arguments)

    def run() -> dict:
        results = quantize_model(ModelAdapter(model), recipe, Calibration(tokens(7).split(4)))
        return {record.name: weight for record, weight in results}

    model = tiny_model(family)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "collect", collect_with_less)
        found.append(run())
    model = tiny_model(family)
    Full(model.model.layers[0].get_submodule(place), original=original)
    with pytest.warns(UserWarning, match="out of memory in phase 'forward': going on with 2 sequences at once"):
        found.append(run())
    assert found[0].keys() == found[1].keys() and paused() == 0
    for name, weight in found[0].items():
        assert torch.equal(weight.codes, found[1][name].codes) and torch.equal(weight.scales, found[1][name].scales)


@torch.no_grad()
def test_no_pass_is_kept_after_memory_ran_out():
    """On a GPU they may be what took it."""
    model = tiny_model()
    adapter = ModelAdapter(model)
    layer = next(adapter.layers())
    stream = Stream(embed_all(adapter, tokens(7).split(4)), Ranks(), 7)
    going = Passes(adapter, layer, adapter.plan(layer), stream, keep_ours=True)
    first, second, *_ = going.plan.waves
    collect(going, first, [[0]] * len(first))
    assert paused() == 2
    Full(layer.module.self_attn.o_proj, original=False)
    with pytest.warns(UserWarning, match="going on with 2 sequences at once"):
        collect(going, second, [[0]] * len(second))
    assert paused() == 0


@pytest.mark.parametrize("original", [False, True], ids=["ours", "original"])
@torch.no_grad()
def test_out_of_memory_while_passes_end_begins_those_that_are_left(original, monkeypatch):
    """Every sequence gets through the layer once, those of the batch that failed and after it by halves."""
    adapter = ModelAdapter(tiny_model())
    layer = next(adapter.layers())
    plan, hidden = adapter.plan(layer), embed_all(adapter, tokens(7).split(4))
    theirs = Original(copy_of(layer), hidden.copy())
    stream = Stream(hidden, Ranks(), 7, original=theirs)
    before, going = hidden.data.clone(), Passes(adapter, layer, plan, stream, keep_ours=True, keep_theirs=True)
    for wave in plan.waves:
        collect(going, wave, [[0]] * len(wave))
        for group in wave:
            change(layer, group)
    finish, calls = LayerPass.finish, count(1)

    def full(one) -> torch.Tensor:
        if (one.layer is not layer) == original and next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return finish(one)

    monkeypatch.setattr(LayerPass, "finish", full)
    with pytest.warns(UserWarning, match="going on with 2 sequences at once"):
        going.finish()
    for state, of in ((hidden, layer), (theirs.hidden, theirs.layer)):
        assert torch.equal(state.data, torch.cat([adapter.forward(of, x) for x in before.split([4, 2, 1])]))
    assert paused() == 0


@pytest.mark.parametrize("wrong", [ValueError, KeyboardInterrupt])
def test_a_run_that_ends_early_leaves_no_pass_behind(wrong):
    """It would be held for good, and with it the layer and the sequences."""
    model = tiny_model()
    calls = count(1)

    def fail(*_) -> None:
        if next(calls) == 3:
            raise wrong

    model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(fail)
    with pytest.raises(wrong):
        list(quantize_model(ModelAdapter(model), Recipe(drift=1.0), Calibration(tokens(4).split(2))))
    assert paused() == 0


def test_a_pass_that_is_closed_while_another_runs_goes_back_to_that():
    """As when garbage is collected."""
    linear, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    first = Forward(lambda: linear(x))
    assert first.observe([linear], lambda *_: None, (linear,)) is None and not first.dead
    second = Forward(lambda: (first.close(), linear(x))[1])
    result = second.observe((), lambda *_: None)
    assert result is not None and torch.equal(result, linear(x)) and first.dead and second.dead
