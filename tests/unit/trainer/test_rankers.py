"""What holds for every model that is evaluated, baseline or product: one check each, run over all of them."""

import numpy as np
import pytest

from tests.tiny_sequences import chains
from trainer.evaluation import splits
from trainer.evaluation.generator_ranker import GeneratorRanker, TrainedGenerator, TrainingRecipe
from trainer.evaluation.ranker import MASKS, UpdatableRanker, top_k
from trainer.rankers import MODELS, Options, checked_names

SPLIT = splits.leave_one_out(chains())
SIZE = SPLIT.dataset.size
SEED = 5
TINY = {
    "width": 16,
    "heads": 2,
    "layers": 1,
    "epochs": 2,
    "max_words": 0,
    "max_seconds": None,
    "refresh_lr": 0.01,
}
HISTORIES = [
    np.array([3, 4, 5]), np.array([], np.int64), np.array([0]), np.arange(12).repeat(8), np.array([SIZE - 1]),
]  # fmt: skip


def quiet(text):
    pass


def fitted(name):
    ranker = MODELS[name](Options(epochs=2))
    ranker.fit(SPLIT, SEED, quiet)
    return ranker


@pytest.fixture(scope="module", params=list(MODELS))
def ranker(request):
    return fitted(request.param)


def test_it_is_known_by_the_name_that_it_is_asked_for(ranker, request):
    assert ranker.name == request.node.callspec.params["ranker"]
    assert ranker.head


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("k", [1, 5, SIZE, SIZE + 7])
def test_lists_have_items_once_and_padding_last(ranker, mask, k):
    lists = ranker.rank(HISTORIES, k, mask)
    assert (lists.shape, lists.dtype) == ((len(HISTORIES), k), np.int64)
    assert lists.min() >= -1
    assert lists.max() < SIZE
    for row in lists.tolist():
        real = [item for item in row if item >= 0]
        assert len(real) == len(set(real))
        assert row == real + [-1] * (k - len(real))


def test_the_mask_leaves_out_the_users_own_items_and_keeps_the_others_order(ranker):
    free, masked = (ranker.rank(HISTORIES, SIZE, mask) for mask in ("none", "seen"))
    for history, all_items, others in zip(HISTORIES, free.tolist(), masked.tolist(), strict=True):
        own = set(history.tolist())
        assert [item for item in all_items if item >= 0 and item not in own] == [
            item for item in others if item >= 0
        ]


def test_an_empty_history_and_an_unseen_item_are_answered(ranker):
    assert (ranker.rank([HISTORIES[1], HISTORIES[4]], 3, "seen") >= 0).all()


def test_no_histories_are_no_lists(ranker):
    assert ranker.rank([], 4, "none").shape == (0, 4)


@pytest.mark.learning
def test_an_answer_does_not_depend_on_the_others_in_its_batch(ranker):
    together = ranker.rank(HISTORIES, 4, "seen")
    alone = np.concatenate([ranker.rank([history], 4, "seen") for history in HISTORIES])
    assert together.tolist() == alone.tolist()


def test_histories_are_left_as_they_were(ranker):
    before = [history.copy() for history in HISTORIES]
    ranker.rank(HISTORIES, 4, "seen")
    assert all((a == b).all() for a, b in zip(before, HISTORIES, strict=True))


@pytest.mark.learning
def test_the_same_seed_gives_the_same_lists(ranker):
    refitted = fitted(ranker.name)
    assert refitted.rank(HISTORIES, 6, "none").tolist() == ranker.rank(HISTORIES, 6, "none").tolist()


def test_a_model_that_no_seed_changes_says_so_truly(ranker):
    if getattr(ranker, "seeded", True):
        pytest.skip(f"{ranker.name} is seeded")
    other = MODELS[ranker.name](Options(epochs=2))
    other.fit(SPLIT, SEED + 1, quiet)
    assert other.rank(HISTORIES, 6, "none").tolist() == ranker.rank(HISTORIES, 6, "none").tolist()


@pytest.mark.learning
def test_what_is_learned_later_equals_what_is_learned_at_once(ranker):
    if not isinstance(ranker, UpdatableRanker):
        pytest.skip(f"{ranker.name} does not learn after fit")
    if getattr(ranker, "seeded", True):
        pytest.skip(f"{ranker.name} is trained: it learns what is new, and not the same")
    data = chains()
    early, late = splits.split_by_time(data, 300, 600), splits.split_by_time(data, 600, 600)
    step, whole = (MODELS[ranker.name](Options(epochs=2)) for _ in range(2))
    step.fit(early, SEED, quiet)
    before = step.rank(HISTORIES, SIZE, "none").tolist()
    shard = splits.shard_between(data, 300, 600)
    step.update(shard)
    whole.fit(late, SEED, quiet)
    assert step.rank(HISTORIES, SIZE, "none").tolist() == whole.rank(HISTORIES, SIZE, "none").tolist()
    assert before != whole.rank(HISTORIES, SIZE, "none").tolist()


@pytest.mark.learning
def test_a_trained_model_learns_a_shard_once_for_all_of_its_heads_and_forgets_it_for_the_next():
    data = chains()
    split, shard = splits.split_by_time(data, 300, 600), splits.shard_between(data, 300, 600)
    trained = TrainedGenerator(TrainingRecipe(TINY, {"levels": 2, "size": 8}, 8))
    first, second = (GeneratorRanker(head, trained, head) for head in ("dense", "beam"))
    first.fit(split, SEED, quiet)
    before = {head.name: head.rank(HISTORIES, SIZE, "none").tolist() for head in (first, second)}
    first.update(shard)
    learned, model = first.rank(HISTORIES, SIZE, "none").tolist(), trained.model
    assert learned != before["dense"]
    # The other head begins where the first began, and comes to where it came without a training.
    second.fit(split, SEED, quiet)
    assert second.rank(HISTORIES, SIZE, "none").tolist() == before["beam"]
    second.update(shard)
    assert trained.model is model
    assert first.rank(HISTORIES, SIZE, "none").tolist() == learned


def test_the_best_scores_are_listed_in_their_order():
    scores = np.array([[0.1, 0.9, 0.5, -np.inf], [3, 2, 1, 0]])
    assert top_k(scores.copy(), 3).tolist() == [[1, 2, 0], [0, 1, 2]]
    assert top_k(scores.copy(), 5, [np.array([1, 1]), np.array([], np.int64)]).tolist() == [
        [2, 0, -1, -1, -1],
        [0, 1, 2, 3, -1],
    ]


def test_names_are_taken_once_and_wrong_ones_are_refused():
    assert checked_names(["itemknn", "popularity", "itemknn"]) == ["itemknn", "popularity"]
    with pytest.raises(Exception, match="no model 'nobody': give one or more of popularity"):
        checked_names(["nobody"])
