"""How much memory is left, on a GPU or on the host, and what is said where it ends."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def free_share(device: torch.device) -> float:
    """The part of the device's memory that this process could still take.

    On a GPU that counts what torch's allocator holds and does not use, and all is what the process was left of it
    (torch.cuda.set_per_process_memory_fraction); on a CPU, the limit of the container, if it has one.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        limit, used = total * torch.cuda.get_per_process_memory_fraction(device), torch.cuda.memory_allocated(device)
        return min(free + torch.cuda.memory_reserved(device) - used, limit - used) / limit
    host = psutil.virtual_memory()
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else "max"
    if limit == "max" or int(limit) >= host.total:
        return host.available / host.total
    return min(host.available, int(limit) - psutil.Process().memory_info().rss) / int(limit)


@contextmanager
def out_of_memory_says(remedy: str) -> Iterator[None]:
    """Raises MemoryError, in one line that ends with the `remedy`, where the block asks the host for more memory than it gives
    (torch raises a RuntimeError of no class of its own), and OutOfMemoryError where it asks a GPU.

    What says already in which phase it was, and what to set, passes.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("out of memory "):
            raise
        raise torch.OutOfMemoryError(f"the GPU has no memory left ({reason}); take one with more, or {remedy}") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        size = re.search(r"allocate (\d+) bytes", str(error))
        tensor = f" for a tensor of {int(size[1]) / 1e9:.2f} GB" if size else ""
        raise MemoryError(f"the host has no memory left{tensor}; take a machine with more, or {remedy}") from error
