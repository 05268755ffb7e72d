"""Bars, in a terminal or a notebook."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tqdm.auto import tqdm


@contextmanager
def bars(totals: Mapping[str, int], *, hidden: bool | None) -> Iterator[Callable[[str, str], None]]:
    """A function to be called with (kind of work, layer) as each layer is done; a bar for each kind, `totals` of layers.

    `hidden` None: where nobody watches."""
    open_bars: dict[str, tqdm] = {}

    def progress(what: str, _layer: str) -> None:
        if what not in open_bars:
            open_bars[what] = tqdm(total=totals[what], desc=what, unit="layer", disable=hidden)
        open_bars[what].update()

    try:
        yield progress
    finally:
        for bar in open_bars.values():
            bar.close()
