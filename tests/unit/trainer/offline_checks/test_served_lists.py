"""Offline figures are of the lists that serving gives: same search, index, rules and limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.bundles.ranking import Ranking, excluded_by_repeats
from registry.decoding.list_rules import ListLimits
from tests.served_support import served_lists
from tests.tiny_shop import ITEMS, Shop, shop
from trainer.generator.export import export_generator
from trainer.generator.model import GeneratorForCausalLM
from trainer.generator.torch_generator import TorchGenerator
from trainer.offline_checks.quality import evaluate_held_out
from trainer.offline_checks.served_lists import LIST_LENGTH, REPEAT_RULES, ServedLists
from trainer.sequences.held_out import HeldOut

_AGES = np.array([5, 90_000, 700_000, 40 * 86_400])


@pytest.fixture(scope="module")
def tiny() -> Shop:
    return shop()


@pytest.fixture(scope="module")
def model(tiny: Shop) -> GeneratorForCausalLM:
    return tiny.outspoken(seed=3)


@pytest.fixture(scope="module")
def folder(model: GeneratorForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle")
    export_generator(model, path)
    return path


def users(seed: int, count: int = 40, targets: np.ndarray | None = None) -> HeldOut:
    """Histories of one to eight items, with ages that fall to the newest, and any item as the target."""
    rng = np.random.default_rng(seed)
    histories = [rng.integers(ITEMS, size=rng.integers(1, 9)) for _ in range(count)]
    ages = [np.sort(rng.choice(_AGES, size=len(row)))[::-1] for row in histories]
    bought = [rng.random(len(row)) < 0.4 for row in histories]
    return HeldOut(histories, rng.integers(ITEMS, size=count) if targets is None else targets, ages, bought)


@pytest.mark.parametrize("exact_items", [ITEMS, ITEMS - 1], ids=["exact", "beam-only"])
@pytest.mark.parametrize("rule", REPEAT_RULES[:4], ids=lambda rule: rule.repeats)
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_a_figure_is_of_the_lists_that_serving_answers(
    tiny: Shop, model: GeneratorForCausalLM, folder: Path, exact_items: int, rule: Ranking, weight: float
) -> None:
    limits = ListLimits(beam=3, exact_items=exact_items)
    active = np.arange(ITEMS) % 7 != 3
    catalogue = replace(tiny.catalogue, limits=limits, active=active)
    held_out = users(1)
    ranking = Ranking(dense_weight=weight, repeats=rule.repeats, within_s=rule.within_s)
    lists = served_lists(tiny, folder, ranking, limits, held_out, active)
    places = [
        row.index(item) if (item := tiny.catalogue.item_ids[target]) in row else LIST_LENGTH
        for row, target in zip(lists, held_out.targets.tolist(), strict=True)
    ]
    assert 5 < sum(place < LIST_LENGTH for place in places) < len(places)
    ranks = ServedLists(TorchGenerator(model), held_out, catalogue, 8).target_ranks(ranking)
    assert ranks.tolist() == places
    quality = evaluate_held_out(model, held_out, catalogue, tiny.sids, ranking)
    assert quality.hr10 == pytest.approx(np.mean([place < LIST_LENGTH for place in places]))


def test_above_the_exact_limit_the_rule_and_weight_are_fitted_to_the_lists_that_are_served(
    tiny: Shop, model: GeneratorForCausalLM, folder: Path
) -> None:
    """Targets are what serving puts first at weight 0 in the beam's lists: only there is that the best."""
    limits = ListLimits(beam=3, exact_items=0)
    events = users(2, 60)
    served = served_lists(tiny, folder, Ranking(dense_weight=0.0), limits, events)
    events = events._replace(targets=np.array([int(row[0][1:]) for row in served]))
    catalogue = replace(tiny.catalogue, limits=limits)
    quality = evaluate_held_out(model, events, catalogue, tiny.sids)
    assert quality.ranking == Ranking(dense_weight=0.0)
    assert (quality.hr10, quality.ndcg10) == (1.0, 1.0)


def test_a_fit_takes_the_weight_and_the_rule_under_which_targets_come_first(
    tiny: Shop, model: GeneratorForCausalLM, folder: Path
) -> None:
    limits = ListLimits()
    catalogue = replace(tiny.catalogue, limits=limits)
    for ranking in (Ranking(dense_weight=1.0), Ranking(dense_weight=1.0, repeats="never")):
        events = users(4, 80)
        served = served_lists(tiny, folder, ranking, limits, events)
        events = events._replace(targets=np.array([int(row[0][1:]) for row in served]))
        quality = evaluate_held_out(model, events, catalogue, tiny.sids)
        assert (quality.ranking, quality.ndcg10) == (ranking, 1.0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from(REPEAT_RULES), st.sampled_from([0.0, 0.3, 1.0]))
def test_a_rank_is_the_place_among_all_items_that_the_rule_leaves(
    seed: int, rule: Ranking, weight: float
) -> None:
    """With a beam as wide as the catalogue: every item scored by itself, in a loop."""
    tiny, model = _WIDE
    held_out = users(seed, 6)
    ranking = Ranking(dense_weight=weight, repeats=rule.repeats, within_s=rule.within_s)
    catalogue = replace(tiny.catalogue, limits=ListLimits(beam=ITEMS))
    lists = ServedLists(TorchGenerator(model), held_out, catalogue, 8)
    ranks = lists.target_ranks(ranking)
    (candidates,) = lists.candidates(lists.requests([Ranking()]))
    _, score = candidates.under(weight)
    for user, history in enumerate(held_out.histories):
        mine = candidates.request == user
        left_out = set(
            history[excluded_by_repeats(rule, held_out.bought[user], held_out.ages_s[user])].tolist()
        ) | {history[-1]}
        rows = lists.index.leaf_row[candidates.leaf[mine]].tolist()
        ranked = [row for _, row in sorted(zip(-score[mine], rows, strict=True)) if row not in left_out]
        target = int(held_out.targets[user])
        expected = ranked.index(target) if target in ranked else LIST_LENGTH
        assert ranks[user] == min(expected, LIST_LENGTH)


def test_the_order_of_users_and_of_rules_changes_no_rank(tiny: Shop, model: GeneratorForCausalLM) -> None:
    held_out = users(6, 300)
    lists = ServedLists(TorchGenerator(model), held_out, tiny.catalogue, 8)
    requests = lists.requests(REPEAT_RULES)
    assert len(requests.user) < len(REPEAT_RULES) * 300
    together = lists.ranks(requests, [0.4])[0, requests.of_rule]
    backwards = held_out.take(np.arange(300)[::-1])
    for number, rule in enumerate(REPEAT_RULES):
        ranking = Ranking(dense_weight=0.4, repeats=rule.repeats, within_s=rule.within_s)
        alone = ServedLists(TorchGenerator(model), backwards, tiny.catalogue, 8).target_ranks(ranking)
        assert together[number].tolist() == alone[::-1].tolist()


def test_a_model_without_items_of_its_own_is_ranked_by_its_sids(tiny: Shop) -> None:
    bare = tiny.model(seed=1)
    bare.set_items(torch.zeros(0, 3, dtype=torch.long))
    quality = evaluate_held_out(bare, users(7), tiny.catalogue, tiny.sids)
    assert quality.ranking.dense_weight == 0
    assert 0 < quality.hr10 < 1


def test_data_without_pages_may_have_the_newest_item_again(tiny: Shop, model: GeneratorForCausalLM) -> None:
    held_out = users(8)
    again = held_out._replace(targets=np.array([row[-1] for row in held_out.histories]))
    wide = replace(tiny.catalogue, limits=ListLimits(beam=ITEMS))
    on_page = evaluate_held_out(model, again, wide, tiny.sids, Ranking(dense_weight=1.0))
    anywhere = evaluate_held_out(
        model, again, replace(wide, newest_is_page=False), tiny.sids, Ranking(dense_weight=1.0)
    )
    assert on_page.hr10 == 0 < anywhere.hr10


_TINY = shop()
_WIDE = (_TINY, _TINY.outspoken(seed=9))
