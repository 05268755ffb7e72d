"""Processes that torchrun started."""

from pathlib import Path


def process_of_rank(rank: int, parent: int) -> int | None:
    """Among the children of torchrun; None where there is no such rank (any more)."""
    for children in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in children.read_text().split():
            if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                return int(child)
    return None
