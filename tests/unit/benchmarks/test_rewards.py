"""The figures of the benchmark of rewards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import reward_baselines
from benchmarks.rewards import Point, RewardsBenchmark, front_plot, hypervolume, table
from registry.bundles.rewards import Offer
from tests.tiny_sequences import chains
from trainer.evaluation.generator_ranker import TrainingRecipe
from trainer.evaluation.splits import split_by_time

POINTS = st.lists(st.builds(Point, *[st.floats(0, 1)] * 3), max_size=5)


@given(POINTS, st.integers(0, 2**16))
def test_the_hypervolume_is_the_share_of_the_cube_that_some_point_dominates(
    points: list[Point], seed: int
) -> None:
    points_drawn = np.random.default_rng(seed).random((4000, 3))
    is_dominated = np.zeros(len(points_drawn), dtype=bool)
    for point in points:
        is_dominated |= (points_drawn < np.array(point)).all(1)
    # Five standard errors of 4,000 draws.
    assert hypervolume(points) == pytest.approx(is_dominated.mean(), abs=0.04)


def test_what_is_dominated_adds_nothing() -> None:
    assert hypervolume([]) == 0
    assert hypervolume([Point(0.5, 0.5, 0.5)]) == 0.125
    assert hypervolume([Point(0.5, 0.5, 0.5), Point(0.5, 0.4, 0.5)]) == 0.125
    assert hypervolume([Point(1, 0.5, 0.5), Point(0.5, 1, 0.5)]) == 0.375


def test_every_figure_is_made_of_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    # How well the baselines learn is measured in test_reward_baselines.
    monkeypatch.setattr(reward_baselines, "STEPS", 3)
    data = chains()
    assert data.ts is not None
    data.ts[0] += 2000  # a user of whom training has seen nothing
    offers = [Offer("", 1.0 + item, 0.1 if item % 2 else 0.05) for item in range(data.size)]
    shape = {
        "width": 16, "heads": 2, "layers": 1, "epochs": 1, "max_words": 0, "max_seconds": None,
        "text_inputs": False, "rewards": {"min_count": 1, "online": {"requests": 100, "steps": 3}},
    }  # fmt: skip
    recipe = TrainingRecipe(shape, {"levels": 2, "size": 8, "collaborative": 0.5}, 8)
    bench = RewardsBenchmark(split_by_time(replace(data, offers=offers)), recipe, 1, 20, 10)
    figures = list(bench.figures())
    assert bench.without_rewards.rewards is None
    by_figure = {(model, metric): value for _, model, metric, value, _, _ in figures}
    assert len(by_figure) == len(figures) == 23
    hits = [by_figure[name, "HR@10"] for name in bench.models]
    assert by_figure["sidstream-rewards", "HR@10 less that without rewards"] == pytest.approx(
        hits[0] - hits[1]
    )
    assert all(-1 <= value <= 1 for value in by_figure.values())
    # As they are without preferences, and under each of the others by every strength.
    assert [len(points) for points in bench.fronts.values()] == [6, 6, 1 + 5 * 5, 6, 6, 6]
    assert front_plot(bench.fronts).startswith(b"\x89PNG")
    lines = [
        {"model": model, "seed": seed, "metric": metric, "value": value + seed, "low": low,
         "high": high}
        for seed in (0, 2) for _, model, metric, value, low, high in figures
    ]  # fmt: skip
    rows = table(lines)
    assert len(rows) == 2 + 23
    _, model, metric, value, *_ = figures[0]
    assert rows[2].startswith(f"| {model} | {metric} | {value + 1:.4f} | {value:.4f}, {value + 2:.4f} |")
