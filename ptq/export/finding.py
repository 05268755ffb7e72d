"""One thing that `check` found, and how names of a configuration match those of linears."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch

ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True)
class Finding:
    """`severity`: an error does not load or computes something else; a warning may; a note is for the reader.  `place`: a
    tensor, linear or file.  `sentence` says what is so, `remedy` what to do."""

    severity: str
    place: str
    sentence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.place}: {self.sentence}; {self.remedy}"


# Names in a layer, by what is fused with what; the projections of one expert are fused like those of a dense layer.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


def fused_groups(linears: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """The linears by groups that serving engines make one layer of; alone those that are in none."""
    groups: dict[str, list[str]] = {}
    for name in linears:
        parent, _, last = name.rpartition(".")
        key = next((f"{parent}.{'+'.join(names)}" for names in FUSED if last in names), name)
        groups.setdefault(key, []).append(name)
    yield from (tuple(group) for group in groups.values())


def engine_layers(linears: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """The linears by what engines make one weight of: fused groups, and those of all experts of a layer together."""
    layers: dict[str, list[str]] = {}
    for group in fused_groups(linears):
        layers.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", group[0]), []).extend(group)
    yield from (tuple(layer) for layer in layers.values())


def matcher(layout: str) -> Callable[[str, str], bool]:
    """How a layout's readers match a pattern with a linear's name: (pattern, name) -> bool."""
    return matches_wildcard if layout == "modelopt" else matches_compressed


def matches_compressed(pattern: str, name: str) -> bool:
    """compressed-tensors: the name, a regular expression after "re:" from the start on, or the class Linear."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern in (name, "Linear")


def matches_wildcard(pattern: str, name: str) -> bool:
    """ModelOpt: the name, a part of it, or shell wildcards."""
    return pattern in name or fnmatch(name, pattern)
