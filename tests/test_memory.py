"""What is said where memory ends: the host's, whose address space is capped for real, and a GPU's."""

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ptq.cli import main
from ptq.runtime.memory import out_of_memory_says

from .tiny import TEXT, save_tiny


@contextmanager
def capped(more: int) -> Iterator[None]:
    """Inside the block this process may take so many bytes more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


WIDE = {"hidden_size": 1024, "intermediate_size": 64}
CALIBRATION = "--calibration TEXT --sequences 1024 --length 256"
REMEDIES = {
    "quantize": (WIDE, CALIBRATION, "give --batch 1, fewer --sequences or a shorter --length; finished .* --resume"),
    "compare": (
        WIDE,
        f"{CALIBRATION} --text TEXT --windows 1 --formats nvfp4 --cases rtn-local-none",
        "give fewer --sequences or a shorter .*",
    ),
    "evaluate": (
        {"vocab_size": 10**6, "hidden_size": 8, "max_position_embeddings": 256},
        "--text TEXT --length 256 --windows 1",
        "give a shorter --length, --dtype bfloat16 or --batch-size 1; --reuse .*",
    ),
}


@pytest.mark.parametrize("command", REMEDIES)
def test_a_host_without_memory_ends_in_one_line(tmp_path, capsys, command):
    """Hidden states, or the logits of a window, take more than is left."""
    sizes, options, remedy = REMEDIES[command]
    save_tiny(tmp_path / "model", **sizes)
    (tmp_path / "text").write_text(f"{TEXT} " * 92)
    given = options.replace("TEXT", str(tmp_path / "text")).split()
    with capped(5 * 10**8):  # libraries and the tokenizer's threads, which abort without memory, take of it too
        assert main([command, str(tmp_path / "model"), *given, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    begin = r"error: the host has no memory left for a tensor of \d\.\d\d GB; take a machine with more, or "
    assert re.fullmatch(begin + remedy, *said)


def test_errors_that_are_not_of_memory_pass():
    with pytest.raises(RuntimeError, match="another"), out_of_memory_says("give less"):
        raise RuntimeError("another")
    with (
        pytest.raises(MemoryError, match="has no memory left; take a machine with more, or give less"),
        out_of_memory_says("give less"),
    ):
        bytearray(2**62)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore", r"the GPU has no memory left \(CUDA .*\); .* or give less"),
        ("out of memory in phase 'solve' of q_proj; set this", r"out of memory in phase 'solve' of q_proj; set this"),
    ],
)
def test_a_gpu_without_memory_says_what_to_set_once(reason, said):
    with pytest.raises(torch.OutOfMemoryError) as caught, out_of_memory_says("give less"):
        raise torch.OutOfMemoryError(reason)
    assert re.fullmatch(said, str(caught.value))
