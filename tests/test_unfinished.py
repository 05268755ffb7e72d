"""Unfinished runs: killed, out of disk, gone on with; and the same bytes whichever way they came about."""

import gc
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptq.export.checkpoint import write_rest
from ptq.export.compressed_tensors import CompressedTensors
from ptq.models.adapter import ModelAdapter
from ptq.models.families import FAMILIES
from ptq.models.loading import load_model, open_model
from ptq.models.shards import read_header
from ptq.run import resume
from ptq.run.fingerprint import differences, fingerprint
from ptq.run.job import Job, do_layers
from ptq.run.plan import make_plan
from ptq.run.recipe import Recipe
from ptq.run.resume import Unfinished, unfinished_folder
from ptq.runtime.distributed import Ranks

from .conftest import PYTHONPATH, ROOT, disk_full_at
from .test_script import main  # noqa: F401  # a fixture
from .tiny import TEXT, save_tiny

QUICK = ["--rule", "mse", "--device", "cpu"]  # the rule whose search takes least
TOKENS = torch.randint(0, 28, (8, 32), generator=torch.Generator().manual_seed(6))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}


def held() -> tuple[int, int]:
    """(bytes of tensors, open files) of this process."""
    gc.collect()
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in gc.get_objects() if is_tensor(one)}
    return sum(storages.values()), len(os.listdir("/proc/self/fd"))


def is_tensor(one: object) -> bool:
    return issubclass(type(one), torch.Tensor) and one.device.type == "cpu" and one.layout == torch.strided  # type: ignore[attr-defined]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_no_layer_leaves_anything_behind(tmp_path, monkeypatch):
    """16 layers, read one by one; when a layer is written the next one or two may have been read already, or not."""
    save_tiny(tmp_path / "model", num_hidden_layers=16, num_attention_heads=2, hidden_size=32, intermediate_size=32)
    adapter, _, _ = open_model(str(tmp_path / "model"))
    seen = []

    def look(one: Unfinished, done, *_arguments) -> None:
        if done.layer.index % 5 == 4:
            seen.append(held())

    monkeypatch.setattr(Unfinished, "write_layer", look)
    job = Job(adapter, make_plan(adapter, Recipe(rule="absmax", drift=1.0)), CompressedTensors(), TOKENS, torch.device("cpu"))
    do_layers(job, Unfinished(tmp_path / "out", {}, 16, resume=False), Ranks())
    (first, files), (_, _), (last, files_then) = seen
    layer = sum(parameter.nbytes for parameter in adapter.model.model.layers[0].parameters())
    assert last - first < 5 * layer and files_then <= files + 1  # half a layer for each of the 10 between


def quantize(adapter, tokenizer, output: Path) -> None:
    config = Recipe(rule="mse", drift=1.0)  # the rule whose search takes least
    job = Job(adapter, make_plan(adapter, config), CompressedTensors(), TOKENS, torch.device("cpu"), batch=3)
    unfinished = Unfinished(output, {}, len(adapter.names), resume=False)
    do_layers(job, unfinished, Ranks())
    write_rest(unfinished.checkpoint, adapter, tokenizer, job.plan.formats, job.layout)
    unfinished.finish()


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_streamed_model_gives_the_bytes_of_one_in_memory(tmp_path, dtype, changes):
    save_tiny(tmp_path / "model", dtype=dtype, num_hidden_layers=3, **changes)
    adapter, tokenizer, _ = open_model(str(tmp_path / "model"))
    quantize(adapter, tokenizer, tmp_path / "streamed")
    model, tokenizer = load_model(str(tmp_path / "model"))
    quantize(ModelAdapter(model), tokenizer, tmp_path / "whole")
    assert all(parameter.is_meta for parameter in adapter.model.parameters())
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")


@pytest.fixture
def job(tmp_path) -> list[str]:
    save_tiny(tmp_path / "model", num_hidden_layers=3)
    (tmp_path / "text.txt").write_text(TEXT)
    text = ["--calibration", str(tmp_path / "text.txt"), "--sequences", "8", "--length", "32"]
    return [str(tmp_path / "model"), *text, "--token-importance", "sampled"]


WRITE_LAYER = Unfinished.write_layer


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(python, tmp_path, job):
    """Three kills here; CONTRIBUTING.md has the command for more."""
    command = [python, str(ROOT / "tests" / "kill_and_resume.py"), "3", "0", str(tmp_path), *job, *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": PYTHONPATH})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["kills"] == 3


def test_an_unfinished_run_is_offered_and_one_of_other_settings_is_refused(main, tmp_path, job, capsys, monkeypatch):  # noqa: F811
    """The run stops when nearly all is done: while the tokenizer is written."""
    from transformers import PreTrainedTokenizerBase

    output = tmp_path / "out"
    arguments = [*job, *QUICK, "--output", str(output)]

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
        assert main(arguments) == 1
    assert not output.exists() and unfinished_folder(output).is_dir()
    assert main(arguments) == 1
    assert f"{unfinished_folder(output)} holds an unfinished run; go on with --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--seed", "1"]) == 1
    refused = capsys.readouterr().err
    assert "settings: seed was 0 and is 1" in refused and "calibration: sha256 was" in refused
    assert main([*arguments, "--resume"]) == 0
    assert output.is_dir() and not unfinished_folder(output).exists()
    assert main([*arguments[:-1], str(tmp_path / "again")]) == 0
    assert contents(output) == contents(tmp_path / "again")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--effort", "fast", "--token-importance", "none"], ["--effort", "best"], ["--drift", "half"]], ids=" ".join
)
def test_every_effort_goes_on_to_the_same_bytes(main, tmp_path, job, options, monkeypatch):  # noqa: F811
    """The disk is full when the second of three layers is written."""
    output = tmp_path / "out"
    arguments = [*job, *options, "--device", "cpu", "--output"]
    with disk_full_at(1):
        assert main([*arguments, str(output)]) == 1
    assert len(list((unfinished_folder(output) / "layers").iterdir())) == 1
    assert main([*arguments, str(output), "--resume"]) == 0
    assert main([*arguments, str(tmp_path / "again")]) == 0
    assert contents(output) == contents(tmp_path / "again")


def test_another_models_weights_are_not_gone_on_with(main, tmp_path, job, capsys, monkeypatch):  # noqa: F811
    """After one layer a weight of another changes, as when an adapter is merged in place: size and header stay."""
    output, path = tmp_path / "out", tmp_path / "model" / "model.safetensors"
    with disk_full_at(1):
        assert main([*job, *QUICK, "--output", str(output)]) == 1
    header, tensors = read_header(path), load_file(path)
    tensors["model.layers.2.mlp.up_proj.weight"][5, 7] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    assert read_header(path) == header
    capsys.readouterr()
    assert main([*job, *QUICK, "--output", str(output), "--resume"]) == 1
    assert "is of another run: model: model.safetensors was [" in capsys.readouterr().err


def test_what_differs_is_said():
    about = fingerprint({"a.safetensors": [10, "x"]}, TOKENS, {"method": "gptq"})
    other = fingerprint({"a.safetensors": [11, "x"]}, TOKENS, {"method": "rtn"})
    assert differences(about, about) == []
    assert differences(about, other) == [
        "model: a.safetensors was [10, 'x'] and is [11, 'x']",
        "settings: method was gptq and is rtn",
    ]


def test_two_processes_cannot_write_to_one_output(tmp_path):
    first = Unfinished(tmp_path / "out", {}, 2, resume=False)
    with pytest.raises(ValueError, match="another process is writing"):
        Unfinished(tmp_path / "out", {}, 2, resume=True)
    first.close()
    assert not unfinished_folder(tmp_path / "out").exists()


def test_an_empty_folder_is_removed_before_it_is_unlocked(tmp_path, monkeypatch):
    """Else another process might lock it, and write, in between."""
    first, remove, seen = Unfinished(tmp_path / "out", {}, 2, resume=False), shutil.rmtree, []

    def look(folder):
        with pytest.raises(ValueError, match="another process is writing"):
            Unfinished(tmp_path / "out", {}, 2, resume=True)
        seen.append(folder)
        remove(folder)

    monkeypatch.setattr(shutil, "rmtree", look)
    first.close()
    assert seen == [unfinished_folder(tmp_path / "out")] and not seen[0].exists()


def fail(*_args, **_kwargs):
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("where", [(Path, "rename"), (shutil, "rmtree"), (Path, "rmdir")], ids=lambda where: where[1])
def test_a_run_that_ends_while_it_finishes_is_finished_later(main, tmp_path, job, where, capsys, monkeypatch):  # noqa: F811
    """Before the output has its name, before anything is cleared away, and when all but the folder itself is."""
    output, finish, synced = tmp_path / "out", Unfinished.finish, []
    arguments = [*job, *QUICK, "--output", str(output)]
    monkeypatch.setattr(resume, "sync", lambda path: synced.append(path.name))

    def interrupted(self):
        with monkeypatch.context() as patch:
            patch.setattr(*where, fail)
            finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "finish", interrupted)
        assert main(arguments) == 1
    assert output.exists() == (where[1] != "rename")
    assert {"tokenizer.json", "generation_config.json", "report.json", "checkpoint"} <= set(synced)
    capsys.readouterr()
    if where[1] == "rmdir":  # as after the last step
        assert main([*arguments, "--resume"]) == 1
        assert f"output {output} exists already" in capsys.readouterr().err
        return
    if where[1] == "rmtree":
        assert main([*arguments, "--resume", "--seed", "1"]) == 1
        assert "settings: seed was 0 and is 1" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert "21 linears" in capsys.readouterr().out
    assert output.is_dir() and not unfinished_folder(output).exists()
    assert main([*arguments[:-1], str(tmp_path / "again")]) == 0
    assert contents(output) == contents(tmp_path / "again")


def test_what_a_finished_run_left_does_not_stand_for_layers(main, tmp_path, job, monkeypatch):  # noqa: F811
    """The output was moved away before the folder was cleared: a new run begins anew."""
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        arguments = [*job, *QUICK, "--output", str(output)]
        assert main(arguments) == 1
    output.rename(tmp_path / "elsewhere")
    assert list((unfinished_folder(output) / "layers").iterdir())
    assert main(arguments) == 0
    assert contents(output) == contents(tmp_path / "elsewhere")


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_full_disk_ends_the_run_and_a_larger_one_goes_on(main, tmp_path, job, capsys, monkeypatch):  # noqa: F811
    """A real file system fills up after two layers; the check that would have refused it at once is left out."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    monkeypatch.setattr("ptq.pipeline.run.check_output", lambda *_: None)
    arguments = [*job, *QUICK, "--output"]
    try:
        assert main([*arguments, str(disk / "out")]) == 1
        assert "No space left" in capsys.readouterr().err
        finished = len(list(unfinished_folder(disk / "out").glob("layers/*.json")))
        assert 0 < finished < 3 and not list(disk.glob("**/*.part"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert main([*arguments, str(disk / "out"), "--resume"]) == 0
        assert main([*arguments, str(tmp_path / "other")]) == 0
        assert contents(disk / "out") == contents(tmp_path / "other")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_on_to_the_same_bytes(main, tmp_path, monkeypatch, family):  # noqa: F811
    """From what a kill would leave after the first of two layers: a copy made then of the folder of a run that ends well."""
    save_tiny(tmp_path / "model", family)
    (tmp_path / "text.txt").write_text(TEXT)
    text = ["--calibration", str(tmp_path / "text.txt"), "--sequences", "4", "--length", "32"]
    arguments = [str(tmp_path / "model"), *text, *QUICK, "--output"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def copied(self, done, *arguments):
        WRITE_LAYER(self, done, *arguments)
        if done.layer.index == 0:
            shutil.copytree(unfinished_folder(whole), unfinished_folder(killed))

    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "write_layer", copied)
        assert main([*arguments, str(whole)]) == 0
    assert len(list((unfinished_folder(killed) / "layers").iterdir())) == 1
    assert main([*arguments, str(killed), "--resume"]) == 0
    assert contents(killed) == contents(whole)
