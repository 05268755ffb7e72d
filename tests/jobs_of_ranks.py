"""Under torchrun: scripts/quantize_llama.py several times, one list of arguments after the other, RANK in them replaced.

    torchrun --nproc-per-node 2 tests/jobs_of_ranks.py JOBS.json

Each job but the last is a fork on every rank, so that all share one start of Python, and has a store of its own to meet at.  The
exit codes of rank 0 are in JOBS.codes.  The last job is the rank itself, as the script would be.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from torch.distributed import TCPStore

HERE = Path(__file__).resolve().parent


def main() -> None:
    forks = runpy.run_path(str(HERE / "kill_and_resume.py"))
    run, rank, codes = forks["script"](), os.environ["RANK"], []
    torchruns = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    *jobs, last = json.loads(Path(sys.argv[1]).read_text())
    for number, arguments in enumerate([*jobs, last]):
        if rank == "0":
            store = TCPStore(os.environ["MASTER_ADDR"], 0, is_master=True, wait_for_workers=False)
            torchruns.set(f"port of job {number}", str(store.port))
        os.environ["MASTER_PORT"] = torchruns.get(f"port of job {number}").decode()
        if number < len(jobs):
            job = forks["start"](run, [word.replace("RANK", rank) for word in arguments])
            codes.append(os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]))
    if rank == "0":
        Path(sys.argv[1]).with_suffix(".codes").write_text(json.dumps(codes))
    sys.argv[1:] = last
    runpy.run_path(str(HERE.parent / "scripts" / "quantize_llama.py"), run_name="__main__")


if __name__ == "__main__":
    main()
