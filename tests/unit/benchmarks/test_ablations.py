"""The table of ablations, and what several tokenisations say together."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.ablations import ROWS, table
from benchmarks.ensembles import Ensemble, distil
from registry.settings import CodebookSettings
from tests.tiny_sequences import chains
from trainer.evaluation import splits
from trainer.evaluation.generator_ranker import TrainedGenerator, TrainingRecipe, tuned_recipe
from trainer.evaluation.ranker import Mask
from trainer.settings import TrainerSettings

SPLIT = splits.leave_one_out(chains())
HISTORIES = [np.array([3, 4, 5]), np.array([0]), np.arange(12)]


def quiet(text: str) -> None:
    pass


def small(levels: int) -> TrainingRecipe:
    shape = {"width": 16, "heads": 2, "layers": 1, "epochs": 1, "max_words": 0, "max_seconds": None}
    return TrainingRecipe(shape, {"levels": levels, "size": 8, "collaborative": 0.5}, 8)


@pytest.fixture(scope="module")
def members() -> list[TrainedGenerator]:
    trained = [TrainedGenerator(small(levels)) for levels in (2, 3)]
    for row_line in trained:
        row_line.fit(SPLIT, 1, quiet)
    return trained


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_settings_that_exist(row: str) -> None:
    plain, (_, trainer, codebook) = tuned_recipe(), ROWS[row]
    TrainerSettings.model_validate(plain.trainer | trainer)
    CodebookSettings.model_validate(plain.codebook | codebook)


def test_the_table_has_a_line_a_row_and_leaves_open_what_was_not_measured() -> None:
    def row_line(row: str, metric: str, value: float, words: str = "as it is") -> dict[str, object]:
        claim = f"ablation {row}: {words}"
        return {"claim": claim, "model": f"sidstream-{row}", "metric": metric, "mask": "seen", "value": value}

    trained = table([
        row_line("base", "validation HR@10, dense", 0.1), row_line("base", "validation NDCG@10, dense", 0.05),
        row_line("weights", "validation NDCG@10, mixed", 0.04, "weight 0.5 of the dense head"),
    ])  # fmt: skip
    assert trained[2] == "| as it is | 0.1000 / 0.0500 |  |  |  |  |"
    assert trained[-3:] == ["| 0.5 |", "|---|", "| 0.0400 |"]


@pytest.mark.parametrize("mask", ["none", "seen"])
def test_an_ensemble_of_one_ranks_as_its_member_does(members: list[TrainedGenerator], mask: Mask) -> None:
    for member in members:
        alone = Ensemble([member])
        assert alone.rank(HISTORIES, 5, mask, "dense").tolist() == (
            member.rank(HISTORIES, 5, mask, "dense").tolist()
        )
        assert alone.rank(HISTORIES, 3, mask, "beam").tolist() == (
            member.rank(HISTORIES, 3, mask, "beam").tolist()
        )


def test_an_ensemble_has_no_order_of_its_members(members: list[TrainedGenerator]) -> None:
    for head in ("dense", "beam"):
        forward, backward = Ensemble(members), Ensemble(members[::-1])
        assert (
            forward.rank(HISTORIES, 5, "seen", head).tolist()
            == backward.rank(HISTORIES, 5, "seen", head).tolist()
        )


def test_a_model_learns_from_an_ensemble_what_it_would_not_alone(members: list[TrainedGenerator]) -> None:
    ensemble = Ensemble(members)
    alone = TrainedGenerator(small(2))
    alone.fit(SPLIT, 2, quiet)
    student = distil(ensemble, small(2), SPLIT, 2, quiet)
    assert not np.array_equal(
        student.model.model.items.own.detach().numpy(), alone.model.model.items.own.detach().numpy()
    )
    assert student.rank(HISTORIES, 5, "seen", "dense").min() >= -1
