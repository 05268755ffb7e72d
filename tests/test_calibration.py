import gzip
import json

import pytest
import torch
from datasets import Dataset

from ptq.data.chat import Conversation, encoder, how_encoded
from ptq.data.text import all_windows, read_documents, read_texts, sample_windows

from .tiny import tiny_tokenizer


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_builtin_halves_share_no_paragraph():
    halves = [{p for text in read_documents(name) for p in text.split("\n\n")} for name in ("builtin", "builtin-heldout")]
    assert len(halves[0] & halves[1] - {""}) == 0
    assert sum(map(len, halves[0])) > 200_000 and sum(map(len, halves[1])) > 40_000


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.raw", "a.jsonl", "a.jsonl.gz"])
def test_files_of_every_kind(tmp_path, name):
    text = "één\nline\n"
    content = text if ".jsonl" not in name else json.dumps({"text": text, "id": 1}) + "\n\n" + json.dumps({"text": "b"}) + "\n"
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_documents(str(tmp_path / name)) == ([text, "b"] if ".jsonl" in name else [text])


def test_a_line_separator_inside_a_json_string_ends_no_line(tmp_path):
    text = "a\u2028b\x85c"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_documents(str(tmp_path / "a.jsonl")) == [text]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n ", "is empty"),
        ("a.txt", b"\xff\xfe", "not UTF-8 text: byte 0"),
        ("a.txt.gz", b"no gzip", "is damaged"),
        ("a.txt.gz", gzip.compress(b"x" * 10_000, mtime=0)[:-20], "is damaged"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', 'line 2: no field "text"'),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', 'line 1: no field "text" with a string, nor "messages", each with'),
        ("a.jsonl", b'{"text": 3}\n', 'line 1: no field "text" with a string'),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    ],
)
def test_bad_files_name_themselves_and_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_documents(str(tmp_path / name))
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "source, message", [("missing.txt", "is not there"), ("./none", "is not there"), ("{tmp}", "is a folder")]
)
def test_sources_that_are_not_there(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        read_documents(source.format(tmp=tmp_path))


ROWS = ["", " = Title = \n", "", "Text with words .\n"]
MESSAGES = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Folders with the names and the layout of the datasets: `datasets` reads such a folder before it asks the hub."""
    monkeypatch.chdir(tmp_path)

    def lay(path: str, rows: list, card: str = "") -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".parquet"):
            Dataset.from_list(rows).to_parquet(file)
        else:
            file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
        if card:
            (tmp_path / "/".join(path.split("/")[:2]) / "README.md").write_text(f"---\n{card}---\n")

    wikitext = "configs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
    wikitext += "".join(
        f"  - split: {split}\n    path: wikitext-2-raw-v1/{split}-*\n" for split in ("train", "validation", "test")
    )
    for split in ("train", "validation", "test"):
        rows = [{"text": row + split if row.startswith("Text") else row} for row in ROWS]
        lay(f"Salesforce/wikitext/wikitext-2-raw-v1/{split}-00000-of-00001.parquet", rows, wikitext)
    for name, count in (("train", 1024), ("validation", 8)):
        rows = [{"text": f"{name} {i}", "timestamp": "x", "url": "y"} for i in range(4100)]
        lay(f"allenai/c4/en/c4-{name}.00000-of-{count:05}.json.gz", rows)
    chat = "configs:\n- config_name: default\n  data_files:\n"
    chat += "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train_sft", "test_sft"))
    for split in ("train_sft", "test_sft"):
        rows = [{"prompt": "Hi?", "prompt_id": split, "messages": MESSAGES}]
        lay(f"HuggingFaceH4/ultrachat_200k/data/{split}-00000-of-00001.parquet", rows, chat)
    lay("NeelNanda/pile-10k/data/train-00000-of-00001.parquet", [{"text": "pile", "meta": {"pile_set_name": "x"}}])
    lay("some/body/data/train-00000-of-00001.parquet", [{"words": "a"}])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_presets_are_what_they_say(hub):
    assert read_documents("wikitext:test") == ["\n\n".join([*ROWS[:3], ROWS[3] + "test"])]
    assert read_documents("wikitext") == ["\n\n".join([*ROWS[:3], ROWS[3] + "train"])]
    assert read_documents("Salesforce/wikitext:wikitext-2-raw-v1:validation") == [ROWS[1], ROWS[3] + "validation"]
    for split in ("train", "validation"):
        assert read_documents(f"c4:{split}") == [f"{split} {i}" for i in range(4096)]
    assert read_documents("ultrachat:test_sft") == read_documents("ultrachat") == [Conversation(tuple(MESSAGES))]
    assert read_texts("ultrachat") == ["Hi?\n\nYes."]
    assert read_documents("pile") == read_documents("NeelNanda/pile-10k:default") == ["pile"]


def test_datasets_that_cannot_be_used_say_why(hub, monkeypatch):
    with pytest.raises(ValueError, match="c4 has the splits train, validation"):
        read_documents("c4:test")
    with pytest.raises(ValueError, match="dataset 'some/body' has no column \"text\""):
        read_documents("some/body:default")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="text 'no/body' is no file here, and as a dataset it cannot be loaded: "):
        read_documents("no/body")


def test_conversations_go_through_the_chat_template_if_there_is_one(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a b"}, {"role": "x", "content": "c"}]})
    )
    documents = read_documents(str(tmp_path / "a.jsonl"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}z {{ m.content }} {% endfor %}"
    assert encoder(tokenizer)(documents[0]) == tokenizer("z a b z c")["input_ids"]
    assert how_encoded(documents, tokenizer) == "conversations through the tokenizer's chat template"
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses the conversation that begins 'a b': roles must alternate"):
        encoder(tokenizer)(documents[0])
    tokenizer.chat_template = None
    assert encoder(tokenizer)(documents[0]) == encoder(tokenizer)("a b c") == tokenizer("a b c")["input_ids"]
    assert how_encoded(documents, tokenizer) == "conversations as plain text, for the tokenizer has no chat template"
    assert how_encoded(["a"], tokenizer) == "plain text"


def test_windows_are_the_joined_tokens_cut():
    windows = all_windows(encode, ["abc", "defgh"], 3, "x")
    assert windows.tolist() == [[97, 98, 99], [100, 101, 102]]


def test_samples_are_drawn_without_replacement_and_by_seed():
    windows = torch.arange(40).view(20, 2)
    first, again, other = (sample_windows(windows, 8, seed, "x") for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and len(set(first[:, 0].tolist())) == 8


def test_too_little_text_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match="'x' has 3 tokens, too few for one window of 8"):
        all_windows(encode, ["abc"], 8, "x")
    with pytest.raises(ValueError, match="'x' gives 2 sequences of 2 tokens, fewer than the 3 asked for"):
        sample_windows(torch.zeros(2, 2), 3, 0, "x")
