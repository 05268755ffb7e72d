"""Under torchrun: scripts/quantize_llama.py several times, one list of arguments after the other, RANK in them replaced.

    torchrun --nproc-per-node 2 tests/jobs_of_ranks.py JOBS.json

Each job is a fork on every rank, so that all share one start of Python, and has a store of its own to meet at.  The first that
fails is the last, and its exit code that of the rank.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from torch.distributed import TCPStore

HERE = Path(__file__).resolve().parent


def main() -> int:
    forks = runpy.run_path(str(HERE / "kill_and_resume.py"))
    run, rank, code = forks["script"](), os.environ["RANK"], 0
    torchruns = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    for number, arguments in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        if rank == "0":
            store = TCPStore(os.environ["MASTER_ADDR"], 0, is_master=True, wait_for_workers=False)
            torchruns.set(f"port of job {number}", str(store.port))
        os.environ["MASTER_PORT"] = torchruns.get(f"port of job {number}").decode()
        job = forks["start"](run, [word.replace("RANK", rank) for word in arguments])
        code = os.waitstatus_to_exitcode(os.waitpid(job, 0)[1])
        if code:
            break
    return code


if __name__ == "__main__":
    sys.exit(main())
