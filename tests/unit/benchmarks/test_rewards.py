"""The figures of the benchmark of rewards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.rewards import Bench, Point, hypervolume, picture, table
from registry.bundles.rewards import Offer
from tests.tiny_sequences import chains
from trainer.evaluation.generator_ranker import TrainingRecipe
from trainer.evaluation.splits import split_by_time

POINTS = st.lists(st.builds(Point, *[st.floats(0, 1)] * 3), max_size=5)


@given(POINTS, st.integers(0, 2**16))
def test_the_hypervolume_is_the_share_of_the_cube_that_some_point_dominates(
    points: list[Point], seed: int
) -> None:
    thrown = np.random.default_rng(seed).random((4000, 3))
    under = np.zeros(len(thrown), dtype=bool)
    for point in points:
        under |= (thrown < np.array(point)).all(1)
    # Five standard errors of 4,000 draws.
    assert hypervolume(points) == pytest.approx(under.mean(), abs=0.04)


def test_what_is_dominated_adds_nothing() -> None:
    assert hypervolume([]) == 0
    assert hypervolume([Point(0.5, 0.5, 0.5)]) == 0.125
    assert hypervolume([Point(0.5, 0.5, 0.5), Point(0.5, 0.4, 0.5)]) == 0.125
    assert hypervolume([Point(1, 0.5, 0.5), Point(0.5, 1, 0.5)]) == 0.375


def test_every_figure_is_made_of_both_models() -> None:
    data = chains()
    assert data.ts is not None
    data.ts[0] += 2000  # a user of whom training has seen nothing
    offers = [Offer("", 1.0 + item, 0.1 if item % 2 else 0.05) for item in range(data.size)]
    shape = {
        "width": 16, "heads": 2, "layers": 1, "epochs": 1, "max_words": 0, "max_seconds": None,
        "text_inputs": False, "rewards": {"min_count": 1},
    }  # fmt: skip
    recipe = TrainingRecipe(shape, {"levels": 2, "size": 8, "collaborative": 0.5}, 8)
    bench = Bench(split_by_time(replace(data, offers=offers)), recipe, 1, 20, 10)
    made = list(bench.figures())
    assert bench.without.rewards is None
    found = {(model, metric): value for _, model, metric, value, _, _ in made}
    assert len(found) == len(made) == 23
    hits = [found[name, "HR@10"] for name in bench.models]
    assert found["sidstream-rewards", "HR@10 less that without rewards"] == pytest.approx(hits[0] - hits[1])
    assert all(-1 <= value <= 1 for value in found.values())
    # As they are without preferences, and under each of the others by every strength.
    assert [len(points) for points in bench.fronts.values()] == [6, 6, 1 + 5 * 5, 6, 6, 6]
    assert picture(bench.fronts).startswith(b"\x89PNG")
    lines = [
        {"model": model, "seed": seed, "metric": metric, "value": value + seed, "low": low,
         "high": high}
        for seed in (0, 2) for _, model, metric, value, low, high in made
    ]  # fmt: skip
    rows = table(lines)
    assert len(rows) == 2 + 23
    _, model, metric, value, *_ = made[0]
    assert rows[2].startswith(f"| {model} | {metric} | {value + 1:.4f} | {value:.4f}, {value + 2:.4f} |")
