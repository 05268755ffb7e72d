"""What happens around a run: signals, disks that lie, files that change while they are read, no memory, ranks that are gone."""

import fcntl
import json
import os
import re
import shutil
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed import DistError, TCPStore

import ptq.pipeline.finish
from ptq.calibrate.activations import Activations
from ptq.cli import main
from ptq.export.compressed_tensors import CompressedTensors
from ptq.export.index import header
from ptq.models.adapter import ModelAdapter
from ptq.models.identity import digest
from ptq.models.location import fetch
from ptq.models.shards import Shards, shard_paths
from ptq.run.fingerprint import installed
from ptq.run.job import Job, do_layers
from ptq.run.loop import Calibration, quantize_model
from ptq.run.plan import make_plan
from ptq.run.recipe import Recipe
from ptq.run.resume import Unfinished, lock, unfinished_folder
from ptq.runtime.distributed import Ranks, exchange
from ptq.runtime.heartbeat import beat_and_listen

from .conftest import disk_full_at
from .tiny import TEXT, save_tiny, tiny_model

TOKENS = torch.arange(64).view(4, 16)


@pytest.fixture
def quantize(tmp_path):
    """quantize(…) is the exit code of the command, which rounds a tiny model to nearest."""
    save_tiny(tmp_path / "model")
    (tmp_path / "text").write_text(TEXT)
    options = f"--calibration {tmp_path}/text --sequences 2 --length 16 --method rtn --rule absmax --device cpu"
    arguments = ["quantize", str(tmp_path / "model"), *options.split(), "--output", str(tmp_path / "out")]
    return lambda *more: main([*arguments, *more])


@pytest.mark.parametrize("number, by", [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_ends_a_run_in_one_line(quantize, tmp_path, monkeypatch, capsys, number, by):
    """While the first layer is written."""
    write, before = Unfinished.write_layer, signal.getsignal(number)

    def struck(self, *arguments) -> None:
        write(self, *arguments)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(Unfinished, "write_layer", struck)
    assert quantize() == 128 + number and signal.getsignal(number) is before
    said = f"stopped by {by}; {tmp_path}/out.unfinished keeps what is done, and the same command with --resume goes on\n"
    assert capsys.readouterr().err.endswith(said) and not (tmp_path / "out").exists()


def turn_a_bit(folder: Path) -> None:
    """Of a code in the first layer's down projection."""
    path, name = min(folder.glob("model-*.safetensors")), "model.layers.0.mlp.down_proj.weight_packed"
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + header(path)[name]["data_offsets"][0]] ^= 4
    path.write_bytes(data)


CHANGED = "checkpoint: model.layers.0.mlp.down_proj.weight_packed is not what was stored (1 such tensors); the disk or another"


def test_a_layer_that_a_disk_changes_later_is_no_result(quantize, tmp_path, monkeypatch, capsys):
    write = Unfinished.write_layer

    def turned(self, done, *arguments) -> None:
        write(self, done, *arguments)
        if done.layer.index == 1:
            turn_a_bit(self.checkpoint)

    monkeypatch.setattr(Unfinished, "write_layer", turned)
    assert quantize() == 1 and not (tmp_path / "out").exists()
    assert CHANGED in capsys.readouterr().err


def test_a_layer_that_a_disk_changes_before_it_is_gone_on_with(quantize, tmp_path, capsys):
    with disk_full_at(1):
        assert quantize("--method", "gptq") == 1
    turn_a_bit(tmp_path / "out.unfinished" / "checkpoint")
    assert quantize("--method", "gptq", "--resume") == 1
    assert CHANGED in capsys.readouterr().err


def test_a_checkpoint_that_transformers_reads_as_another_model(quantize, tmp_path, monkeypatch, capsys):
    """Another process edits its config before it is read back."""
    write = ptq.pipeline.finish.write_rest

    def edited(folder: Path, *arguments) -> None:
        write(folder, *arguments)
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.1}))

    monkeypatch.setattr(ptq.pipeline.finish, "write_rest", edited)
    assert quantize() == 1 and not (tmp_path / "out").exists()
    assert re.search(r"error: the checkpoint reads back with logits \S+ away from the model", capsys.readouterr().err)


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path, monkeypatch):
    """Another process shortens it just when it is opened."""
    opened = Path.open

    def shorter(path: Path, *arguments, **options):
        os.truncate(path, path.stat().st_size - 10)
        return opened(path, *arguments, **options)

    save_tiny(tmp_path)
    shards = Shards(tmp_path)
    (path,) = shard_paths(tmp_path)
    last = max(shards.tensors, key=lambda name: shards.tensors[name].end)
    monkeypatch.setattr(Path, "open", shorter)
    with pytest.raises(ValueError, match=r"model\.safetensors was changed or removed while it was read; nothing may write"):
        shards.read([last])
    with pytest.raises(ValueError, match=r"model\.safetensors became shorter while it was read; is it still being written"):
        digest(path)


def test_a_folder_that_is_removed_while_it_is_locked(tmp_path, monkeypatch):
    """By the process that had it, which is done between our opening and our locking it."""
    flock = fcntl.flock

    def removed(descriptor: int, how: int) -> None:
        shutil.rmtree(tmp_path / "out.unfinished")
        flock(descriptor, how)

    folder = unfinished_folder(tmp_path / "out")
    folder.mkdir()
    monkeypatch.setattr(fcntl, "flock", removed)
    with pytest.raises(ValueError, match=r"another process is writing to .*out\.unfinished"):
        lock(folder)


def test_a_model_that_the_hub_does_not_give():
    with pytest.raises(ValueError, match="no such id! cannot be loaded: "):  # refused before anything is asked
        fetch("no such id!")


def test_a_package_that_is_not_installed_has_no_version():
    assert installed("no-such-package-of-ptq") == "none"


def test_no_memory_to_solve_a_group_names_it(monkeypatch):
    def full(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(torch.linalg, "cholesky_ex", full)
    said = (
        r"phase 'solve' of model\.layers\.0\.self_attn\.q_proj.*, for matrices of 64²; set --hidden-states host.*2\.00 GiB\.\)$"
    )
    with pytest.raises(torch.OutOfMemoryError, match=said):
        next(quantize_model(ModelAdapter(tiny_model()), Recipe(), Calibration([TOKENS])))


def test_no_memory_for_hidden_states_says_how_many_they_are(monkeypatch):
    def full(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(torch, "empty", full)
    said = r"hidden states of 8 sequences of 1024 tokens, 0\.5 GB; set --hidden-states host, or .* fewer .*2\.00 GiB\.\)$"
    with pytest.raises(torch.OutOfMemoryError, match=said):
        Activations((8, 1024, 16384), torch.float32, torch.device("cpu"), 1)


def test_no_memory_is_not_taken_for_a_rank_that_is_gone():
    with pytest.raises(torch.OutOfMemoryError, match="of GPU 0"), exchange():
        raise torch.OutOfMemoryError("of GPU 0")


def test_row_feedback_on_ranks_is_not_deterministic(tmp_path):
    adapter = ModelAdapter(tiny_model())
    plan = make_plan(adapter, Recipe(row_feedback=True))
    job = Job(adapter, plan, CompressedTensors(), TOKENS, torch.device("cpu"))
    unfinished = Unfinished(tmp_path / "out", {}, 2, resume=False)
    with pytest.raises(ValueError, match="--row-feedback is not --deterministic on several ranks; use one rank, or leave"):
        do_layers(job, unfinished, Ranks(0, 2, deterministic=True))
    unfinished.close()


@pytest.mark.parametrize("done", [False, True], ids=["at work", "done"])
def test_a_rank_whose_store_is_gone_stops_listening(done):
    """torchrun has ended, and ends the ranks too: no more is said of it."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client, ended = TCPStore("127.0.0.1", server.port, is_master=False), threading.Event()
    listen = partial(beat_and_listen, client, 0, 1, ended, interval=0.01, silence=60.0, patience=60.0)
    del server
    if done:  # a word to a closed connection is lost before one is refused
        with pytest.raises(DistError):
            client.get("anything")
        ended.set()
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
