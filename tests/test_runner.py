"""The loop on tiny real models: what it changes, what it reports, and what it refuses."""

import re
from dataclasses import replace

import pytest
import torch

from ptq.calibrate.activations import Activations
from ptq.calibrate.hessian import Hessian
from ptq.calibrate.importance import token_importance
from ptq.core.activations import NVFP4_INPUT
from ptq.core.formats import INT4_G128, MXFP4, NVFP4
from ptq.models.adapter import ModelAdapter
from ptq.run.loop import Calibration, quantize_model
from ptq.run.plan import make_plan, with_block
from ptq.run.recipe import Recipe
from ptq.run.record import CertificateError, LinearStats, certify
from ptq.runtime.distributed import Ranks
from ptq.runtime.hooks import observe_outputs

from .tiny import tiny_model

CONFIGS = [
    Recipe(NVFP4, "gptq", "local"),
    Recipe(NVFP4, "rtn", "local"),
    Recipe(MXFP4, "gptq", "mse"),
    Recipe(replace(INT4_G128, block=32), "gptq", "absmax"),
]


def tokens(sequences: int = 6, length: int = 64) -> torch.Tensor:
    return torch.randint(0, 64, (sequences, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.format.name}-{c.method}-{c.rule}")
def test_linears_become_what_was_yielded_and_nothing_else_changes(config, dtype):
    model = tiny_model(dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results = {
        record.name: quantized
        for record, quantized in quantize_model(ModelAdapter(model), config, Calibration(tokens().split(2)))
    }
    assert len(results) == 14
    for name, tensor in model.state_dict().items():
        linear = name.removesuffix(".weight")
        if linear in results:
            assert torch.equal(tensor, results[linear].dequantize().to(dtype)) and not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_records_equal_a_computation_from_scratch(dtype):
    """Errors from the activations themselves, with the inputs that the already quantized layers give."""
    model, original = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
    adapter, batches = ModelAdapter(model), tokens().split(3)
    records = {record.name: record for record, _ in quantize_model(adapter, CONFIGS[0], Calibration(batches))}
    assert all(record.tokens == 6 * 64 and record.dead_inputs == 0 and record.seconds > 0 for record in records.values())
    # Inputs of layer 1 come from quantized layer 0; within layer 1 they were read before its linears changed.
    hidden = [adapter.embed(batch) for batch in batches]
    layer0, layer1 = adapter.layers()
    for i, x in enumerate(hidden):
        hidden[i] = adapter.forward(layer0, x)
    old = replace(layer1, module=original.model.layers[1])
    seen: list[torch.Tensor] = []
    with torch.no_grad(), observe_outputs([old.module.mlp.down_proj], lambda _, x, y: seen.append(x)):
        for x in hidden:
            adapter.forward(old, x)
    X = torch.cat(seen).flatten(0, 1).double()
    W, Q = old.module.mlp.down_proj.weight.detach().double(), layer1.module.mlp.down_proj.weight.detach().double()
    error = ((W - Q) @ X.T).norm() / (W @ X.T).norm()
    record = records["model.layers.1.mlp.down_proj"]
    # H is a float32 sum over 384 tokens, and bfloat16 activations take another path through the matmuls batch by batch.
    assert record.error == pytest.approx(float(error), rel=1e-4 if dtype == torch.float32 else 2e-2)
    assert record.rtn_error is not None and record.error is not None and record.error < record.rtn_error


def test_stages_share_one_tensor_scale():
    results = {r.name: q for r, q in quantize_model(ModelAdapter(tiny_model()), CONFIGS[0], Calibration(tokens().split(2)))}
    for stage in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        scales = {
            float(q.tensor_scale) for name, q in results.items() if name.startswith("model.layers.0") and name.endswith(stage)
        }
        assert len(scales) == 1


def test_certificate_is_on_every_gptq_linear_and_catches_wrong_feedback():
    records = [record for record, _ in quantize_model(ModelAdapter(tiny_model()), CONFIGS[0], Calibration(tokens().split(2)))]
    # Float32 leaves about 2 √128 · 2⁻²⁴ · ‖W‖/‖Δ‖, 2e-5 for errors of 6 %.
    assert all(record.certificate is not None and record.certificate < 2e-5 for record in records)
    right = LinearStats(output_energy=1, error_energy=1, rtn_energy=1, accumulated=2, measured=2, moved=0, seconds=0)
    assert certify("a", right) == 0
    rtn = [record for record, _ in quantize_model(ModelAdapter(tiny_model()), CONFIGS[1], Calibration(tokens().split(2)))]
    assert all(record.certificate is None for record in rtn)
    with pytest.raises(CertificateError, match="b: Σ err² = 2 but"):
        certify("b", right._replace(measured=2.1))


def test_hooks_are_gone_after_an_exception():
    model = tiny_model()

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), observe_outputs([model.model.layers[0].mlp.down_proj], fail):
        model(tokens(1))
    assert not any(module._forward_hooks for module in model.modules())


def test_only_one_layer_has_hessians(monkeypatch):
    """Every Hessian of a layer is dead by the time the next layer makes its own."""
    import weakref

    alive: list[weakref.ref] = []
    most = 0
    plain = Hessian.__init__

    def counting(self, *args, **kwargs):
        nonlocal most
        plain(self, *args, **kwargs)
        alive.append(weakref.ref(self))
        most = max(most, sum(ref() is not None for ref in alive))

    monkeypatch.setattr(Hessian, "__init__", counting)
    for _ in quantize_model(ModelAdapter(tiny_model(num_hidden_layers=4)), CONFIGS[0], Calibration(tokens().split(2))):
        pass
    assert len(alive) == 16 and most <= 4


def test_non_finite_activations_name_layer_and_stage():
    model = tiny_model()
    model.model.layers[1].input_layernorm.weight.data[3] = float("inf")
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.q_proj.*non-finite activations"):
        list(quantize_model(ModelAdapter(model), CONFIGS[0], Calibration(tokens().split(2))))


def test_calibration_is_asked_for_where_it_is_needed():
    with pytest.raises(ValueError, match="gptq with scale rule local needs calibration"):
        next(quantize_model(ModelAdapter(tiny_model()), CONFIGS[0]))
    records = [record for record, _ in quantize_model(ModelAdapter(tiny_model()), Recipe(NVFP4, "rtn", "mse"))]
    assert len(records) == 14 and all(record.error is None and record.tokens == 0 for record in records)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "awq"}, "unknown method 'awq'; there are rtn, gptq"),
        ({"rule": "best"}, "unknown scale rule 'best'"),
        ({"method": "rtn", "rule": "joint"}, "'joint' follows GPTQ's error feedback"),
        ({"damp": 0.0}, "damp must be positive, not 0.0"),
        ({"format": MXFP4, "activation": NVFP4_INPUT}, "no engine runs mxfp4 weights on activations in nvfp4"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe(**arguments)


def test_ignored_linears_are_left_alone():
    model = tiny_model()
    ignore = ("re:.*mlp.down_proj", "model.layers.0.self_attn.o_proj", "lm_head")
    plan = make_plan(ModelAdapter(model), CONFIGS[0], ignore)
    assert len(plan.linears) == 11 and len(plan.ignored) == 3 and plan.weights == sum(a * b for a, b in plan.linears.values())
    done = [
        record.name
        for record, _ in quantize_model(ModelAdapter(model), CONFIGS[0], Calibration(tokens().split(2)), ignore=ignore)
    ]
    assert sorted(done) == sorted(plan.linears)


@pytest.mark.parametrize(
    "ignore, message",
    [
        (("lm_haed",), "--ignore 'lm_haed' matches no linear; names look like model.layers.0.self_attn.q_proj"),
        (("re:.*q_proj",), "leaves model.layers.0.self_attn.q_proj alone but not model.layers.0.self_attn.k_proj"),
        (("re:.*",), "leaves nothing to quantize"),
        (("re:*down",), "ignore pattern 're:*down' is no regular expression: nothing to repeat"),
    ],
)
def test_ignore_patterns_that_do_not_fit_are_refused(ignore, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_plan(ModelAdapter(tiny_model()), CONFIGS[0], ignore)


def test_shapes_that_blocks_do_not_divide_name_the_linear_and_what_works():
    model = tiny_model(intermediate_size=172)
    with pytest.raises(ValueError) as caught:
        make_plan(ModelAdapter(model), CONFIGS[0])
    assert "model.layers.0.mlp.down_proj has 172 input columns, which blocks of 16 do not divide (2 such linears)" in str(
        caught.value
    )
    pattern = re.search(r"--ignore '(.*)'", str(caught.value))
    assert pattern and len(make_plan(ModelAdapter(model), CONFIGS[0], (pattern[1],)).ignored) == 2
    with pytest.raises(ValueError, match="--block 64, or --ignore"):
        make_plan(ModelAdapter(tiny_model()), Recipe(INT4_G128))


def test_block_sizes():
    assert with_block(INT4_G128, 64).block == 64 and with_block(NVFP4, None) == NVFP4 and with_block(NVFP4, 16) == NVFP4
    with pytest.raises(ValueError, match="nvfp4 checkpoints have blocks of 16"):
        with_block(NVFP4, 32)
    with pytest.raises(ValueError, match="--block 48"):
        with_block(INT4_G128, 48)


def test_non_finite_weights_are_named_before_any_work():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight holds 1 non-finite values, the first at \[3, 5\]"):
        next(quantize_model(ModelAdapter(model), CONFIGS[0], Calibration(tokens().split(2))))


class SmallDevice(ModelAdapter):
    """A device on which more than `most` sequences at once do not fit."""

    most = 2

    def forward(self, layer, hidden):
        if len(hidden) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return super().forward(layer, hidden)


def test_out_of_memory_halves_the_batch_and_says_so():
    batches = tokens(6).split(4)
    expected = [q.codes for _, q in quantize_model(ModelAdapter(tiny_model()), CONFIGS[0], Calibration(tokens(6).split(2)))]
    with pytest.warns(UserWarning, match="out of memory in phase 'forward': going on with 2 sequences at once"):
        done = [q.codes for _, q in quantize_model(SmallDevice(tiny_model()), CONFIGS[0], Calibration(batches))]
    assert all(torch.equal(a, b) for a, b in zip(done, expected, strict=True))
    with pytest.warns(UserWarning, match="phase 'importance'"):
        weights = token_importance(SmallDevice(tiny_model()), batches, segment=1)
    plain = token_importance(ModelAdapter(tiny_model()), tokens(6).split(2), segment=1)
    assert all(torch.equal(torch.cat(weights[name]), torch.cat(plain[name])) for name in plain)


def test_out_of_memory_halves_what_ran_not_a_batch_that_no_group_fills():
    """Sixteen sequences run in eight groups, two at once, whatever more a batch may have."""
    adapter = SmallDevice(tiny_model())
    adapter.most = 1
    expected = [q.codes for _, q in quantize_model(ModelAdapter(tiny_model()), CONFIGS[0], Calibration(tokens(16).split(1)))]
    with pytest.warns(UserWarning, match="out of memory in phase 'forward': going on with one sequence at a time"):
        done = [q.codes for _, q in quantize_model(adapter, CONFIGS[0], Calibration(tokens(16).split(16)))]
    assert all(torch.equal(a, b) for a, b in zip(done, expected, strict=True))
    with pytest.warns(UserWarning, match="phase 'importance'.*with one sequence at"):
        token_importance(adapter, tokens(16).split(16), segment=1, groups=Ranks().groups(16))


def test_a_batch_is_as_large_as_the_largest_group():
    """Nine sequences are one group of two and seven of one."""
    hidden = Activations((9, 1, 1), torch.float32, torch.device("cpu"), 16, groups=Ranks().groups(9))
    assert hidden.at_once(hidden.groups) == 2 and hidden.at_once(hidden.groups, divisor=16) == 1


def test_out_of_memory_halves_until_it_fits():
    adapter = SmallDevice(tiny_model())
    adapter.most = 1
    expected = [q.codes for _, q in quantize_model(ModelAdapter(tiny_model()), CONFIGS[0], Calibration(tokens(6).split(1)))]
    with pytest.warns(UserWarning) as said:
        done = [q.codes for _, q in quantize_model(adapter, CONFIGS[0], Calibration(tokens(6).split(4)))]
    assert all(torch.equal(a, b) for a, b in zip(done, expected, strict=True))
    assert [str(one.message).rpartition("with ")[2] for one in said] == ["2 sequences at once", "one sequence at a time"]


def test_out_of_memory_with_one_sequence_names_the_phase_and_what_to_do():
    adapter = SmallDevice(tiny_model())
    adapter.most = 0
    said = r"phase 'forward' with one sequence at a time; give fewer or shorter sequences \(CUDA.*1\.00 GiB\)$"
    with pytest.raises(torch.OutOfMemoryError, match=said), pytest.warns():
        list(quantize_model(adapter, CONFIGS[0], Calibration(tokens(6).split(4))))
