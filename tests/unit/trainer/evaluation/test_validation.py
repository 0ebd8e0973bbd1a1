"""Validation: true ages and purchases, the same targets for every model, and a figure under the best rule."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.bundles.ranking import excluded_by_repeats
from tests.tiny_sequences import chains, sequences
from trainer.evaluation import splits
from trainer.evaluation.generator_ranker import TrainedGenerator, TrainingRecipe
from trainer.evaluation.validation import best_rule_ndcg, validation_targets, validation_users
from trainer.offline_checks.served_lists import REPEAT_RULES
from trainer.sequences.held_out import HeldOut

DAY = 86_400_000
TINY = {"width": 16, "heads": 2, "layers": 1, "epochs": 1, "max_words": 0, "max_seconds": None}
CODEBOOK = {"levels": 2, "size": 8}


def quiet(text):
    pass


def days_split():
    """One user who buys the first item a day late, the second one after the target only."""
    data = sequences(
        [0, 1, 2, 3], [4, 5], ts=[[0, DAY, 3 * DAY, 10 * DAY], [0, DAY]],
        bought_ts=[[DAY, 5 * DAY, -1, -1], [-1, -1]],
    )  # fmt: skip
    return splits.split_by_time(data, 2 * DAY, 9 * DAY)


def test_validation_knows_how_old_the_past_is_and_what_of_it_was_bought():
    targets = validation_targets(days_split(), 10, 0, max_items=50)
    assert [row.tolist() for row in targets.histories] == [[0, 1]]
    assert targets.targets.tolist() == [2]
    assert [row.tolist() for row in targets.ages_s] == [[3 * 86_400, 2 * 86_400]]
    # The second item is bought after the target: nobody knows that yet.
    assert [row.tolist() for row in targets.bought] == [[True, False]]
    newest = validation_targets(days_split(), 10, 0, max_items=1)
    assert [row.tolist() for row in (*newest.histories, *newest.ages_s, *newest.bought)] == [
        [1], [2 * 86_400], [False],
    ]  # fmt: skip


def test_a_generator_stops_by_the_ages_and_purchases_of_validation():
    trained = TrainedGenerator(TrainingRecipe(TINY, CODEBOOK, 8))
    trained.fit(days_split(), 3, quiet)
    assert trained.held_out.ages_s[0].tolist() == [3 * 86_400, 2 * 86_400]
    assert trained.held_out.bought[0].tolist() == [True, False]


@pytest.mark.parametrize("seed", [1, 2])
def test_every_model_stops_by_the_same_targets(seed):
    split = splits.leave_one_out(chains(users=60))
    trained = TrainedGenerator(TrainingRecipe(TINY | {"validation_users": 20}, CODEBOOK, 8))
    trained.fit(split, seed, quiet)
    targets = validation_targets(split, 20, seed, trained.settings.max_items)
    assert trained.held_out.targets.tolist() == targets.targets.tolist()
    users = validation_users(split, 20, seed)
    assert [split.dataset.items[user][-2] for user in users] == targets.targets.tolist()


def ndcg_by_hand(scores, targets, rule, k):
    gains = []
    for row, target in enumerate(targets.targets):
        excluded = excluded_by_repeats(rule, targets.bought[row], targets.ages_s[row])
        left_out = set(targets.histories[row][excluded].tolist())
        order = [item for item in np.argsort(-scores[row]).tolist() if item not in left_out]
        gains.append(1 / np.log2(order.index(target) + 2) if target in order[:k] else 0.0)
    return np.mean(gains)


@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_the_figure_is_that_of_the_lists_under_the_best_rule(seed, rows, k):
    random, items = np.random.default_rng(seed), 12
    lengths = random.integers(1, 7, rows)
    targets = HeldOut(
        [random.integers(0, items, length) for length in lengths], random.integers(0, items, rows),
        [random.integers(0, 40 * 86_400, length) for length in lengths],
        [random.random(length) < 0.3 for length in lengths],
    )  # fmt: skip
    scores = random.permuted(np.tile(np.arange(items, dtype=np.float32), (rows, 1)), axis=1)
    row_of = {history.tobytes(): row for row, history in enumerate(targets.histories)}
    distinct = len(row_of) == rows

    def score(histories):
        return torch.from_numpy(scores[[row_of[history.tobytes()] for history in histories]])

    if distinct:
        expected = max(ndcg_by_hand(scores, targets, rule, k) for rule in REPEAT_RULES)
        assert best_rule_ndcg(score, targets, k) == pytest.approx(expected)


def test_an_opponent_that_repeats_the_past_is_stopped_by_the_figure_without_it():
    # What comes next never repeats here.
    split = splits.leave_one_out(chains(users=40, items=30, length=8))
    targets = validation_targets(split, 3000, 1, 50)

    def own_past_first(histories):
        scores = torch.arange(split.dataset.size).repeat(len(histories), 1).float()
        for row, history in enumerate(histories):
            scores[row, history] += 1000
        return scores

    hidden = best_rule_ndcg(own_past_first, targets)
    by_row = torch.arange(split.dataset.size).float()
    assert hidden == pytest.approx(best_rule_ndcg(lambda rows: by_row.repeat(len(rows), 1), targets))
    assert hidden > 0


def test_without_targets_the_figure_is_zero():
    empty = HeldOut([], np.zeros(0, np.int64), [], [])
    assert best_rule_ndcg(lambda rows: torch.zeros(0, 4), empty) == 0.0
