"""Both heads' scores, mixed; past items by the rule; weight and rule fitted on held-out events."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from registry.bundles import ranking as kept_ranking
from registry.bundles.ranking import Ranking, RepeatRule, excluded_by_repeats
from streams.errors import SidstreamError
from tests.tiny_shop import ITEMS, Shop, come_again
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.ranking import (
    REPEAT_RULES,
    Candidates,
    CatalogueRanker,
    candidate_history,
    fit_ranking,
    sid_scores,
    target_ranks,
)
from trainer.sequences.held_out import HeldOut, held_out_rows


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
    held_out = held_out_rows(tiny_shop.log, [5, 20], 8)
    assert (
        fit_ranking(
            CatalogueRanker(bare, tiny_shop.catalogue.codes, tiny_shop.sids, ITEMS).candidates(
                held_out.histories
            ),
            held_out,
        ).dense_weight
        == 0
    )


def candidates(items: list[list[int]], sid: list[list[float]], dense: list[list[float]]) -> Candidates:
    return Candidates(torch.tensor(items), torch.tensor(sid), torch.tensor(dense))


def entries(*each: tuple[int, int, bool]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    items, ages, bought = zip(*each, strict=True)
    return np.array(items), np.array(ages), np.array(bought)


def test_fitting_takes_the_weight_and_the_rule_under_which_targets_come_first() -> None:
    histories, ages, bought = zip(entries((1, 10, False)), entries((2, 10, False)), strict=True)
    new_targets = HeldOut(list(histories), np.array([5, 6]), list(ages), list(bought))
    # The dense head has the target second, behind the past item; the other head has it last.
    ranked = candidates([[1, 5, 7], [2, 6, 7]], [[-1.0, -9.0, -2.0]] * 2, [[-0.5, -1.0, -3.0]] * 2)
    chosen = fit_ranking(ranked, new_targets)
    assert chosen.repeats == "never"
    assert chosen.dense_weight >= 0.8
    assert target_ranks(ranked, new_targets, chosen).tolist() == [0, 0]
    # Where users do come back, the rule stays away.
    repeated_targets = HeldOut(list(histories), np.array([1, 2]), list(ages), list(bought))
    assert fit_ranking(ranked, repeated_targets) == Ranking(dense_weight=1.0)


def test_the_rule_leaves_out_what_it_says() -> None:
    items, ages, bought = entries((4, 50, True), (5, 90_000, False), (6, 10, False))
    held_out = HeldOut([items], np.array([6]), [ages], [bought])
    ranked = candidates([[4, 5, 6, 7]], [[0.0] * 4], [[0.0] * 4])
    allowed_by_rule = {
        "always": [True] * 4, "never": [False, False, False, True], "bought": [False, True, True, True],
    }  # fmt: skip
    history = candidate_history(ranked.items, held_out.histories, held_out.ages_s, held_out.bought)
    for rule, expected in allowed_by_rule.items():
        assert history.allowed(Ranking(repeats=rule)).tolist() == [expected]
    within = Ranking(repeats="within", within_s=3600)
    assert history.allowed(within).tolist() == [[False, True, False, True]]
    assert target_ranks(ranked, held_out, within).tolist() == [4]
    assert excluded_by_repeats(RepeatRule(repeats="within", within_s=60), bought, ages).tolist() == [
        True,
        False,
        True,
    ]


@st.composite
def judged(draw: st.DrawFn) -> tuple[Candidates, HeldOut]:
    """Rows of candidates with scores that often tie, and the events that they are judged by."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 14))
    items = np.stack([rng.permutation(14)[:width] for _ in range(rows)])
    items[rng.random(items.shape) < 0.2] = -1
    sid, dense = (torch.from_numpy(rng.integers(-3, 1, size=items.shape)).float() for _ in range(2))
    ages = [rng.choice([0, 3599, 3600, 86_400, 40 * 86_400], size=rng.integers(0, 7)) for _ in range(rows)]
    bought = [rng.random(len(row)) < 0.4 for row in ages]
    pasts = [rng.integers(0, 14, size=len(row)) for row in ages]
    targets = rng.integers(0, 14, size=rows)
    return Candidates(torch.from_numpy(items), sid, dense), HeldOut(pasts, targets, ages, bought)


@given(judged(), st.sampled_from(REPEAT_RULES), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_rank_is_the_targets_place_in_the_sorted_list_that_the_rule_leaves(
    case: tuple[Candidates, HeldOut], rule: Ranking, weight: float
) -> None:
    ranked, held_out = case
    expected = []
    for row, target in enumerate(held_out.targets.tolist()):
        excluded = set(
            held_out.histories[row][
                excluded_by_repeats(rule, held_out.bought[row], held_out.ages_s[row])
            ].tolist()
        )
        score = ((1 - weight) * ranked.sid[row] + weight * ranked.dense[row]).tolist()
        named = [(at, item) for at, item in enumerate(ranked.items[row].tolist()) if item >= 0]
        best = sorted((-score[at], at, item) for at, item in named if item not in excluded)
        listed = [item for _, _, item in best]
        expected.append(listed.index(target) if target in listed else ranked.items.shape[1])
        left = candidate_history(ranked.items, held_out.histories, held_out.ages_s, held_out.bought).allowed(
            rule
        )[row]
        assert ranked.order(weight, left[None].expand(len(held_out.targets), -1))[row].tolist() == (
            listed + [-1] * (ranked.items.shape[1] - len(listed))
        )
    ranking = Ranking(dense_weight=weight, repeats=rule.repeats, within_s=rule.within_s)
    assert target_ranks(ranked, held_out, ranking).tolist() == expected


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
