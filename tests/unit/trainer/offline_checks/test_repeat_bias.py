"""What the past weighs is learned, and fitted again on events that were not trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tiny_shop import ITEMS, Shop, shop
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.ranking import CatalogueRanker
from trainer.offline_checks.repeat_bias import STRENGTHS, fit_repeat_strength
from trainer.sequences.held_out import HeldOut
from trainer.tuning.next_item import sequence_loss
from trainer.tuning.sft import train


def held_out_events(targets: np.ndarray, histories: list[np.ndarray]) -> HeldOut:
    none = [np.zeros(len(row), dtype=np.int64) for row in histories]
    return HeldOut(histories, targets, none, [row.astype(bool) for row in none])


def fitted(tiny_shop: Shop, model: GeneratorForCausalLM, held_out: HeldOut) -> float:
    return fit_repeat_strength(model, held_out, tiny_shop.catalogue, tiny_shop.sids)


def liking(tiny_shop: Shop) -> GeneratorForCausalLM:
    """A generator that adds something to all items of the past, and too little of it."""
    model = tiny_shop.outspoken(seed=3)
    codes = torch.from_numpy(tiny_shop.catalogue.codes)[None, :1]
    with torch.no_grad():
        base = model.model
        base.items.repeat_vectors[:] = 0.05 * base.queries(model.encode(codes, torch.tensor([1])))[0]
    return model


def histories(rng: np.random.Generator, rows: int = 400) -> list[np.ndarray]:
    return [rng.permutation(ITEMS)[:6] for _ in range(rows)]


def test_where_people_come_back_more_than_was_learned_the_past_weighs_more(tiny_shop: Shop) -> None:
    pasts = histories(np.random.default_rng(0))
    model = liking(tiny_shop)
    ranker = CatalogueRanker(model, tiny_shop.catalogue.codes, tiny_shop.sids, 10)
    before = model.model.items.repeat_vectors.clone()
    # Only of those whose past is liked at all: the direction is one state's.
    query = model.model.queries(ranker.states(pasts))
    back = [row for row, bias in zip(pasts, (query @ before[0]).tolist(), strict=True) if bias > 0]
    factor = fitted(tiny_shop, model, held_out_events(np.array([row[2] for row in back]), back))
    assert factor == max(STRENGTHS)
    assert torch.equal(model.model.items.repeat_vectors, before)
    assert float(model.model.items.repeat_strength) == pytest.approx(factor)
    # Too few tell nothing.
    assert (
        fitted(tiny_shop, model, held_out_events(np.array([row[2] for row in back[:99]]), back[:99])) == 1.0
    )
    # Fitted anew, not on top.
    assert fitted(tiny_shop, model, held_out_events(np.array([row[2] for row in back]), back)) == factor


def test_what_chance_alone_would_show_changes_nothing(tiny_shop: Shop) -> None:
    rng = np.random.default_rng(1)
    model = tiny_shop.outspoken(seed=3)
    factors = [
        fitted(tiny_shop, model, held_out_events(rng.integers(ITEMS, size=100), histories(rng, 100)))
        for _ in range(10)
    ]
    assert factors.count(1.0) >= 7
    assert fitted(tiny_shop, model, held_out_events(np.zeros(0, dtype=np.int64), [])) == 1.0
    assert float(model.model.items.repeat_strength) == 1.0


@pytest.mark.learning
def test_users_who_come_back_teach_that_items_come_back() -> None:
    """Forty users who go to and fro between two items: what comes next is the one before the last."""
    tiny_shop = shop(length=16, back=True, epochs=30, patience=30, lr=3e-3)
    model = tiny_shop.model(seed=1)
    train(model, tiny_shop.rows, tiny_shop.sids, tiny_shop.settings)
    strange = [np.array([3, 14, 3, 14]), np.array([20, 5, 20, 5]), np.array([10, 8, 10, 8])]
    ranker = CatalogueRanker(model, tiny_shop.catalogue.codes, tiny_shop.sids, 10)
    best = ranker.best_items(strange, ranker.states(strange), 1)[:, 0]
    assert best.tolist() == [3, 20, 10]


def test_what_is_ranked_has_the_strength_and_what_is_learned_has_not(tiny_shop: Shop) -> None:
    model = tiny_shop.outspoken(seed=3)
    pieces = tiny_shop.rows.sequence_batches(0)[0]
    table = model.model.items.rows(torch.from_numpy(tiny_shop.catalogue.codes))
    history, targets = [np.array([3, 14, 3, 5])], np.array([14])
    figures = []
    for strength in (1.0, 3.0):
        with torch.no_grad():
            model.model.items.repeat_strength.fill_(strength)
            ranker = CatalogueRanker(model, tiny_shop.catalogue.codes, tiny_shop.sids, ITEMS)
            ranked = ranker.scores(history, ranker.states(history), targets, 1.0)
            figures.append(
                (float(ranked), float(sequence_loss(model, pieces, table, tiny_shop.settings.weights)))
            )
    (before, loss), (after, same) = figures
    assert before != after
    assert loss == same
