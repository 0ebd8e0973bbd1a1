"""What held-out pairs say of an aligned model: each pair counts once, by the scores that order answers."""

from __future__ import annotations

import pytest
import torch

from registry.bundles.prompt import BOS
from tests.tiny_shop import Shop, shop, sid_of
from trainer.alignment.held_out_pairs import judge_pairs
from trainer.alignment.rows import PreferenceRow
from trainer.generator.model import GeneratorForCausalLM


def row(tiny: Shop, past: int, chosen: int, *rejected: int) -> PreferenceRow:
    chosen_ids, *rejected_ids = (tiny.prompt.tokens(sid_of(item)) for item in (chosen, *rejected))
    return PreferenceRow(
        prompt_ids=[BOS, *tiny.prompt.tokens(sid_of(past))], chosen_ids=chosen_ids, rejected_ids=rejected_ids
    )


def moved(tiny: Shop, model: GeneratorForCausalLM, item: int) -> GeneratorForCausalLM:
    """The model with another vector of one item: its dense head alone scores that item otherwise."""
    other = tiny.model()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        at = other.model.items.rows(torch.from_numpy(tiny.catalogue.codes[[item]]))
        other.model.items.own[at] += 3.0
    return other


def test_a_model_that_did_not_move_gains_nothing() -> None:
    tiny = shop()
    model = tiny.outspoken()
    rows = [row(tiny, 1, 2, 7), row(tiny, 3, 4, 9, 11)]
    for weight in (0.0, 0.4, 1.0):
        figures = judge_pairs(model, model, rows, 0, weight, 8)
        assert (figures.pairs, figures.accuracy, figures.margin) == (2, 0.0, 0.0)
        assert figures.ordered == figures.ordered_before


def test_a_pair_counts_once_however_many_answers_it_rejects_and_however_pairs_are_batched() -> None:
    tiny = shop()
    before = tiny.outspoken()
    after = moved(tiny, before, 7)
    rows = [row(tiny, 1, 2, 7), row(tiny, 3, 4, 7, 11), row(tiny, 5, 7, 2)]
    alone = [judge_pairs(after, before, [one], 0, 1.0, 1) for one in rows]
    for batch in (1, 2, 3):
        together = judge_pairs(after, before, rows, 0, 1.0, batch)
        for name in ("accuracy", "margin", "ordered", "ordered_before"):
            mean = sum(getattr(figures, name) for figures in alone) / 3
            assert getattr(together, name) == pytest.approx(mean, abs=1e-5)
    # Of the second pair only one of two answers moved.
    assert alone[1].accuracy in (0.0, 0.5)
    assert alone[0].accuracy in (0.0, 1.0)


def test_the_scores_are_mixed_as_they_are_served() -> None:
    tiny = shop()
    before = tiny.outspoken()
    after = moved(tiny, before, 7)
    pair = [row(tiny, 1, 7, 2)]
    spelled, mixed, dense = (judge_pairs(after, before, pair, 0, weight, 4).margin for weight in (0, 0.25, 1))
    # The SID's head does not read an item's own vector.
    assert spelled == 0
    assert dense != 0
    assert mixed == pytest.approx(0.25 * dense, rel=1e-4)
