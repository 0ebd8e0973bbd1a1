"""Both heads' scores in torch, mixed; and how a bundle keeps its ranking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from registry.bundles import ranking as kept_ranking
from registry.bundles.ranking import Ranking
from streams.errors import SidstreamError
from tests.tiny_shop import ITEMS, Shop, come_again
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.ranking import CatalogueRanker, sid_scores


@pytest.fixture(scope="module")
def model(tiny_shop: Shop) -> GeneratorForCausalLM:
    return tiny_shop.outspoken(seed=3)


HISTORIES = [np.array([3, 4, 5]), np.array([7]), np.array([2, 9, 2, 2, 11, 0]), np.array([], dtype=np.int64)]


def brute(tiny_shop: Shop, model: GeneratorForCausalLM, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of every item by its SID, and by the dense head: said with loops."""
    codes = torch.from_numpy(tiny_shop.catalogue.codes)
    with torch.no_grad():
        padded = codes[history][None] if len(history) else torch.zeros(1, 1, 3, dtype=torch.long)
        state = model.encode(padded, torch.tensor([len(history)]))
        spelled = sid_scores(model, state, torch.zeros(len(codes), dtype=torch.long), codes)
        vectors = model.model.embed_items(codes)
        query = model.model.queries(state)
        logits = (query @ vectors.T)[0]
        for item in set(history.tolist()):
            logits[item] += come_again(model, query[0], history.tolist(), item)
    return spelled.numpy(), logits.log_softmax(-1).numpy()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_order_is_that_of_all_items_scored_by_hand(
    tiny_shop: Shop, model: GeneratorForCausalLM, weight: float
) -> None:
    ranked = CatalogueRanker(model, tiny_shop.catalogue.codes, tiny_shop.sids, ITEMS).candidates(HISTORIES)
    order = ranked.order(weight)
    for row, history in enumerate(HISTORIES):
        spelled, dense = brute(tiny_shop, model, history)
        score = (1 - weight) * spelled + weight * dense
        listed = order[row][order[row] >= 0].numpy()
        assert sorted(listed.tolist()) == list(range(ITEMS))
        assert np.all(np.diff(score[listed]) <= 1e-4)


def test_the_dense_heads_best_are_those_of_all_items_without_a_beam(
    tiny_shop: Shop, model: GeneratorForCausalLM
) -> None:
    ranker = CatalogueRanker(model, tiny_shop.catalogue.codes, tiny_shop.sids, 2)
    best = ranker.best_items(HISTORIES, ranker.states(HISTORIES), 5)
    for row, history in enumerate(HISTORIES):
        _, dense = brute(tiny_shop, model, history)
        assert best[row].tolist() == np.argsort(-dense)[:5].tolist()
    # What the model knows and the catalogue has not is never listed.
    few = CatalogueRanker(model, tiny_shop.catalogue.codes[:9], tiny_shop.sids, 2)
    assert sorted(few.best_items(HISTORIES[:2], few.states(HISTORIES[:2]), 9)[0].tolist()) == list(range(9))


def test_few_candidates_hold_the_best_of_either_head(tiny_shop: Shop, model: GeneratorForCausalLM) -> None:
    ranked = CatalogueRanker(model, tiny_shop.catalogue.codes, tiny_shop.sids, 6).candidates(HISTORIES)
    for row, history in enumerate(HISTORIES):
        spelled, dense = brute(tiny_shop, model, history)
        items = set(ranked.items[row].tolist()) - {-1}
        assert set(np.argsort(-dense)[:6].tolist()) <= items
        assert int(np.argmax(spelled)) in items
        assert len(ranked.items[row][ranked.items[row] >= 0]) == len(items)


def test_a_model_that_knows_no_item_by_itself_is_ranked_by_its_sids(tiny_shop: Shop) -> None:
    bare = tiny_shop.model(seed=1)
    bare.set_items(torch.zeros(0, 3, dtype=torch.long))
    ranked = CatalogueRanker(bare, tiny_shop.catalogue.codes, tiny_shop.sids, ITEMS).candidates(HISTORIES)
    for row, history in enumerate(HISTORIES):
        spelled, _ = brute(tiny_shop, bare, history)
        listed = ranked.order(0.0)[row].numpy()
        assert np.all(np.diff(spelled[listed]) <= 1e-4)


def test_the_order_of_histories_changes_no_score(tiny_shop: Shop, model: GeneratorForCausalLM) -> None:
    ranker = CatalogueRanker(model, tiny_shop.catalogue.codes, tiny_shop.sids, ITEMS)
    ranked, ranked_reversed = ranker.candidates(HISTORIES), ranker.candidates(HISTORIES[::-1])
    for row, history in enumerate(HISTORIES):
        alone = ranker.candidates([history])
        for other in (ranked.score(0.5)[row], ranked_reversed.score(0.5)[len(HISTORIES) - 1 - row]):
            assert other.sort().values.numpy() == pytest.approx(
                alone.score(0.5)[0].sort().values.numpy(), abs=1e-4
            )


def test_a_ranking_is_kept_in_a_bundle_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert kept_ranking.read(tmp_path) == Ranking()
    ranking = Ranking(dense_weight=0.7, repeats="within", within_s=60)
    kept_ranking.write(ranking, tmp_path)
    assert kept_ranking.read(tmp_path) == ranking
    for text in ("{", '{"dense_weight": 2}', '{"repeats": "within"}', '{"repeats": "sometimes"}'):
        (tmp_path / "ranking.json").write_text(text)
        with pytest.raises(SidstreamError, match="ranking"):
            kept_ranking.read(tmp_path)
