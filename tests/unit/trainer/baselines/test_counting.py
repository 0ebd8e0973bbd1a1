"""The baselines that only count, against their formulas written out."""

import numpy as np
import pytest

from streams.errors import SidstreamError
from tests.tiny_sequences import chains, sequences
from trainer.baselines.itemknn import DECAY, LAST_ITEMS, ItemKnn
from trainer.baselines.own_past import HALF_LIFE_STEPS, OwnPast
from trainer.baselines.popularity import Popularity
from trainer.baselines.popularity_of_category import PopularityOfCategory
from trainer.evaluation import splits


def quiet(text):
    pass


def fitted(ranker, data):
    split = splits.leave_one_out(data)
    ranker.fit(split, 0, quiet)
    return split, ranker


def scores_by_formula(split, history, forward):
    """Scores (I,) of item-kNN, by its definition and with loops."""
    size = split.dataset.size
    counts = split.train_counts()
    scores = np.zeros(size)
    for back, item in enumerate(history[::-1][:LAST_ITEMS]):
        for other in range(size):
            if other == item:
                continue
            both = 0
            for row in split.train:
                distinct_items = list(dict.fromkeys(row.tolist()))
                if item in distinct_items and other in distinct_items:
                    both += not forward or distinct_items.index(other) > distinct_items.index(item)
            scores[other] += DECAY**back * both / np.sqrt(max(counts[item], 1) * max(counts[other], 1))
    return scores


@pytest.mark.parametrize("forward", [False, True])
def test_item_knn_is_its_formula(forward):
    random = np.random.default_rng(1)
    # No item twice in one history, but in one of them.
    rows = [random.permutation(9)[: random.integers(3, 8)] for _ in range(12)]
    split, ranker = fitted(ItemKnn(forward), sequences(*rows, [0, 1, 0, 2, 3, 4], items=9))
    for history in ([3], [1, 2, 3], [4, 0, 7, 5]):
        scores = scores_by_formula(split, history, forward)
        listed = ranker.rank([np.array(history)], 9, "none")[0]
        assert len(np.unique(scores)) > 3
        assert np.diff(scores[listed]).max() <= 1e-8  # falls along the list


def test_the_newest_item_counts_most():
    rows = [[0, 1, 9, 9], [2, 3, 9, 9]] * 3
    _, ranker = fitted(ItemKnn(), sequences(*rows))
    assert ranker.rank([np.array([0, 2]), np.array([2, 0])], 1, "seen").tolist() == [[3], [1]]


def test_only_forward_pairs_count_where_that_is_asked_for():
    rows = [[0, 1, 9, 9]] * 3 + [[1, 2, 9, 9]] * 2
    _, both = fitted(ItemKnn(), sequences(*rows))
    _, forward = fitted(ItemKnn(forward=True), sequences(*rows))
    assert both.rank([np.array([1])], 1, "seen").tolist() == [[0]]
    assert forward.rank([np.array([1])], 1, "seen").tolist() == [[2]]


def test_popularity_counts_training_and_nothing_else():
    _, ranker = fitted(Popularity(), sequences([2, 2, 1, 5, 5], [2, 1, 5, 5], [0, 5, 5], items=6))
    assert ranker.rank([np.array([0])], 6, "none").tolist() == [[2, 1, 0, 3, 4, 5]]
    assert ranker.rank([np.array([2])], 6, "seen").tolist() == [[1, 0, 3, 4, 5, -1]]


def test_a_users_categories_come_first_and_new_items_stand_at_their_mean():
    #     item 0  1    2    3    4
    kinds = ["a", "a", "b", "b", "b"]
    rows = [[0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 4, 9, 9], [2, 4, 9, 9]]
    data = sequences(*rows, categories=[*kinds, *[""] * 5])
    _, ranker = fitted(PopularityOfCategory(), data)
    # Counts: 0 and 1 three each, 2 six, 4 two; 3 was never seen: the mean of 2 and 4 puts it between them.
    assert ranker.rank([np.array([1, 4, 4])], 5, "none").tolist() == [[2, 3, 4, 0, 1]]
    assert ranker.rank([np.array([0])], 5, "none").tolist() == [[0, 1, 2, 3, 4]]


def test_categories_are_needed_where_they_are_used():
    with pytest.raises(SidstreamError, match="tiny has no categories: leave popularity-of-category out"):
        fitted(PopularityOfCategory(), sequences([1, 2, 3]))


def test_on_a_circle_of_items_only_the_direction_tells_what_is_next():
    split, forward = fitted(ItemKnn(forward=True), chains(users=60))
    listed = forward.rank(split.test.histories, 1, "seen")[:, 0]
    assert (listed == split.test.targets).mean() > 0.9


def test_own_past_is_newest_and_most_often_first_then_popular():
    _, ranker = fitted(OwnPast(), sequences([0, 5, 0, 9, 9], [0, 6, 6, 9, 9], items=10))
    history = np.array([1, 2, 1, 3, 4])
    share = {
        item: sum(2 ** -((4 - at) / HALF_LIFE_STEPS) for at in np.flatnonzero(history == item))
        for item in (1, 2, 3)
    }
    expected = sorted(share, key=lambda item: -share[item])
    assert expected == [1, 3, 2]
    # 4 is what the user has just had; 0 and 6 are the most popular of the others.
    assert ranker.rank([history], 6, "none").tolist() == [[*expected, 4, 0, 6]]
    assert ranker.rank([history, np.array([], dtype=np.int64)], 2, "seen").tolist() == [[0, 6], [0, 6]]
