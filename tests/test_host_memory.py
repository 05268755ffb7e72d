"""What each command says where the host's memory ends: the address space is capped, for real."""

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ptq.cli import main
from ptq.runtime.memory import host_memory

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
CALIBRATION = "--calibration TEXT --sequences 256 --length 256"
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
    (tmp_path / "text").write_text(f"{TEXT} " * 23)
    given = options.replace("TEXT", str(tmp_path / "text")).split()
    with capped(2 * 10**8):
        assert main([command, str(tmp_path / "model"), *given, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    begin = r"error: the host has no memory left for a tensor of \d\.\d\d GB; take a machine with more, or "
    assert re.fullmatch(begin + remedy, *said)


def test_errors_that_are_not_of_memory_pass():
    with pytest.raises(RuntimeError, match="another"), host_memory("give less"):
        raise RuntimeError("another")
    with (
        pytest.raises(MemoryError, match="has no memory left; take a machine with more, or give less"),
        host_memory("give less"),
    ):
        bytearray(2**62)
