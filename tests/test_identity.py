"""Model files are known by their contents."""

import itertools
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptq.models import identity, loading, location
from ptq.models.identity import RAW_PIECE, RAW_PIECES, ModelFiles, digest, pieces, spans
from ptq.pipeline.source import open_source
from ptq.run.fingerprint import code_version, fingerprint

from .test_script import main  # noqa: F401  # a fixture
from .tiny import save_tiny


@pytest.mark.parametrize("whole", [identity.WHOLE, 0], ids=["whole", "sampled"])
def test_one_weight_of_one_layer_makes_another_model(tmp_path, whole):
    save_tiny(tmp_path)
    files = loading.open_model(str(tmp_path))[2]
    before, path = files.identity(whole=whole), tmp_path / "model.safetensors"
    assert before == files.identity(whole=whole) and before.keys() == {"model.safetensors", "config.json"}
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][-1, 3] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    after = ModelFiles.now(files.files).identity(whole=whole)
    assert after["model.safetensors"] != before["model.safetensors"] and after["config.json"] == before["config.json"]


def test_every_tensor_of_a_large_file_is_sampled(tmp_path):
    """Its first, middle and last weight count, and what is merged into any one matrix does."""
    path, tensors = tmp_path / "model.safetensors", {name: torch.zeros(512, 512) for name in "abc"}
    save_file(tensors, path)
    read = sum(end - begin for begin, end in spans(path, path.stat().st_size))
    assert read < 0.1 * path.stat().st_size
    seen = {digest(path, whole=0)}
    for name, place in itertools.product("abc", [0, 512 * 256, 512 * 512 - 1]):
        changed = tensors | {name: tensors[name].clone()}
        changed[name].view(-1)[place] = 1
        save_file(changed, path)
        seen.add(digest(path, whole=0))
    for name in "abc":
        save_file(tensors | {name: torch.randn(512, 2) @ torch.randn(2, 512)}, path)
        seen.add(digest(path, whole=0))
    assert len(seen) == 1 + 9 + 3


@pytest.mark.parametrize("size", [5 * 10**9, 140 * 10**9])
def test_a_large_file_of_unknown_tensors_is_sampled_densely(tmp_path, size):
    (tmp_path / "model.gguf").touch()
    found = list(spans(tmp_path / "model.gguf", size))
    assert len(found) >= RAW_PIECES and found[0][0] == 0 and found[-1][1] == size
    assert all(end - begin == RAW_PIECE for begin, end in found)
    assert all(0 < later[0] - sooner[1] < 2**23 for sooner, later in itertools.pairwise(found))


def test_pieces_of_what_is_small_are_all_of_it(tmp_path):
    assert list(pieces(5, 105, 3, 40)) == [(5, 105)]
    path = tmp_path / "model.bin"
    path.write_bytes(os.urandom(100_000))
    before = digest(path, whole=0)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert digest(path, whole=0) != before


def test_a_model_of_the_hub_is_known_by_its_commit_too(tmp_path, monkeypatch):
    folder = tmp_path / "models--some--model" / "snapshots" / "c0ffee"
    save_tiny(folder)
    monkeypatch.setattr(location, "snapshot_download", lambda _source, **_how: str(folder))
    files = loading.open_model("some/model")[2]
    assert files.place == str(folder)  # never again by its id, which may be another model by then
    assert files.identity() == ModelFiles.now(files.files).identity() | {"commit": "c0ffee"}


@pytest.mark.parametrize("also", [True, False])
def test_pickles_are_fetched_where_there_is_nothing_else(tmp_path, monkeypatch, also):
    origin, folder = tmp_path / "origin", tmp_path / "c0ffee"
    save_tiny(origin)
    torch.save(load_file(origin / "model.safetensors"), origin / "pytorch_model.bin")
    if not also:
        (origin / "model.safetensors").unlink()

    def download(_source: str, allow_patterns: list[str]) -> str:
        folder.mkdir(exist_ok=True)
        for path in {path for pattern in allow_patterns for path in origin.glob(pattern)}:
            shutil.copy(path, folder)
        return str(folder)

    monkeypatch.setattr(location, "snapshot_download", download)
    files = loading.open_model("some/model")[2]
    assert files.identity().keys() == {"model.safetensors" if also else "pytorch_model.bin", "config.json", "commit"}
    assert (folder / "pytorch_model.bin").exists() == (not also)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_model_is_one_from_its_first_byte_to_its_score(tmp_path, kind):
    """Of .bin files and GGUF all is loaded, then hashed: of another model, if the file is another by then."""
    save_tiny(tmp_path)
    path = tmp_path / "model.safetensors"
    if kind == "bin":
        torch.save(load_file(path), tmp_path / "pytorch_model.bin")
        path.unlink()
        path = tmp_path / "pytorch_model.bin"
    source = open_source(tmp_path)
    assert source.identity() == source.identity() and source.load()
    path.write_bytes(path.read_bytes())
    for use in (source.identity, source.load):
        with pytest.raises(ValueError, match=rf"{path.name} was changed or removed while it was read; nothing may write"):
            use()
    files = ModelFiles.now([path])
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name} was changed or removed"):
        files.check()


def test_a_plan_reads_no_weights(main, tmp_path, monkeypatch):  # noqa: F811
    def refuse(*_args, **_kwargs):
        raise AssertionError

    save_tiny(tmp_path)
    monkeypatch.setattr(identity, "digest", refuse)
    assert main([str(tmp_path), "--plan", "--device", "cpu"]) == 0


def test_versions_and_device_are_part_of_the_fingerprint():
    version = code_version()
    assert all(f"{name} " in version for name in ("torch", "transformers", "triton"))
    assert fingerprint({}, None, {})["device"] == {"name": "cpu"}
