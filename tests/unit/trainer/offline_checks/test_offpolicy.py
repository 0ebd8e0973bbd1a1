"""The off-policy check of a new model: what it computes, what it vetoes, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from registry.bundles.prompt import BOS
from tests.tiny_explorations import T0, exploration, explore
from tests.tiny_shop import Shop, shop, sid_of
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.offpolicy import (
    LoggedExplorations,
    candidate_scores,
    judge_by_explorations,
    logged_explorations,
    reward_model,
    target_policy,
)
from trainer.settings import OffPolicySettings
from trainer.tuning.sft import train

CODEBOOK = "c" * 16
SETTINGS = OffPolicySettings.model_validate({})
TrainedShop = tuple[Shop, GeneratorForCausalLM]


@pytest.fixture(scope="module")
def trained_shop() -> TrainedShop:
    """A shop, and a model that knows which item follows."""
    tiny_shop = shop(users=60, epochs=12, patience=12)
    model = tiny_shop.model()
    train(model, tiny_shop.rows, tiny_shop.sids, tiny_shop.settings)
    return tiny_shop, model


def logged_of(explorations: list[Any], tiny_shop: Shop, **settings: Any) -> LoggedExplorations:
    chosen = OffPolicySettings.model_validate(settings)
    logged = logged_explorations(explorations, CODEBOOK, tiny_shop.prompt, chosen)
    assert logged is not None
    return logged


def test_scores_are_those_of_the_whole_forward_pass() -> None:
    tiny_shop = shop()
    model = tiny_shop.model(seed=4)
    random = np.random.default_rng(0)
    explorations = []
    # No history, one longer than a prompt, and more candidates than one forward takes (85 rows of 24).
    for number, length in enumerate([0, 1, 3, 12, *random.integers(0, 9, 500).tolist()]):
        few = 1 + number % 24
        explorations.append((
            exploration(
                number, ts=T0 + number, prompt=[list(sid_of(int(n))) for n in random.integers(0, 24, length)],
                candidates=[list(sid_of(int(n))) for n in random.permutation(24)[:few]], scores=[-1.0] * few,
            ),
            False,
        ))  # fmt: skip
    logged = logged_of(explorations, tiny_shop)
    got = candidate_scores(model, logged)
    for at in (0, 1, 2, 3, 23, 84, 85, 86, 340, 503):
        event = explorations[at][0]
        prompt_tokens = [token for sid in event.prompt[-8:] for token in tiny_shop.prompt.tokens(sid)]
        for place, sid in enumerate(event.candidates):
            ids = [BOS, *prompt_tokens, *tiny_shop.prompt.tokens(sid)]
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(logs[len(ids) - 4 + level, ids[len(ids) - 3 + level]]) for level in range(3))
            assert got[logged.starts[at] + place] == pytest.approx(expected, abs=1e-4)


def test_the_target_policy_is_a_softmax_over_each_explorations_own_candidates() -> None:
    tiny_shop = shop()
    explorations = [
        (exploration(0, temperature=2.0), True),
        (exploration(1, ts=T0 + 1, candidates=[list(sid_of(5))], scores=[-3.0], propensity=1.0), False),
        (exploration(2, ts=T0 + 2, temperature=1e-300), False),
    ]
    policy = target_policy(np.array([0.0, -2.0, -700.0, -3.0, -3.5]), logged_of(explorations, tiny_shop))
    better = 1 / (1 + math.exp(-1))
    assert policy == pytest.approx([better, 1 - better, 1.0, 1.0, 0.0])


@pytest.mark.learning
def test_the_model_that_drew_has_the_value_that_was_logged_and_is_not_vetoed(
    trained_shop: TrainedShop,
) -> None:
    tiny_shop, model = trained_shop
    explorations = explore(model, tiny_shop.prompt, 1500)
    got = judge_by_explorations(model, logged_of(explorations, tiny_shop), SETTINGS)
    rate = np.mean([clicked for _, clicked in explorations])
    assert got.ess == pytest.approx(1500, rel=1e-4)
    assert got.users == len({event.user_id for event, _ in explorations})
    for value in (got.logged, got.ips, got.clipped_ips, got.snips):
        assert value is not None
        assert value.value == pytest.approx(rate, rel=1e-3)
    assert got.dr is not None
    assert got.dr.low < rate < got.dr.high
    assert not got.vetoed
    assert got.sentence.startswith("no veto: CTR ")
    assert "is not shown to be more than 10% below" in got.sentence
    assert "IPS 0." in got.summary()
    assert "clipped 0." in got.summary()
    assert got.metrics()["ope_dr"] == got.dr.value
    json.dumps(dataclasses.asdict(got), allow_nan=False)


@pytest.mark.learning
def test_scrambled_weights_are_vetoed_once_there_are_enough_explorations(trained_shop: TrainedShop) -> None:
    tiny_shop, model = trained_shop
    scrambled = tiny_shop.model(seed=9)
    many = explore(model, tiny_shop.prompt, 3000)
    got = judge_by_explorations(scrambled, logged_of(many, tiny_shop), SETTINGS)
    assert got.vetoed
    assert got.dr is not None
    assert got.logged is not None
    # Without knowledge each of the six is about as likely: the right one is clicked in 80 %, others in 5 %.
    assert got.dr.high < 0.9 * got.logged.value
    assert got.sentence.startswith("veto: CTR ")
    assert "SIDSTREAM_TRAINER__OFFPOLICY__MARGIN" in got.sentence

    few = judge_by_explorations(scrambled, logged_of(many[:400], tiny_shop), SETTINGS)
    assert not few.vetoed
    assert few.sentence.startswith("no veto: ")
    assert few.sentence.endswith(" effective samples of the 1,000 that it takes")
    # The newest are kept.
    assert (
        judge_by_explorations(scrambled, logged_of(many, tiny_shop, max_explorations=400), SETTINGS).n == 400
    )
    assert (
        judge_by_explorations(
            scrambled, logged_of(many, tiny_shop), SETTINGS.model_copy(update={"margin": 0.9})
        ).vetoed
        is False
    )


@pytest.mark.learning
def test_a_loss_that_may_be_chance_is_no_veto(trained_shop: TrainedShop) -> None:
    tiny_shop, model = trained_shop
    settings = OffPolicySettings.model_validate({"min_ess": 5, "alpha": 1e-6})
    got = judge_by_explorations(
        tiny_shop.model(seed=9), logged_of(explore(model, tiny_shop.prompt, 25), tiny_shop), settings
    )
    assert got.dr is not None
    assert got.logged is not None
    assert got.dr.value < 0.9 * got.logged.value
    assert not got.vetoed
    assert "is not shown to be more than 10% below" in got.sentence


@pytest.mark.learning
def test_a_better_model_than_the_one_that_drew_is_not_vetoed_and_estimated_higher(
    trained_shop: TrainedShop,
) -> None:
    tiny_shop, model = trained_shop
    # Fresh weights answer at random, so half of the shop are their candidates.
    explorations = explore(tiny_shop.model(seed=9), tiny_shop.prompt, 3000, candidates=12)
    got = judge_by_explorations(
        model, logged_of(explorations, tiny_shop), OffPolicySettings.model_validate({"min_ess": 50})
    )
    assert not got.vetoed
    assert got.dr is not None
    assert got.logged is not None
    assert got.dr.low > got.logged.value


def test_what_cannot_be_used_is_left_out_and_counted() -> None:
    tiny_shop = shop()
    explorations = [
        (exploration(0), True),
        (exploration(1, user_id="v"), False),
        (exploration(2, codebook="d" * 16), True),
        (exploration(3, candidates=[[0, 0, 0], [9, 9, 9]]), True),
        (exploration(4, prompt=[[0, 0]]), True),
        (exploration(5, scores=[-1.0]), True),
        (exploration(6, chosen=2), True),
        (exploration(7, propensity=1e-12), True),
    ]
    logged = logged_of(explorations, tiny_shop)
    assert len(logged) == 2
    assert logged.left_out == {
        "of another codebook": 1, "with a SID that the codebook does not have": 2,
        "that contradict themselves": 3,
    }  # fmt: skip
    got = judge_by_explorations(tiny_shop.model(), logged, SETTINGS)
    assert got.metrics()["ope_left_out"] == 6
    assert "1 of another codebook left out" in got.summary()
    assert not got.vetoed


def test_nothing_to_judge_by_is_no_veto() -> None:
    tiny_shop = shop()
    assert logged_explorations([], CODEBOOK, tiny_shop.prompt, SETTINGS) is None
    for explorations in ([(exploration(0, codebook="d" * 16), True)], [(exploration(0), True)]):
        got = judge_by_explorations(tiny_shop.model(), logged_of(explorations, tiny_shop), SETTINGS)
        assert not got.vetoed
        assert got.sentence == f"no veto: explorations of {got.users} users, and it takes two"
        assert got.dr is None


def test_a_users_own_rewards_do_not_enter_the_users_expected_rewards(trained_shop: TrainedShop) -> None:
    tiny_shop, model = trained_shop
    explorations = explore(model, tiny_shop.prompt, 300, users=20)
    before = reward_model(logged_of(explorations, tiny_shop))
    turned = [(event, clicked != (event.user_id == "u3")) for event, clicked in explorations]
    logged = logged_of(turned, tiny_shop)
    changed = reward_model(logged) != before
    own = np.array([event.user_id == "u3" for event, _ in explorations])
    own_candidates = np.repeat(own, np.diff(logged.starts))
    assert own.any()
    assert not changed[own_candidates].any()
    assert changed[~own_candidates].any()


@pytest.mark.learning
def test_expected_rewards_follow_the_score_and_lie_between_no_click_and_a_click(
    trained_shop: TrainedShop,
) -> None:
    tiny_shop, model = trained_shop
    explorations = explore(model, tiny_shop.prompt, 2000)
    logged = logged_of(explorations, tiny_shop)
    q = reward_model(logged)
    assert q.min() >= 0.0
    assert q.max() <= 1.0
    first = q[logged.starts[:-1]]
    last = q[logged.starts[1:] - 1]
    assert first.mean() > last.mean() + 0.3
