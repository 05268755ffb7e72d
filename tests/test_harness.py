"""ptq.eval.harness against lm-eval itself, and the statistics of differences."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptq.eval.harness import load, run_tasks, task_manager
from ptq.eval.paired import AGGREGATIONS, aggregation_of, difference, standard_error
from ptq.eval.tasks import LOCAL, check_file, check_names, check_tasks

from .tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def babyllama(shared):
    folder = shared / "babyllama-tok105"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_equals_lm_eval_itself(babyllama, shared, tmp_path, monkeypatch):
    """All nine tasks: the same definitions through simple_evaluate, their data replaced on the task objects."""
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    names, limit = sorted(LOCAL), 4
    model, tokenizer = babyllama
    tasks = []
    for name in names:
        local = LOCAL[name]
        path = shared / "tasks" / f"{local.stem}.{local.split}.jsonl.gz"
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")[: 2 * limit]
        if name == "wikitext":  # whole pages would take minutes
            lines = [json.dumps({"page": json.loads(line)["page"][:2000]}) for line in lines]
        (tmp_path / path.stem).write_text("\n".join(lines))
        data = {local.split: Dataset.from_list([json.loads(line) for line in lines])}
        config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / local.config, resolve_func=True)
        config |= {"custom_dataset": lambda data=data, **_: data}
        config |= {key: None for key in ("training_split", "validation_split", "test_split") if config.get(key) != local.split}
        tasks.append(ConfigurableTask(config={key: value for key, value in config.items() if key != "tag"}))
    with task_manager(names, tmp_path) as manager:
        ours = run_tasks(model, tokenizer, names, manager, limit=limit, batch_size=2)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it asks pip, which takes seconds
    none = TaskManager(include_defaults=False)  # the scan of all definitions takes ten seconds
    theirs = {}
    for cache in (True, False):  # off for rolling windows (harness.py says why)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, logits_cache=cache)
        chosen = [task for task in tasks if (task.config.task == "wikitext") != cache]
        options = {"limit": limit, "bootstrap_iters": 10, "task_manager": none}
        theirs |= lm_eval.simple_evaluate(lm, tasks=chosen, **options)["results"]
    for name in names:
        assert ours[name]["samples"] == limit and ours[name]["fewshot"] == 0
        measured = {key for key, value in theirs[name].items() if "," in key and "_stderr" not in key}
        assert measured == ours[name]["metrics"].keys() != set()
        for key, metric in ours[name]["metrics"].items():
            assert metric["value"] == theirs[name][key], (name, key)
            if metric["aggregation"] == "mean":
                assert metric["stderr"] == theirs[name][key.replace(",", "_stderr,")]
                # lm-eval's standard error of a mean is the one used for differences
                assert standard_error(metric["items"], "mean") == pytest.approx(metric["stderr"], rel=1e-9)
    assert {name for name in names if "acc,none" not in ours[name]["metrics"]} == {"wikitext"}


@torch.no_grad()
def word_perplexity(model, tokenizer, pages: list[tuple[str, str]], length: int) -> float:
    """lm-eval's definition, of pages (as stored, detokenized): BOS, then the tokens with what special tokens the tokenizer adds;
    each but that first BOS is predicted once.  Windows follow each other, but the last reaches back until it is full."""
    loss = words = 0
    for stored, text in pages:
        tokens = torch.tensor([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]])
        for start in range(0, len(tokens) - 1, length):
            stop = min(start + length, len(tokens) - 1)
            logp = model(tokens[None, max(0, stop - length) : stop]).logits[0, start - stop :].double().log_softmax(-1)
            loss -= float(logp.gather(1, tokens[start + 1 : stop + 1, None]).sum())
        words += len(stored.split()) + stored.startswith(" ") + stored.endswith(" ")  # re.split counts empty ends
    return math.exp(loss / words)


def test_word_perplexity_is_lm_evals(babyllama, tmp_path):
    pages = [
        (" = Tom = \n Tom had 1 @,@ 000 apples , and he ate two . ", " = Tom =\nTom had 1,000 apples, and he ate two. "),
        ("Once there was a dog who liked to run . " * 5, "Once there was a dog who liked to run. " * 5),
    ]
    (tmp_path / "wikitext.test.jsonl").write_text("\n".join(json.dumps({"page": stored}) for stored, _ in pages))
    model, tokenizer = babyllama
    with task_manager(["wikitext"], tmp_path) as manager:
        result = run_tasks(model, tokenizer, ["wikitext"], manager, batch_size=3, max_length=64)["wikitext"]
    metric = result["metrics"]["word_perplexity,none"]
    assert metric["value"] == pytest.approx(word_perplexity(model, tokenizer, pages, 64), rel=1e-6)
    assert metric["aggregation"] == "perplexity" and metric["stderr"] > 0 and not metric["higher_is_better"]
    assert result["metrics"]["bits_per_byte,none"]["aggregation"] == "bits"


def test_examples_come_from_the_split_before(babyllama, tmp_path):
    def rows(word: str) -> str:
        return "\n".join(json.dumps({"text": f"{word} is the answer {i}"}) for i in range(3))

    for split in ("train", "test"):
        (tmp_path / f"lambada_openai.{split}.jsonl").write_text(rows(split))
    with task_manager(["lambada_openai"], tmp_path, 2) as manager:
        task = load(["lambada_openai"], manager, 2)["tasks"]["lambada_openai"]
        assert {doc["text"].split()[0] for doc in task.fewshot_docs()} == {"train"}
        result = run_tasks(*babyllama, ["lambada_openai"], manager, fewshot=2)["lambada_openai"]
    assert result["fewshot"] == 2 and result["samples"] == 3
    assert result["metrics"]["perplexity,none"]["aggregation"] == "perplexity"


def test_non_finite_logits_stop_a_task_with_the_layer(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = float("inf")
    (tmp_path / "lambada_openai.test.jsonl").write_text(json.dumps({"text": "a b c d"}))
    with (
        task_manager(["lambada_openai"], tmp_path) as manager,
        pytest.raises(
            ValueError, match=r"in an lm-eval task; the first non-finite values come out of model.layers.1.self_attn.o"
        ),
    ):
        run_tasks(model, tokenizer, ["lambada_openai"], manager)


def test_an_answer_longer_than_the_context_is_named(tmp_path):
    item = {"goal": "a", "sol1": "b " * 40, "sol2": "c", "label": 0}
    (tmp_path / "piqa.validation.jsonl").write_text(json.dumps(item))
    with (
        task_manager(["piqa"], tmp_path) as manager,
        pytest.raises(ValueError, match=r"answer of 40 tokens, more than the 32 that the model sees at once: ' b b"),
    ):
        run_tasks(tiny_model(), tiny_tokenizer(), ["piqa"], manager, max_length=32)


def test_unknown_names_list_the_nearest():
    with pytest.raises(ValueError, match=r"task 'hellaswga' is not known to lm-eval; nearest: hellaswag"):
        check_names(["piqa", "hellaswga"], LOCAL, "lm-eval")


ITEM = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}


@pytest.mark.parametrize(
    "second, message",
    [
        (json.dumps(ITEM | {"choices": {"text": ["a"]}}), 'line 2: field "choices.label" is missing'),
        (json.dumps(ITEM | {"question": 3}), 'line 2: field "question" is not a string'),
        ("{", "line 2: not JSON"),
    ],
)
def test_a_bad_item_is_named(tmp_path, second, message):
    path = tmp_path / "arc_easy.test.jsonl"
    path.write_text(json.dumps(ITEM) + "\n" + second + "\n")
    with pytest.raises(ValueError, match=f"{path}, {message}"):
        check_file(path, LOCAL["arc_easy"].fields)


def test_missing_files_and_missing_examples_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"task 'piqa' needs .*piqa.validation.jsonl or .jsonl.gz, which is not there"):
        check_tasks(["piqa"], tmp_path, None)
    (tmp_path / "arc_easy.test.jsonl").write_text(json.dumps(ITEM))
    assert list(check_tasks(["arc_easy"], tmp_path, 0)["arc_easy"]) == ["test"]
    with pytest.raises(ValueError, match=r"few-shot examples need arc_easy.train.jsonl"):
        check_tasks(["arc_easy"], tmp_path, 5)
    (tmp_path / "arc_easy.train.jsonl").write_text(json.dumps(ITEM | {"question": 1}))
    with pytest.raises(ValueError, match=r'arc_easy.train.jsonl, line 1: field "question" is not a string'):
        check_tasks(["arc_easy"], tmp_path, 5)
    with pytest.raises(ValueError, match="is no folder"):
        check_tasks(["arc_easy"], tmp_path / "nowhere", None)


def test_all_shared_task_files_have_their_fields(shared):
    assert check_tasks(list(LOCAL), shared / "tasks", None).keys() == LOCAL.keys()


def test_paired_errors_equal_the_definition():
    random = np.random.default_rng(0)
    first, other = random.random(50), random.random(50)
    change = difference([(x, 1) for x in first], [(x, 1) for x in other], "mean")
    assert change.value == pytest.approx((other - first).mean())
    assert change.stderr == pytest.approx((other - first).std(ddof=1) / 50**0.5) and change.items == 50
    weights = random.integers(1, 9, 50)
    a, b = ([(-x * w, w) for x, w in zip(values, weights, strict=True)] for values in (first, other))
    ppl = [AGGREGATIONS["perplexity"](sum(v for v, _ in items) / weights.sum()) for items in (a, b)]
    assert difference(a, b, "perplexity").value == pytest.approx(math.log(ppl[1] / ppl[0]))
    assert aggregation_of(a, ppl[0]) == "perplexity" and aggregation_of(a, 3.0) is None
    same = difference(a, a, "bits")
    assert same.value == same.stderr == 0
    with pytest.raises(ValueError, match="same items"):
        difference(a, first.reshape(-1, 1).repeat(2, 1).tolist(), "mean")


def test_the_weighted_error_is_the_spread_of_the_ratio():
    """Against the spread over 4000 draws of 200 items; its own relative error is 1/√8000 = 1.1 %, four of them allowed."""
    random = np.random.default_rng(1)
    weights = random.integers(1, 9, (4000, 200))
    values = -weights * random.random((4000, 200))
    spread = np.exp(-values.sum(1) / weights.sum(1)).std(ddof=1)
    errors = [standard_error(list(zip(values[i], weights[i], strict=True)), "perplexity") for i in range(100)]
    assert np.mean(errors) == pytest.approx(spread, rel=0.045)
