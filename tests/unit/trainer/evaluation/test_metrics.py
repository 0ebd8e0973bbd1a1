"""The metrics, against an independent library and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trainer.evaluation import metrics
from trainer.evaluation.sequences import sid_groups


def lists_of(count, items, seed, length=metrics.LONGEST_LIST):
    random = np.random.default_rng(seed)
    lists = np.stack([random.permutation(items)[:length] for _ in range(count)])
    return lists, random.integers(0, items, count)


def test_the_metrics_are_those_of_ranx():
    import ranx  # it compiles as it is imported: seconds that other tests need not wait

    lists, targets = lists_of(50, 40, 1)
    relevant = ranx.Qrels({f"q{n}": {f"i{target}": 1} for n, target in enumerate(targets)})
    ranked = ranx.Run(
        {
            f"q{n}": {f"i{item}": float(len(row) - place) for place, item in enumerate(row)}
            for n, row in enumerate(lists)
        }
    )
    ours = metrics.accuracy(metrics.target_ranks(lists, targets))
    assert 0.2 < ours["HR@20"].mean() < 0.8
    for cut in metrics.CUTOFFS:
        theirs = ranx.evaluate(relevant, ranked, [f"recall@{cut}", f"ndcg@{cut}", f"mrr@{cut}"])
        for name, value in zip(("HR", "NDCG", "MRR"), theirs.values(), strict=True):
            assert ours[f"{name}@{cut}"].mean() == pytest.approx(value, abs=1e-9), (name, cut)


def test_a_hit_at_the_third_place_by_hand():
    ranks = metrics.target_ranks(np.array([[7, 3, 5, -1]]), np.array([5]))
    assert ranks.tolist() == [2]
    measured = metrics.accuracy(ranks)
    assert [measured[f"HR@{cut}"][0] for cut in metrics.CUTOFFS] == [0, 1, 1, 1]
    assert measured["NDCG@5"][0] == 0.5
    assert measured["MRR@5"][0] == pytest.approx(1 / 3)


def test_the_padding_of_a_short_list_is_no_hit_not_even_by_sid():
    lists = np.array([[2, -1, -1]])
    # A careless look-up of -1 would be the last item, which has the target's SID.
    groups = sid_groups(np.array([[1, 1], [0, 0], [0, 1], [1, 1]]))
    assert metrics.target_ranks(lists, np.array([0]), groups).tolist() == [-1]
    assert metrics.coverage(lists, 4) == 0.25


def test_an_item_that_shares_the_targets_sid_is_a_hit_by_sid_only():
    groups = sid_groups(np.array([[1, 2], [1, 2], [1, 3]]))
    lists, targets = np.array([[2, 1]]), np.array([0])
    assert metrics.target_ranks(lists, targets).tolist() == [-1]
    assert metrics.target_ranks(lists, targets, groups).tolist() == [1]


@given(st.integers(0, 1000), st.integers(1, 3))
def test_counting_by_sid_never_finds_less_than_by_item(seed, codes):
    lists, targets = lists_of(20, 30, seed)
    groups = sid_groups(np.random.default_rng(seed).integers(0, codes, (30, 3)))
    by_item = metrics.accuracy(metrics.target_ranks(lists, targets))
    by_sid = metrics.accuracy(metrics.target_ranks(lists, targets, groups))
    assert all((by_sid[name] >= by_item[name]).all() for name in by_item)
    alone = metrics.accuracy(metrics.target_ranks(lists, targets, np.arange(30)))
    assert all((alone[name] == by_item[name]).all() for name in by_item)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_category_entropy_is_that_of_the_categories_shares(categories):
    listed = np.arange(min(10, len(categories)))[None]
    counts = np.unique(np.array(categories[:10]), return_counts=True)[1]
    result = metrics.category_entropy(listed, categories)
    assert result[0] == pytest.approx(stats.entropy(counts, base=2), abs=1e-9)
    assert metrics.category_entropy(np.full((1, 10), -1), categories)[0] == 0


def test_coverage_counts_items_of_the_first_ten_places_once():
    lists = np.array([list(range(20)), [*range(5), *range(30, 45)]])
    assert metrics.coverage(lists, 100) == 0.15
