"""The online stage: a model learns from its own answers to what may be asked, and is no worse without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from registry.bundles.rewards import REWARD_NAMES, Rewards
from tests.tiny_explorations import exploration
from tests.tiny_shop import ITEMS, Shop, sid_of
from tests.unit.trainer.rewards.test_labels import OFFERS, rewarded
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.offpolicy import logged_explorations
from trainer.offline_checks.quality import evaluate_held_out
from trainer.offline_checks.ranking import CatalogueRanker
from trainer.rewards.labels import UNKNOWN, purchase_labels
from trainer.rewards.online import (
    OnlineStage,
    RewardEvidence,
    learn_from_own_answers,
    passing_answers,
    reward_requests,
)
from trainer.settings import OffPolicySettings
from trainer.tuning.sft import train

SURE = {"0": 0.0, "1": 1.0}
ONLINE = {"rounds": 1, "requests": 800, "steps": 60, "floor": 0.25}
EIGHT = {str(value): 0.125 for value in range(8)}


@given(st.sets(st.sampled_from(REWARD_NAMES), min_size=1), st.integers(1, 200), st.integers(0, 9))
def test_requests_ask_for_the_most_of_everything_but_one(fields: set[str], count: int, seed: int) -> None:
    mass = {name: SURE if name in ("click", "purchase") else EIGHT for name in fields}
    rewards = Rewards({}, mass)
    requests = reward_requests(rewards, count, np.random.default_rng(seed))
    high = np.array(
        [rewards.requested_rewards({name: 1.0})[name] if name in fields else UNKNOWN for name in REWARD_NAMES]
    )
    assert requests.shape == (count, 4)
    assert (requests[:, high == UNKNOWN] == UNKNOWN).all()
    assert ((requests != high).sum(1) <= 1).all()
    if fields != {"click"}:
        assert (requests[:, 0] == high[0]).all()


def test_every_supported_value_is_asked_for() -> None:
    rare = EIGHT | {"7": 0.0, "0": 0.25}
    requests = reward_requests(
        Rewards({}, {"price": rare, "commission": EIGHT}), 2000, np.random.default_rng(0)
    )
    assert sorted(set(requests[:, 2].tolist())) == list(range(7))
    assert sorted(set(requests[:, 3].tolist())) == list(range(8))


def test_an_answer_is_kept_for_any_reward_but_only_where_it_is_likely() -> None:
    price = np.array([0.0, 1, 2, 3, 4, np.nan])
    click = np.array([0.9, 0.1, 0.2, 0.3, 0.4, 0.95])
    likely = np.array([True, True, True, True, False, True])
    assert passing_answers([price, click], likely, 0.7).tolist() == [True, False, False, True, False, True]
    # What is the same for all is no reason.
    assert not passing_answers([np.full(6, 2.0)], likely, 0.7).any()
    assert not passing_answers([np.full(6, np.nan)], likely, 0.7).any()
    assert not passing_answers([], likely, 0.7).any()


@pytest.fixture(scope="module")
def begun() -> tuple[Shop, RewardEvidence, GeneratorForCausalLM]:
    """A shop where the next item is one of four, of four prices, and a model that follows a price so so."""
    tiny_shop, rewards = rewarded(users=150, epochs=8, batch_positions=256, lr=1e-2, patience=100,
                             rewards={"min_count": 5, "unconditioned": 0.5, "online": ONLINE})  # fmt: skip
    model = tiny_shop.model()
    train(model, tiny_shop.rows, tiny_shop.sids, tiny_shop.settings)
    return (
        tiny_shop,
        RewardEvidence(rewards, tiny_shop.context, OFFERS, purchase_labels(tiny_shop.log, 0)),
        model.eval(),
    )


def with_online(tiny_shop: Shop, **values: object) -> Shop:
    online = tiny_shop.settings.rewards.online.model_copy(update=values)
    rewards = tiny_shop.settings.rewards.model_copy(update={"online": online})
    settings = tiny_shop.settings.model_copy(update={"rewards": rewards})
    rows = type(tiny_shop.rows)(
        tiny_shop.split, tiny_shop.catalogue, tiny_shop.tokenizer, tiny_shop.prompt, settings
    )
    return replace(tiny_shop, settings=settings, rows=rows)


def copied(model: GeneratorForCausalLM, tiny_shop: Shop) -> GeneratorForCausalLM:
    copy = tiny_shop.model()
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.learning
def test_a_rounds_answers_are_told_with_what_they_bring(
    begun: tuple[Shop, RewardEvidence, GeneratorForCausalLM],
) -> None:
    tiny_shop, evidence, model = begun
    stage = OnlineStage(model, tiny_shop.rows, tiny_shop.sids, evidence, dense_weight=0.5)
    outcome, lessons = stage.collect_answers(0)
    assert (outcome.asked, outcome.kept) == (800, len(lessons))
    assert 0 < outcome.kept <= outcome.likely <= 800
    assert 0.25 < outcome.followed <= 1
    column = list(tiny_shop.context.fields).index("reward.price")
    token = tiny_shop.context.row({"reward.price": "0"})[column]
    bins = np.array([evidence.rewards.bin_of("price", offer) for offer in OFFERS])
    assert (lessons.rewards[:, column] == token + bins[lessons.targets]).all()
    # Without clicks and purchases to tell their chances from, nothing is said of either.
    assert not lessons.rewards[:, :column].any()
    # No answer is the page's own item, and the histories are those of the log.
    pages = lessons.items[lessons.starts[1:] - 1]
    assert (lessons.targets != pages).all()
    repeated, repeated_lessons = stage.collect_answers(0)
    assert repeated == outcome
    assert (repeated_lessons.targets == lessons.targets).all()


@pytest.mark.learning
def test_after_the_stage_more_answers_are_what_was_asked_for_and_none_is_worse(
    begun: tuple[Shop, RewardEvidence, GeneratorForCausalLM],
) -> None:
    tiny_shop, evidence, model = begun
    before = evaluate_held_out(model, tiny_shop.split.held_out, tiny_shop.catalogue, tiny_shop.sids)
    trained_model = copied(model, tiny_shop)
    chosen = with_online(tiny_shop, rounds=3, lr=2e-3, max_fall=0.05)
    progress_lines: list[str] = []
    result = learn_from_own_answers(
        trained_model, chosen.rows, tiny_shop.sids, evidence, before, progress_lines.append
    )
    assert result.refused is None
    assert result.steps == 180
    assert len(progress_lines) == len(result.rounds) == 3
    assert result.rounds[-1].followed > result.rounds[0].followed + 0.03
    assert result.quality is not None
    assert result.quality.hr10 >= 0.95 * before.hr10


@pytest.mark.learning
def test_a_stage_that_costs_hits_is_undone(begun: tuple[Shop, RewardEvidence, GeneratorForCausalLM]) -> None:
    tiny_shop, evidence, model = begun
    before = evaluate_held_out(model, tiny_shop.split.held_out, tiny_shop.catalogue, tiny_shop.sids)
    spoiled = copied(model, tiny_shop)
    result = learn_from_own_answers(
        spoiled, with_online(tiny_shop, lr=0.5).rows, tiny_shop.sids, evidence, before, lambda _: None
    )
    assert result.refused is not None
    assert "HR@10 fell from" in result.refused
    for name, value in model.named_parameters():
        assert torch.equal(value, spoiled.get_parameter(name)), name


def test_an_interrupted_stage_stops(begun: tuple[Shop, RewardEvidence, GeneratorForCausalLM]) -> None:
    tiny_shop, evidence, model = begun
    result = learn_from_own_answers(
        copied(model, tiny_shop), tiny_shop.rows, tiny_shop.sids, evidence, None, lambda _: None, lambda: True
    )
    assert (result.steps, result.quality) == (0, None)


@pytest.mark.learning
def test_clicks_and_purchases_are_drawn_with_their_chances(
    begun: tuple[Shop, RewardEvidence, GeneratorForCausalLM],
) -> None:
    """Every second item is bought when it is clicked, and four of ten explored answers are clicked."""
    tiny_shop, evidence, model = begun
    rng = np.random.default_rng(0)
    clicks = tiny_shop.log.items % 2
    explorations = [
        (exploration(at, prompt=[list(sid_of(int(item)))], candidates=[list(sid_of(int(item + 1) % ITEMS))],
                     scores=[-1.0]), bool(rng.random() < 0.4))
        for at, item in enumerate(rng.integers(0, ITEMS, 400))
    ]  # fmt: skip
    logged = logged_explorations(
        explorations, "c" * 16, tiny_shop.prompt, OffPolicySettings.model_validate({}), tiny_shop.context
    )
    rewards = replace(evidence.rewards, mass=dict(evidence.rewards.mass) | {"click": SURE, "purchase": SURE})
    full = RewardEvidence(rewards, evidence.context, OFFERS, clicks, logged)
    _, lessons = OnlineStage(model, tiny_shop.rows, tiny_shop.sids, full, dense_weight=0.5).collect_answers(1)
    click, purchase, price = lessons.rewards.T
    assert bool((price > 0).all())
    clicked = click == tiny_shop.context.row({"reward.click": "1"})[0]
    assert clicked.mean() == pytest.approx(0.4, abs=0.1)
    bought = purchase == tiny_shop.context.row({"reward.purchase": "1"})[1]
    # Bought is only what is clicked, and of that nearly always the odd ones.
    assert not bought[~clicked].any()
    odd = lessons.targets % 2 == 1
    assert bought[clicked & odd].mean() > 0.85
    assert bought[clicked & ~odd].mean() < 0.15
    # A refusal is told each time.
    assert (lessons.always_visible[:, 0] == ~clicked).all()


@pytest.mark.learning
def test_the_score_of_an_item_is_that_of_the_candidates(
    begun: tuple[Shop, RewardEvidence, GeneratorForCausalLM],
) -> None:
    tiny_shop, _, model = begun
    ranker = CatalogueRanker(model, tiny_shop.catalogue.codes, tiny_shop.sids, 10)
    histories = [np.arange(size) for size in (1, 3, 8, 2)]
    states = ranker.states(histories)
    ranked = ranker.candidates(histories, states)
    for weight in (0.0, 0.3, 1.0):
        for column in (0, 3):
            scores = ranker.scores(histories, states, ranked.items[:, column].numpy(), weight)
            torch.testing.assert_close(scores, ranked.score(weight)[:, column], atol=1e-4, rtol=1e-4)
