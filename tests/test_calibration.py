import gzip
import json

import pytest
import torch

from ptq.calibration import all_windows, read_documents, sample_windows


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
        ("a.txt.gz", gzip.compress(b"x" * 10_000)[:-20], "is damaged"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', 'line 2: no field "text"'),
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
