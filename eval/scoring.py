"""Log likelihoods of answers: what several sequences begin with runs through the model once, and only answers have logits.

Sequences with a common beginning make a tree.  Its nodes are tokens; a node sees its ancestors and stands at its depth, so that the
model computes along every path what it would for that sequence by itself.  Four answers to one question are the usual case.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptq.eval.logits import first_non_finite, is_finite

Sequence_ = tuple[int, ...]
NODES = 512  # of a tree, unless its longest sequence has more than half of that: attention is over all nodes
COMMON = 4  # a sequence joins a tree if it shares this part of its length, one in four
FULL = 0.8  # the least share of a batch's longest tree that others have: the rest is padding
LOGITS = 2**26  # that are in memory at a time


@dataclass(frozen=True)
class Request:
    """`tokens`: what the model reads.  `answer`: what it is to predict after the last len(answer) of them."""

    tokens: Sequence_
    answer: Sequence_


@dataclass
class Tree:
    """`tokens` and `depths` of the nodes.  `paths`: the nodes of each sequence."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: dict[Sequence_, list[int]] = field(default_factory=dict)

    def add(self, sequence: Sequence_, shared: Sequence[int]) -> list[int]:
        """The path of a sequence that begins with the nodes `shared`."""
        path = [*shared, *range(len(self.tokens), len(self.tokens) + len(sequence) - len(shared))]
        self.tokens += sequence[len(shared) :]
        self.depths += range(len(shared), len(sequence))
        self.paths[sequence] = path
        return path

    def mask(self) -> np.ndarray:
        """(nodes, nodes): whether the row's node sees the column's."""
        seen = np.zeros((len(self.tokens), len(self.tokens)), dtype=bool)
        for path in self.paths.values():
            seen[np.ix_(path, path)] = np.tri(len(path), dtype=bool)
        return seen


def make_trees(sequences: Iterable[Sequence_]) -> list[Tree]:
    """Every distinct sequence in one tree.  In their order, no sequence shares more than with the one before."""
    trees, last, path = [], (), []
    for sequence in sorted(set(sequences)):
        common = next(
            (i for i, (a, b) in enumerate(zip(last, sequence, strict=False)) if a != b), min(len(last), len(sequence))
        )
        size = len(trees[-1].tokens) + len(sequence) - common if trees else 0
        if not trees or COMMON * common < len(sequence) or size > max(NODES, 2 * len(sequence)):
            trees.append(Tree())
            common = 0
        path = trees[-1].add(sequence, path[:common])
        last = sequence
    return trees


def make_batches(trees: Iterable[Tree], room: int) -> Iterator[list[Tree]]:
    """The trees from large to small, together as far as they fit into `room` tokens and are of like size."""
    batch: list[Tree] = []
    for tree in sorted(trees, key=lambda tree: -len(tree.tokens)):
        longest = len(batch[0].tokens) if batch else 0
        if batch and (longest * (len(batch) + 1) > room or len(tree.tokens) < FULL * longest):
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


FOLLOW_THE_MASK = ("llama", "mistral", "qwen2", "qwen3")


def can_share(model: Any, longest: int) -> bool:
    """Whether the model is one whose attention follows the mask it is given over `longest` tokens, and nothing but the mask."""
    window = getattr(model.config, "sliding_window", None)
    return model.config.model_type in FOLLOW_THE_MASK and (window is None or longest <= window)


def hidden_states(model: PreTrainedModel, batch: Sequence[Tree]) -> Tensor:
    """What the model's body makes of each node (trees, nodes, width)."""
    length = len(batch[0].tokens)
    tokens = np.zeros((len(batch), length), dtype=np.int64)
    for row, tree in enumerate(batch):
        tokens[row, : len(tree.tokens)] = tree.tokens
    body: Any = model.base_model
    given = torch.from_numpy(tokens).to(model.device)
    if all(len(tree.paths) == 1 for tree in batch):  # causal already, and padding stands behind
        return body(given, use_cache=False).last_hidden_state
    depths = np.zeros_like(tokens)
    seen = np.repeat(np.eye(length, dtype=bool)[None], len(batch), axis=0)  # no row of a softmax may be empty
    for row, tree in enumerate(batch):
        depths[row, : len(tree.tokens)] = tree.depths
        seen[row, : len(tree.tokens), : len(tree.tokens)] = tree.mask()
    mask, positions = (torch.from_numpy(array).to(model.device) for array in (seen[:, None], depths))
    return body(given, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel,
    requests: Sequence[Request],
    room: int,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[list], Iterable] = iter,
) -> list[tuple[float, bool]]:
    """Of each answer (its log likelihood, whether each of its tokens is the likeliest).

    room: tokens that run at once.  dtype: of the softmax; None, the logits'.  Raises ValueError for logits that are not finite.
    """
    model(torch.tensor([requests[0].tokens[:1]], device=model.device))  # some formats unpack weights at the first whole forward
    asked: dict[Sequence_, list[int]] = {}
    for index, request in enumerate(requests):
        asked.setdefault(request.tokens, []).append(index)
    found: dict[int, tuple[float, bool]] = {}
    for batch in progress(list(make_batches(make_trees(asked), room))):
        hidden = hidden_states(model, batch)
        wanted, places = [], []
        for row, tree in enumerate(batch):
            for sequence, path in tree.paths.items():
                for index in asked[sequence]:
                    wanted.append(index)
                    places += [row * hidden.shape[1] + node for node in path[-len(requests[index].answer) :]]
        values, greedy = score(model, hidden.flatten(0, 1), places, [requests[index] for index in wanted], dtype)
        for index, value, right in zip(wanted, values, greedy, strict=True):
            found[index] = float(value.sum()), bool(right.all())
    return [found[index] for index in range(len(requests))]


def score(
    model: PreTrainedModel, hidden: Tensor, places: list[int], requests: Sequence[Request], dtype: torch.dtype | None
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """For each request (log likelihoods, whether likeliest) of its answer's tokens, whose hidden states are at `places`."""
    head: Any = model.get_output_embeddings()
    lengths = [len(request.answer) for request in requests]
    at = torch.tensor(places, device=hidden.device)
    targets = torch.tensor([token for request in requests for token in request.answer], device=hidden.device)
    values, greedy = [], []
    step = max(1, LOGITS // head.out_features)
    for start in range(0, len(at), step):
        logits = head(hidden[at[start : start + step]])
        if not is_finite(logits):
            bad = start + int((~logits.isfinite().all(-1)).nonzero()[0])
            tokens = requests[int(np.searchsorted(np.cumsum(lengths), bad, side="right"))].tokens
            reason = first_non_finite(model, torch.tensor([tokens], device=hidden.device))
            raise ValueError(f"the model gave non-finite logits in an lm-eval task; {reason}")
        logp, target = logits.log_softmax(-1, dtype=dtype), targets[start : start + step]
        values.append(logp.gather(1, target[:, None])[:, 0])
        greedy.append(logp.argmax(-1) == target)
    return torch.cat(values).cpu().split(lengths), torch.cat(greedy).cpu().split(lengths)
