"""ptq.eval.scoring: sequences that begin alike run once, with the numbers each has by itself."""

import pytest
import torch

from ptq.eval.scoring import FOLLOW_THE_MASK, FULL, Request, can_share, log_likelihoods, make_batches, make_trees

from .tiny import tiny_model


def requests() -> list[Request]:
    """Questions with answers of several lengths, one of them the beginning of another, one question asked alone, and twins."""
    random = torch.Generator().manual_seed(5)
    draw = lambda n: tuple(torch.randint(2, 28, (n,), generator=random).tolist())  # noqa: E731
    made = []
    for length in (3, 9, 9, 30):
        question, answer = draw(length), draw(6)
        for text in (answer, answer[:4], draw(1), draw(1), draw(12)):
            made.append(Request((question + text)[:-1], text))
    alone = draw(40)
    return [*made, Request(alone[:-1], alone[1:]), Request(alone[:-1], alone[-2:]), made[0]]


def test_every_path_spells_its_sequence_and_what_is_common_is_there_once():
    sequences = [request.tokens for request in requests()]
    trees = make_trees(sequences)
    for tree in trees:
        for sequence, path in tree.paths.items():
            assert tuple(tree.tokens[node] for node in path) == sequence
            assert [tree.depths[node] for node in path] == list(range(len(sequence)))
            seen = tree.mask()[path[-1]]
            assert seen.nonzero()[0].tolist() == sorted(path)
    assert sorted(sequence for tree in trees for sequence in tree.paths) == sorted(set(sequences))
    assert sum(len(tree.tokens) for tree in trees) < 0.6 * sum(map(len, set(sequences)))


def test_batches_hold_every_tree_once_within_their_room_and_with_little_padding():
    trees = make_trees(request.tokens for request in requests())
    batches = list(make_batches(trees, 100))
    assert sorted(map(id, trees)) == sorted(id(tree) for batch in batches for tree in batch)
    for batch in batches:
        sizes = [len(tree.tokens) for tree in batch]
        assert len(batch) == 1 or sizes[0] * len(batch) <= 100
        assert sizes == sorted(sizes, reverse=True) and sizes[-1] >= FULL * sizes[0]


@pytest.mark.parametrize("family", FOLLOW_THE_MASK)
@pytest.mark.parametrize("room", [1, 64, 10_000])
def test_equals_each_sequence_by_itself(family, room):
    """float32 sums of 64 terms in another order: a few ulp of logits below 8, so 1e-5 of a log likelihood's sum over 40 tokens."""
    model = tiny_model(family, sliding_window=None)
    asked = requests()
    found = log_likelihoods(model, asked, room)
    for request, (value, greedy) in zip(asked, found, strict=True):
        with torch.no_grad():
            logp = model(torch.tensor([request.tokens])).logits[0].double().log_softmax(-1)[-len(request.answer) :]
        answer = torch.tensor(request.answer)
        assert value == pytest.approx(float(logp.gather(1, answer[:, None]).sum()), rel=1e-5)
        assert greedy == bool((logp.argmax(-1) == answer).all())


def test_a_model_of_another_kind_or_beyond_its_sliding_window_does_not_share():
    assert can_share(tiny_model(), 10_000)
    sliding = tiny_model("mistral", sliding_window=32)
    assert can_share(sliding, 32) and not can_share(sliding, 33)
    assert not can_share(tiny_model("gpt_neox", num_key_value_heads=None), 8)
