"""Files of strangers: refused in one line, before time or memory is taken, and nothing of theirs is run."""

import gzip
import json
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptq.data import text
from ptq.data.text import read_documents
from ptq.eval.checkpoint import load_any
from ptq.eval.report import markdown, page
from ptq.export.files import check_output
from ptq.models import location, shards
from ptq.models.families import family_of
from ptq.models.gguf_header import check_gguf
from ptq.models.loading import load_model, open_model
from ptq.models.shards import Shards
from ptq.run.resume import Unfinished, unfinished_folder

from .fuzz import PARSERS, Watch, fuzz
from .test_script import job, main, one_line_error  # noqa: F401  # fixtures
from .tiny import save_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_tiny(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


LYING = {
    "longer than the file": safetensors({}, length=10**6),
    "absurd length": safetensors({}, length=2**63),
    "no JSON": safetensors(b"{]"),
    "no object": safetensors([1]),
    "beyond the file": safetensors({"a": entry(0, 4000)}, bytes(40)),
    "overlapping": safetensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "a hole": safetensors({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "negative": safetensors({"a": entry(-4, 4)}, bytes(4)),
    "backwards": safetensors({"a": entry(8, 4)}, bytes(8)),
    "shape of another size": safetensors({"a": entry(0, 8, [3])}, bytes(8)),
    "shape that overflows": safetensors({"a": entry(0, 8, [2**63, 2**63])}, bytes(8)),
    "unknown dtype": safetensors({"a": entry(0, 8, dtype="F33")}, bytes(8)),
    "bytes left over": safetensors({"a": entry(0, 4)}, bytes(400)),
    "brackets": safetensors(b"[" * 100_000),
    "empty": b"",
}


@pytest.mark.parametrize("content", LYING.values(), ids=LYING)
def test_lying_safetensors_headers_are_refused_by_name(model, content):
    (model / "model.safetensors").write_bytes(content)
    for load in (open_model, load_model):
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged") as caught:
            load(str(model))
        assert "\n" not in str(caught.value)


def test_a_tensor_in_two_files_is_refused(model):
    shutil.copy(model / "model.safetensors", model / "a.safetensors")
    (model / "model.safetensors").rename(model / "b.safetensors")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    with pytest.raises(ValueError, match=r"b\.safetensors holds .*, and so does a\.safetensors"):
        Shards(model)


def test_weights_that_no_index_names_are_refused_before_any_work(model):
    """transformers would not find them when the checkpoint is scored against the original."""
    (model / "model.safetensors").rename(model / "weights.safetensors")
    for load in (open_model, load_model, load_any):
        with pytest.raises(ValueError, match=r"holds weights\.safetensors, but no model\.safetensors and no model\..*; rename"):
            load(str(model))


def index(folder: Path, name: object) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "x/../../y", "..", ".", "", "a\0b", 7, None, ["a"], "x" * 9999]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(model, name):
    index(model, name)
    with pytest.raises(ValueError, match=r"index\.json (names|is damaged)") as caught:
        open_model(str(model))
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"a": {}}}', b"[" * 10**5, b"\xff"]
)
def test_a_damaged_index_is_named(model, content):
    index(model, "a")
    (model / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.json (names|is damaged)"):
        open_model(str(model))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_out_of_the_folder_is_refused_by_name(model, name):
    (model / name).rename(model.parent / name)
    (model / name).symlink_to(model.parent / name)
    with pytest.raises(ValueError, match=rf"{name} is a link to .*, out of the model's folder; copy the file"):
        open_model(str(model))


def test_links_inside_the_hubs_cache_are_followed(model, tmp_path):
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in list(model.iterdir()):
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    assert open_model(str(snapshot))[0].parameters()
    (tmp_path / "alias").symlink_to(snapshot)  # the folder itself may be a link
    assert open_model(str(tmp_path / "alias"))[0].parameters()


SIZES = ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "head_dim"]


@pytest.mark.parametrize("value", [10**6, 10**9, 10**30, -3, 0, True, "2", 2.0, [2]], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_absurd_sizes_are_refused_before_anything_is_made(model, name, value):
    configure(model, **{name: value})
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in (open_model, load_model):
        with pytest.raises(ValueError, match=rf"config\.json: {name} is "):
            load(str(model))
    assert time.monotonic() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 128}, {"head_dim": 32}, {"vocab_size": 65}, {"intermediate_size": 64}], ids=str
)
def test_sizes_that_are_only_wrong_are_refused_before_weights_are_read(model, changes):
    configure(model, **changes)
    with pytest.raises(ValueError, match=r"where the config says|but the weight files have"):
        open_model(str(model))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "x"}},
        {"hidden_act": "os.system"},
        {"model_type": [1]},
        {"dtype": "float99"},
        {"quantization_config": 3},
        {"num_attention_heads": 7},
        {"pad_token_id": 10**6},
    ],
    ids=str,
)
def test_configs_that_make_no_sense_end_in_one_line(model, changes):
    configure(model, **changes)
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        open_model(str(model))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"[" * 10**5, b'{"hidden_size": ' + b"9" * 5000 + b"}"])
def test_a_config_that_is_no_json_object_is_named(model, content):
    (model / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        open_model(str(model))


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("model_type", ["llama", "strange"])
def test_code_that_a_model_brings_is_never_run(model, tmp_path, model_type):
    mark = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: ...\n")
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    configure(model, auto_map=auto_map, model_type=model_type)
    for name in ("tokenizer_config.json", "generation_config.json"):
        settings = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}))
    if model_type == "llama":  # transformers has it: theirs is not needed
        assert open_model(str(model))[0].parameters()
    else:
        with pytest.raises(ValueError, match=r"the code it brings \(auto_map\) is never run"):
            open_model(str(model))
    assert not mark.exists()


@pytest.mark.parametrize("load", [load_model, load_any, open_model])
@pytest.mark.parametrize("attention", ["evil/kernel", "flash_attention_2"])
def test_a_config_does_not_choose_its_attention(model, load, attention):
    """transformers takes it from the file, also where another one is asked for, and downloads what looks like a repository."""
    configure(model, _attn_implementation=attention)
    found = load(str(model))
    loaded = found.model if load is load_any else found[0]
    config = loaded.model.config if load is open_model else loaded.config
    assert config._attn_implementation == family_of(config, str(model)).attention == "sdpa"


@pytest.mark.parametrize("load", [load_model, load_any, open_model])
def test_a_config_does_not_choose_its_weights(model, load):
    """The layers would be of model.safetensors, and what they are scored against of the other file."""
    configure(model, transformers_weights="other.safetensors")
    with pytest.raises(ValueError, match=r"config\.json has transformers_weights 'other\.safetensors'; remove it, and name"):
        load(str(model))


@pytest.mark.parametrize("load", [load_model, load_any, open_model])
def test_an_adapter_does_not_put_another_model_in_the_place_of_the_weights(model, load, monkeypatch):
    monkeypatch.setattr(location, "snapshot_download", lambda _source, **_how: str(model))
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "evil/base"}))
    (model / "weights.gguf").write_bytes(gguf())
    for source in (model, model / "weights.gguf", "some/model"):
        with pytest.raises(
            ValueError, match=r"holds adapter_config\.json, so that .*; merge the adapter .*, or remove the file"
        ):
            load(str(source))


def pickles(folder: Path, save) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    save(folder / "pytorch_model.bin")


def test_pickles_are_not_unpickled(model, tmp_path):
    mark, padding = tmp_path / "ran", torch.zeros(10**5)
    whole = load_file(model / "model.safetensors")
    for content in ({"x": Payload(mark), "y": padding}, whole | {"x": Payload(mark)}):
        pickles(model, lambda path, content=content: torch.save(content, path))
        with pytest.raises(ValueError, match=r"of \.bin files only tensors are unpickled") as caught:
            open_model(str(model))
        assert "\n" not in str(caught.value)
    for raw in (pickle.dumps([Payload(mark), b"x" * 10**5]), b"x" * 10**5, b""):
        pickles(model, lambda path, raw=raw: path.write_bytes(raw))
        with pytest.raises(ValueError, match=r"of \.bin files only tensors|it holds no weights"):
            open_model(str(model))
    assert not mark.exists()
    pickles(model, lambda path: torch.save(whole, path))
    assert open_model(str(model))[0].parameters()


def test_a_weight_that_is_not_finite_is_found_before_the_first_layer(main, job, capsys, monkeypatch):  # noqa: F811
    folder, _, output, arguments = job
    for dtype, value in ((torch.float32, float("nan")), (torch.bfloat16, float("-inf")), (torch.float16, float("inf"))):
        save_tiny(folder, dtype=dtype)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        capsys.readouterr()  # the bar that saving draws
        found = one_line_error(main, arguments, capsys)
        assert "model.safetensors: model.layers.1.mlp.down_proj.weight holds 1 non-finite values, the first at [3, 5]" in found
        assert not unfinished_folder(output).exists()


@pytest.mark.parametrize("change", ["shorter", "other", "gone"])
def test_a_file_that_changes_during_the_run_ends_it(model, change):
    """Between the first layer and the third: what is read ahead may still be of the old one."""
    save_tiny(model, num_hidden_layers=4)
    path = model / "model.safetensors"
    adapter, _, _ = open_model(str(model))
    layers = adapter.layers()
    next(layers)
    content = path.read_bytes()
    os.truncate(path, 100) if change == "shorter" else path.unlink()
    if change == "other":
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors was changed or removed while it was read"):
        list(layers)


@pytest.mark.parametrize("change", ["overwritten", "gone"])
def test_a_file_that_changes_while_its_tensors_are_read_is_named(model, change, monkeypatch):
    """After the first of them, or just before the file is opened: tensors of two models would be mixed."""
    path, read, open_file = model / "model.safetensors", shards.read_tensor, Path.open
    files, content = Shards(model), path.read_bytes()

    def read_and_write(*arguments, **options):
        tensor = read(*arguments, **options)
        path.write_bytes(content)
        return tensor

    def remove_and_open(self, *arguments):
        path.unlink()
        return open_file(self, *arguments)

    if change == "overwritten":
        monkeypatch.setattr(shards, "read_tensor", read_and_write)
    else:
        monkeypatch.setattr(Path, "open", remove_and_open)
    with pytest.raises(ValueError, match=r"model\.safetensors was changed or removed while it was read"):
        files.read(list(files.tensors)[:2])


@pytest.mark.parametrize("size, fine", [(1e14, True), (-3e38, False)])
def test_weights_of_absurd_size_are_refused(model, size, fine):
    """Squares of what is lost of 1e30 overflow float32, in which the search for scales compares them: no scale would be best."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"].fill_(size)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    files = open_model(str(model))[2]
    if fine:
        assert files.identity()
        return
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds a weight of 3e\+38"):
        files.identity()


def gguf(fields: bytes = b"", tensors: bytes = b"", counts: tuple[int, int] = (0, 0), data: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + fields + tensors + data


def name(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def tensor(label: str, shape: tuple[int, ...] = (32,), offset: int = 0) -> bytes:
    return name(label) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)


CORRUPT = {
    "empty": b"",
    "another kind": b"PK\3\4" + bytes(100),
    "version": b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
    "fields beyond": gguf(counts=(0, 2**60)),
    "tensors beyond": gguf(counts=(2**60, 0)),
    "long name": gguf(struct.pack("<Q", 2**62), counts=(0, 1)),
    "name no text": gguf(struct.pack("<Q", 2) + b"\xff\xff" + struct.pack("<II", 4, 1), counts=(0, 1)),
    "array": gguf(name("a") + struct.pack("<IIQ", 9, 4, 2**61), counts=(0, 1)),
    "strings": gguf(name("a") + struct.pack("<IIQ", 9, 8, 2**40), counts=(0, 1)),
    "nested arrays": gguf(name("a") + struct.pack("<IIQ", 9, 9, 2**40), counts=(0, 1)),
    "type": gguf(name("a") + struct.pack("<I", 77), counts=(0, 1)),
    "twice": gguf((name("a") + struct.pack("<II", 4, 1)) * 2, counts=(0, 2)),
    "dimensions": gguf(tensors=name("a") + struct.pack("<I", 2**31), counts=(1, 0)),
    "offset": gguf(tensors=tensor("a", offset=2**50), counts=(1, 0)),
    "layer": gguf(tensors=tensor("blk.x.w"), counts=(1, 0)),
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT)
def test_corrupt_gguf_tables_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"model\.gguf is damaged") as caught:
        open_model(str(path))
    assert "\n" not in str(caught.value) and time.monotonic() - begin < 1


@pytest.mark.parametrize("value, message", [(1, None), (10**6, "have 1 layers"), (0, "not a whole number")])
def test_layers_that_a_gguf_file_does_not_have(tmp_path, value, message):
    path = tmp_path / "model.gguf"
    field = name("llama.block_count") + struct.pack("<II", 4, value)
    path.write_bytes(gguf(field, tensor("blk.0.w"), (1, 1), bytes(128)))
    if message is None:
        check_gguf(path)
        return
    with pytest.raises(ValueError, match=message):
        check_gguf(path)


def test_long_lines_and_bombs_are_refused_in_bounded_memory(tmp_path):
    """In its own process, whose memory may grow by a few lines of the longest length, here 4 MiB, not by what the files hold."""
    (tmp_path / "long.jsonl").write_bytes(b'{"text": "a"}\n{"text": "' + b"a" * 10**8 + b'"}\n')
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(bytes(10**6))
    code = """
import resource, sys
from ptq.data import text
text.LINE_BYTES = 2**22
limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + 6 * 2**12  # KiB
for path in sys.argv[1:]:
    try:
        text.read_documents(path)
    except ValueError as error:
        print(error)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < limit
"""
    paths = [str(tmp_path / "long.jsonl"), str(tmp_path / "bomb.jsonl.gz")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{paths[0]}, line 2: more than {2**22} bytes; split it")
    assert second.startswith(f"{paths[1]}, line 1: more than")


def test_a_text_is_read_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "TEXT_BYTES", 1000)
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        file.write(b"a b\n" * 10**6)
    with pytest.raises(ValueError, match=r"a\.txt\.gz, line 251: more than 1000 bytes in all"):
        read_documents(str(tmp_path / "a.txt.gz"))


@pytest.mark.parametrize(
    "line", [b"[" * 10**5, b'{"text": ' + b"9" * 5000 + b"}", b'{"text": "\\ud800"}', b'{"text": "\xff"}', b"\0", b"[]"]
)
def test_strange_lines_are_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: "):
        read_documents(str(tmp_path / "a.jsonl"))


def test_markup_in_the_names_of_models_is_shown_not_followed():
    labels = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>\n\n# Title|[x](javascript:alert(1))"]
    facts = {"dtype": "<b>", "bytes": 1, "load_seconds": 1.0, "tasks": {}, "versions": {"<i>": "<u>"}, "device": "<s>"}
    scores = {"protocol": {"window": 8, "stride": 8, "bos": "<q>", "text": "<h1>"}, "tokens": 8, "windows": 1, "token_ppl": 2.0}
    scores |= {"kl": 0.0, "kl_stderr": None, "agreement": 1.0, "fingerprint": "x", "items": [[1.0, 2], [2.0, 2], [4.0, 2]]}
    scores |= {"sample": {"prompt": "<script>", "greedy": "<img>"}}
    results = [
        facts | {"label": label, "bits_per_weight": 4.0 + i, "text": scores | {"bits_per_byte": 1.0 + i, "fingerprint": i}}
        for i, label in enumerate(labels)
    ]
    for shown in (page(results), markdown(results)):
        tags = set(re.findall(r"<\s*/?\s*([a-z0-9]+)", shown))
        assert tags.isdisjoint({"script", "img", "b", "i", "u", "s", "q"}) and "onerror" in shown
    assert not re.search(r"<h1>(?!Evaluation)", page(results))
    lines = markdown(results).splitlines()
    assert "# Title" not in [line[:7] for line in lines] and not re.search(r"(?<!\\)\[x\]", markdown(results))


@pytest.mark.parametrize("target", ["nowhere", "elsewhere"])
def test_an_output_that_is_a_link_is_refused(main, job, capsys, tmp_path, target):  # noqa: F811
    _, _, output, arguments = job
    (tmp_path / "elsewhere").mkdir()
    output.symlink_to(tmp_path / target)
    assert "exists already" in one_line_error(main, arguments, capsys)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_is_not_ours_is_never_removed(tmp_path):
    folder = unfinished_folder(tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    folder.symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="is a link"):
        Unfinished(tmp_path / "out", {}, 2, resume=False)
    folder.unlink()
    (tmp_path / "mine").rename(folder)
    with pytest.raises(ValueError, match=r"holds 'thesis\.tex', which is of no run"):
        Unfinished(tmp_path / "out", {}, 2, resume=False)
    assert (folder / "thesis.tex").read_text() == "years"


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting needs root")
def test_a_read_only_place_is_refused_at_once(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(ValueError, match="is not a folder one may write to"):
            check_output(disk / "out", 0)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("parser", PARSERS)
def test_mutated_files_are_read_or_refused(tmp_path, parser, watch):
    """2,000 cases here; scripts/torture.py runs as many as one likes.  A fixed seed: what is found becomes a case of its own."""
    cases = 500 if parser == "loaded config" else 2000
    result = fuzz(parser, cases, 1, tmp_path, watch)
    assert result["accepted"] and result["refused"]


@pytest.fixture(scope="session")
def watch() -> Watch:
    return Watch()  # an audit hook stays for good
