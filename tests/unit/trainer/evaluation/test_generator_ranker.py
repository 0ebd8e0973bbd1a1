"""The generator in a table: lists of the very histories that are asked about, made as in service."""

import time

import numpy as np
import pytest

from tests.tiny_sequences import chains
from trainer.evaluation import splits
from trainer.evaluation.generator_ranker import GeneratorRanker, TrainedGenerator, TrainingRecipe

SPLIT = splits.leave_one_out(chains(users=60))
TINY = {"width": 16, "heads": 2, "layers": 1, "epochs": 1, "max_words": 0, "max_seconds": None}
CODEBOOK = {"levels": 2, "size": 8}


def quiet(text):
    pass


@pytest.fixture(scope="module")
def trained():
    generator = TrainedGenerator(TrainingRecipe(TINY, CODEBOOK, 8))
    generator.fit(SPLIT, 3, quiet)
    return generator


@pytest.mark.parametrize("head", ["beam", "reordered", "mixed"])
def test_histories_that_end_alike_have_lists_of_their_own(trained, head):
    # As long as one another and with the same last item: what came before decides.
    first = [np.array([1, 2, 3]), np.array([4, 5, 6])]
    second = [np.array([9, 10, 3]), np.array([0, 12, 6])]
    lists = {}
    for histories in (first, second):
        trained.rank_with(trained.model)
        lists[id(histories)] = trained.rank(histories, 5, "seen", head)
    trained.rank_with(trained.model)
    trained.rank(first, 5, "seen", head)
    assert trained.rank(second, 5, "seen", head).tolist() == lists[id(second)].tolist()
    # The same two in other places: rows of one length must not be mistaken for another cut of the same items.
    regrouped = [np.array([1, 2, 3, 4]), np.array([5, 6])]
    trained.rank_with(trained.model)
    expected = trained.rank(regrouped, 5, "seen", head)
    trained.rank_with(trained.model)
    trained.rank(first, 5, "seen", head)
    assert trained.rank(regrouped, 5, "seen", head).tolist() == expected.tolist()


@pytest.mark.parametrize("mask", ["none", "seen"])
def test_a_mixed_list_has_the_weight_that_validation_chose_under_its_mask(trained, mask):
    histories = SPLIT.test.histories[:20]
    weight = trained.dense_weight_under(mask)
    expected = trained.rank_mixed(histories, 5, mask, weight)
    assert trained.rank(histories, 5, mask, "mixed").tolist() == expected.tolist()


def test_a_list_as_it_is_served_costs_a_beam_search_and_the_dense_head_alone_none(trained, monkeypatch):
    levels, step = [], trained.model.step

    def counted_step(level, *rest):
        levels.append(level)
        return step(level, *rest)

    monkeypatch.setattr(trained.model, "step", counted_step)
    monkeypatch.setattr(trained, "dense_weight_under", lambda mask: 1.0)
    trained.rank_with(trained.model)
    histories = SPLIT.test.histories[:4]
    dense = GeneratorRanker("dense", trained, "dense").rank(histories, 3, "none")
    assert not levels
    mixed = GeneratorRanker("mixed", trained, "mixed").rank(histories, 3, "none")
    assert set(levels) == {0, 1}
    # At weight 1 both are the dense head's own order: only the cost differs.
    assert mixed.tolist() == dense.tolist()


def test_the_weight_of_the_heads_is_fitted_before_the_first_answer(monkeypatch):
    ranker = GeneratorRanker("mixed", TrainedGenerator(TrainingRecipe(TINY, CODEBOOK, 8)), "mixed")
    ranker.fit(SPLIT, 2, quiet)
    # What fits it is gone: an answer whose time is taken has nothing left to fit.
    monkeypatch.setattr("trainer.evaluation.generator_ranker.ServedLists", None)
    assert ranker.rank(SPLIT.test.histories[:3], 4, "seen").shape == (3, 4)


def test_a_budget_on_the_processor_ends_the_training_and_the_codebook_is_in_its_cost():
    generator = TrainedGenerator(TrainingRecipe(TINY | {"epochs": 500, "patience": 500}, CODEBOOK, 8, 0.5))
    began = time.process_time()
    generator.fit(SPLIT, 1, quiet)
    assert generator.result.stopped == "time budget spent"
    assert generator.result.epochs < 500
    assert 0 < generator.trained_s <= time.process_time() - began
    assert 0.5 <= generator.result.seconds < generator.trained_s
