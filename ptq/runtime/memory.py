"""How much memory is left, on a GPU or on the host."""

from pathlib import Path

import psutil
import torch

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def free_share(device: torch.device) -> float:
    """The part of the device's memory that this process could still take.

    On a GPU that counts what torch's allocator holds and does not use; on a CPU, the limit of the container, if it has one.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) / total
    host = psutil.virtual_memory()
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else "max"
    if limit == "max" or int(limit) >= host.total:
        return host.available / host.total
    return min(host.available, int(limit) - psutil.Process().memory_info().rss) / int(limit)
