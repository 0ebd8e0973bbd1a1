"""MODPO and Reward Soups pull where their preference says; a soup is the average that it is said to be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import reward_baselines
from benchmarks.reward_baselines import Lesson, lesson, modpo, soup, soup_parts
from tests.tiny_sequences import chains
from trainer.evaluation.generator_ranker import TrainedGenerator, TrainingRecipe
from trainer.evaluation.splits import split_by_time


@pytest.fixture(scope="module")
def made() -> TrainedGenerator:
    shape = {
        "width": 16, "heads": 2, "layers": 1, "epochs": 3, "max_words": 0, "max_seconds": None,
        "text_inputs": False,
    }  # fmt: skip
    trained = TrainedGenerator(TrainingRecipe(shape, {"levels": 2, "size": 8, "collaborative": 0.5}, 8))
    trained.fit(split_by_time(replace(chains())), 1, lambda text: None)
    return trained


@pytest.fixture(scope="module")
def seen(made: TrainedGenerator) -> Lesson:
    random = np.random.default_rng(0)
    size = len(made.catalogue.codes)
    histories = [random.integers(size, size=random.integers(1, 6)) for _ in range(60)]
    return lesson(made, histories, random.integers(size, size=60))


def mean_worth(made: TrainedGenerator, model: Any, seen: Lesson, worth: np.ndarray) -> float:
    """Mean reward of the three best items of each history."""
    other = type(made.ranker)(model, made.catalogue.codes, made.sid_set, 5)
    best = other.best_items(seen.histories, other.states(seen.histories), 3).numpy()
    return float(worth[best].mean())


@pytest.mark.learning
def test_both_bring_more_of_what_is_preferred(
    made: TrainedGenerator, seen: Lesson, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_baselines, "LR", 5e-3)
    # Half of the items are worth all, the others nothing: one pulls against another.
    worth = (np.arange(len(made.catalogue.codes)) % 2).astype(float)
    rewards: Any = {"price": worth}
    none, asked = (modpo(made, seen, rewards, weights, 1) for weights in ({}, {"price": 1.0}))
    assert mean_worth(made, asked, seen, worth) > mean_worth(made, none, seen, worth) + 0.015
    parts = soup_parts(made, seen, rewards, 1)
    plain, mixed = (mean_worth(made, soup(parts, w), seen, worth) for w in ({}, {"price": 1.0}))
    assert mixed > plain + 0.05


@pytest.mark.learning
def test_with_the_next_item_it_also_learns_what_came_next(
    made: TrainedGenerator, seen: Lesson, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_baselines, "LR", 5e-3)
    rewards: Any = {"price": np.linspace(0, 1, len(made.catalogue.codes))}

    def likely(weight: float) -> float:
        model = modpo(made, seen, rewards, {"price": 1.0}, 1, weight)
        other = type(made.ranker)(model, made.catalogue.codes, made.sid_set, 5)
        return float(other.scores(seen.histories, other.states(seen.histories), seen.targets, 1.0).mean())

    assert likely(1.0) > likely(0.0) + 0.5


def test_a_soup_is_the_average_of_its_parts_by_their_shares(made: TrainedGenerator, seen: Lesson) -> None:
    names = ("", "price", "commission")
    parts = {name: type(made.model)(made.model.config) for name in names}
    for at, part in enumerate(parts.values()):
        part.set_items(made.model.model.items.codes)
        for value in part.parameters():
            torch.nn.init.constant_(value, float(at))
    mixed = soup(parts, {"price": 3.0, "commission": 1.0})
    wanted = 0.5 * (0.75 * 1 + 0.25 * 2)
    for value in mixed.parameters():
        torch.testing.assert_close(value, torch.full_like(value, wanted))
