"""Real ranks, started by torchrun, over gloo on the CPU."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

from ptq.export.checkpoint import shard_name
from ptq.runtime.distributed import Ranks, assign, init_process_group, shard_rows
from ptq.runtime.heartbeat import heartbeat, may_wait, meeting

from .conftest import PYTHONPATH, ROOT
from .processes import process_of_rank
from .test_script import main  # noqa: F401  # a fixture
from .tiny import TEXT, save_tiny

# --standalone: on a free port, as several of them may run at once.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}


def prepare(folder: Path) -> list[str]:
    """The arguments of a run, but for the name of its output; text1.txt is another text."""
    save_tiny(folder / "model")
    (folder / "text0.txt").write_text(TEXT)
    (folder / "text1.txt").write_text(TEXT[::-1])
    common = ["--calibration", str(folder / "text0.txt"), "--sequences", "9", "--length", "32", "--device", "cpu"]
    return [str(folder / "model"), *common, "--output"]


class Job(NamedTuple):
    """What two ranks did with these arguments: the exit code of rank 0, None of one that was killed."""

    arguments: list[str]
    output: Path
    code: int | None


class Jobs(NamedTuple):
    """By the name of the output; how torchrun ended, what was said, and seconds from the kill to the end."""

    of: dict[str, Job]
    code: int
    said: str
    seconds: float


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Jobs:
    """Of one torchrun.  A job has other texts on the ranks; in the last, rank 1 is killed."""
    folder = tmp_path_factory.mktemp("jobs")
    arguments = prepare(folder)
    given = {"deterministic": ["--deterministic", *arguments]}
    given |= {"scaled channels": ["--deterministic", "--activations", "nvfp4", "--rule", "mse", *arguments]}
    given |= {effort: ["--effort", effort, *arguments] for effort in ("default", "best")}
    given |= {"others": [word.replace("text0", "textRANK") for word in arguments], "killed": arguments}
    (folder / "jobs.json").write_text(json.dumps([[*words, str(folder / name)] for name, words in given.items()]))
    command = [*TORCHRUN, str(ROOT / "tests" / "jobs_of_ranks.py"), str(folder / "jobs.json")]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while not (folder / "killed.unfinished" / "layers").is_dir():
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.01)
    process = process_of_rank(1, running.pid)
    assert process is not None
    os.kill(process, signal.SIGKILL)
    killed = time.monotonic()
    said = running.communicate(timeout=60)[1]
    codes = [*json.loads((folder / "jobs.codes").read_text()), None]
    done = {name: Job(given[name], folder / name, code) for name, code in zip(given, codes, strict=True)}
    return Jobs(done, running.returncode, said, time.monotonic() - killed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deterministic", "scaled channels"])
def test_two_ranks_give_the_bytes_of_one(main, tmp_path, jobs, name):  # noqa: F811
    job = jobs.of[name]
    assert job.code == 0 and job.output.is_dir(), jobs.said
    assert main([*job.arguments, str(tmp_path / "one")]) == 0
    assert contents(tmp_path / "one") == contents(job.output)


@pytest.mark.slow
@pytest.mark.parametrize("effort", ["default", "best"])
def test_two_ranks_find_what_one_does(main, tmp_path, jobs, effort):  # noqa: F811
    """The ranks share the rows of a stage (default) or solve whole stages.  Near-ties fall by the order of sums, and what is fed
    forward from one that falls otherwise changes what comes after it: another solution, of the same quality.  So the first
    layer is compared code by code, and the others by their errors."""
    job = jobs.of[effort]
    assert job.code == 0 and job.output.is_dir(), jobs.said
    assert main([*job.arguments, str(tmp_path / "one")]) == 0
    folders = {"one": tmp_path / "one", "two": job.output}
    ours, theirs = (load_file(folders[ranks] / shard_name(0, 2)) for ranks in ("two", "one"))
    assert all((tensor == theirs[name]).float().mean() > 0.98 for name, tensor in ours.items())
    one, two = (json.loads((folders[ranks] / "report.json").read_text())["linears"] for ranks in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["tokens"] == b["tokens"] and a["dead_inputs"] == b["dead_inputs"] and a["name"] == b["name"]
        for name in ("error", "rtn_error", "validation_error", "moved_scales"):
            assert a[name] == pytest.approx(b[name], rel=0.1), (a["name"], name)
        assert b["certificate"] < 1e-3


@pytest.mark.slow
def test_a_rank_with_another_calibration_set_stops_the_job(jobs):
    job = jobs.of["others"]
    assert job.code not in (0, None) and "rank 1 has another calibration set than rank 0" in jobs.said
    assert list(job.output.parent.glob(f"{job.output.name}*")) == []


@pytest.mark.slow
def test_a_dead_rank_ends_the_job_and_is_named(jobs):
    assert jobs.code != 0 and jobs.seconds < 60 and not jobs.of["killed"].output.exists()
    root_cause = jobs.said.split("Root Cause")[1]
    assert "rank      : 1" in root_cause and "Signal 9 (SIGKILL)" in root_cause


@pytest.mark.parametrize("alive", [False, True], ids=["silent", "alive"])
def test_a_silent_rank_is_named(monkeypatch, tmp_path, alive):
    """Rank 0 in a fork, which ends itself with 1; rank 1 is this process, which says that it lives, or nothing."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    child = os.fork()
    if child == 0:
        sys.stderr = (tmp_path / "said").open("w")
        with heartbeat(0, 2, interval=0.05, silence=1.0), may_wait():
            time.sleep(3)
        os._exit(0)
    ended = (0, 0)
    while ended == (0, 0):
        if alive:
            store.set("heartbeat 1", str(time.monotonic()))
        time.sleep(0.05)
        ended = os.waitpid(child, os.WNOHANG)
    assert os.waitstatus_to_exitcode(ended[1]) == (0 if alive else 1)
    said = (tmp_path / "said").read_text()
    assert said == ("" if alive else "error on rank 0: rank 1 has been silent for 1 s; it is dead, stopped or cut off\n")


def test_a_rank_whose_other_has_ended_says_so(tmp_path):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            try:
                with init_process_group(torch.device("cpu")) as ranks:
                    ranks.all_reduce(torch.ones(2))
                    if rank == 0:
                        ranks.all_reduce(torch.ones(2))
            except ConnectionError as error:
                (tmp_path / "said").write_text(str(error))
            finally:
                os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    said = (tmp_path / "said").read_text()
    assert said.startswith("another rank has ended, or cannot be reached (") and "\n" not in said


def locked() -> None:
    lock = threading.Lock()
    for _ in range(2):
        lock.acquire(timeout=8)


def waits() -> None:
    with may_wait():
        time.sleep(3)


def compiles() -> None:
    subprocess.run(["sleep", "3"], check=True)


def solves() -> None:
    """One call after the other that takes long and gives nothing away."""
    until = time.monotonic() + 3
    while time.monotonic() < until:
        torch.linalg.eigvalsh(torch.eye(600) + torch.ones(600, 600))


@pytest.mark.parametrize("work", [locked, waits, compiles, solves])
def test_a_rank_that_hangs_names_itself_and_says_where(monkeypatch, tmp_path, work):
    """In a fork, beside a rank that has ended; long work and waiting for others are no hanging."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    store.set("heartbeat 1", "done")
    child = os.fork()
    if child == 0:
        sys.stderr = (tmp_path / "said").open("w")
        with heartbeat(0, 2, interval=0.05, silence=1.0):
            work()
        os._exit(0)
    code, said = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), (tmp_path / "said").read_text()
    if work is locked:
        assert code == 1 and said.startswith("error on rank 0: rank 0 has done nothing for 1 s; it hangs here:\n")
        assert "lock.acquire(timeout=8)" in said
    else:
        assert (code, said) == (0, "")


def loops() -> None:
    until = time.monotonic() + 2
    while time.monotonic() < until:
        pass


def meets() -> None:
    with meeting():
        time.sleep(2)


@pytest.mark.parametrize("work", [loops, waits, meets])
def test_a_rank_for_which_another_waits_says_where_it_is(monkeypatch, tmp_path, work):
    """In a fork, beside a rank that says that it has been in a collective for 7 s: once, and nothing is ended for that."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    child = os.fork()
    if child == 0:
        sys.stderr = (tmp_path / "said").open("w")
        with heartbeat(0, 2, interval=0.05, silence=5.0, patience=0.5):
            work()
        os._exit(0)
    ended, count = (0, 0), 0
    while ended == (0, 0):
        store.set("heartbeat 1", f"{(count := count + 1)} 7")
        time.sleep(0.05)
        ended = os.waitpid(child, os.WNOHANG)
    said = (tmp_path / "said").read_text()
    whom = "both it and rank 1 have been in a collective" if work is meets else "rank 1 has waited for this one"
    line = f"rank 0: {whom} for 7 s; it is at {ROOT.name}/tests/test_distributed.py, {work.__name__}\n"
    assert (os.waitstatus_to_exitcode(ended[1]), said.count(line)) == (0, 1) and "threading.py" not in said


@pytest.mark.parametrize("sequences", [8, 13, 128])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_ranks_share_the_sequences_in_groups_that_do_not_depend_on_them(sequences, size):
    teams = [Ranks(rank, size) for rank in range(size)]
    groups = [group for ranks in teams for group in ranks.groups(sequences)]
    assert [i for group in groups for i in range(sequences)[group]] == list(range(sequences))
    for ranks in teams:
        share = ranks.shard(sequences)
        assert ranks.local_groups(sequences)[-1].stop == share.stop - share.start
    if size != 3:
        assert groups == Ranks().groups(sequences)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="1 calibration sequences are too few to divide into 2 parts"):
        Ranks(0, 2).shard(1)
    with pytest.raises(ValueError, match="--deterministic works on 1, 2, 4 or 8 ranks, not 3"):
        Ranks(0, 3, deterministic=True)


def test_work_goes_to_the_rank_with_the_least():
    assert assign([5.0, 1.0, 2.0, 3.0], 2) == [0, 1, 1, 1] or assign([5.0, 1.0, 2.0, 3.0], 2) == [0, 0, 1, 1]
    assert assign([1.0, 1.0], 1) == [0, 0]


def test_rows_are_shared_where_there_are_fewer_stages_than_ranks():
    stage, ranks = (10, 4), Ranks(0, 4)
    assert shard_rows([stage], ranks, divisible=True) == [[range(0, 2), range(2, 5), range(5, 7), range(7, 10)]]
    whole = [range(10), range(0), range(0), range(0)]
    assert shard_rows([stage], ranks, divisible=False) == [whole]
    assert shard_rows([stage], Ranks(0, 4, deterministic=True), divisible=True) == [whole]
    assert shard_rows([stage] * 2, Ranks(0, 2), divisible=True) == [[range(10), range(0)], [range(0), range(10)]]
    assert shard_rows([stage], Ranks(), divisible=True) == [[range(10)]]
    assert shard_rows([(3, 4)], ranks, divisible=True) == [[range(3), range(0), range(0), range(0)]]


def test_alone_nothing_is_exchanged():
    ranks, tensor = Ranks(), torch.ones(3)
    ranks.reduce(tensor, 0)
    ranks.broadcast(tensor, 0)
    assert (
        torch.equal(ranks.all_gather(tensor, 3), torch.ones(3))
        and ranks.all_gather_object("x") == ["x"]
        and ranks.all_reduce_value(2, tensor.device) == 2
    )
