"""MODPO and Reward Soups pull where their preference says; a soup is the average that it is said to be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import reward_baselines
from benchmarks.reward_baselines import (
    RewardTrainingSet,
    average_soup,
    reward_training_set,
    train_modpo,
    train_soup_parts,
)
from tests.tiny_sequences import chains
from trainer.evaluation.generator_ranker import TrainedGenerator, TrainingRecipe
from trainer.evaluation.splits import split_by_time


@pytest.fixture(scope="module")
def trained() -> TrainedGenerator:
    shape = {
        "width": 16, "heads": 2, "layers": 1, "epochs": 3, "max_words": 0, "max_seconds": None,
        "text_inputs": False,
    }  # fmt: skip
    trained = TrainedGenerator(TrainingRecipe(shape, {"levels": 2, "size": 8, "collaborative": 0.5}, 8))
    trained.fit(split_by_time(replace(chains())), 1, lambda text: None)
    return trained


@pytest.fixture(scope="module")
def training_set(trained: TrainedGenerator) -> RewardTrainingSet:
    random = np.random.default_rng(0)
    size = len(trained.catalogue.codes)
    histories = [random.integers(size, size=random.integers(1, 6)) for _ in range(60)]
    return reward_training_set(trained, histories, random.integers(size, size=60))


def mean_worth(
    trained: TrainedGenerator, model: Any, training_set: RewardTrainingSet, reward_values: np.ndarray
) -> float:
    """Mean reward of the three best items of each history."""
    ranker = type(trained.ranker)(model, trained.catalogue.codes, trained.sid_set, 5)
    best = ranker.best_items(training_set.histories, ranker.states(training_set.histories), 3).numpy()
    return float(reward_values[best].mean())


@pytest.mark.learning
def test_both_bring_more_of_what_is_preferred(
    trained: TrainedGenerator, training_set: RewardTrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_baselines, "LR", 5e-3)
    # Half of the items are worth all, the others nothing: one pulls against another.
    reward_values = (np.arange(len(trained.catalogue.codes)) % 2).astype(float)
    rewards: Any = {"price": reward_values}
    without_preference, with_preference = (
        train_modpo(trained, training_set, rewards, weights, 1) for weights in ({}, {"price": 1.0})
    )
    assert (
        mean_worth(trained, with_preference, training_set, reward_values)
        > mean_worth(trained, without_preference, training_set, reward_values) + 0.015
    )
    parts = train_soup_parts(trained, training_set, rewards, 1)
    plain, mixed = (
        mean_worth(trained, average_soup(parts, w), training_set, reward_values) for w in ({}, {"price": 1.0})
    )
    assert mixed > plain + 0.05


@pytest.mark.learning
def test_with_the_next_item_it_also_learns_what_came_next(
    trained: TrainedGenerator, training_set: RewardTrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_baselines, "LR", 5e-3)
    rewards: Any = {"price": np.linspace(0, 1, len(trained.catalogue.codes))}

    def likely(weight: float) -> float:
        model = train_modpo(trained, training_set, rewards, {"price": 1.0}, 1, weight)
        ranker = type(trained.ranker)(model, trained.catalogue.codes, trained.sid_set, 5)
        return float(
            ranker.scores(
                training_set.histories, ranker.states(training_set.histories), training_set.targets, 1.0
            ).mean()
        )

    assert likely(1.0) > likely(0.0) + 0.5


def test_a_soup_is_the_average_of_its_parts_by_their_shares(
    trained: TrainedGenerator, training_set: RewardTrainingSet
) -> None:
    names = ("", "price", "commission")
    parts = {name: type(trained.model)(trained.model.config) for name in names}
    for at, part in enumerate(parts.values()):
        part.set_items(trained.model.model.items.codes)
        for value in part.parameters():
            torch.nn.init.constant_(value, float(at))
    mixed = average_soup(parts, {"price": 3.0, "commission": 1.0})
    expected = 0.5 * (0.75 * 1 + 0.25 * 2)
    for value in mixed.parameters():
        torch.testing.assert_close(value, torch.full_like(value, expected))
