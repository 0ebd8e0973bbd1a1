"""A generator learns events under what they brought, and follows what a request asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.bundles.prompt import Prompt
from registry.bundles.ranking import Ranking
from registry.bundles.rewards import REWARD_NAMES, Offer, Rewards, reward_fields, with_reward_fields
from registry.decoding.list_rules import ListLimits
from registry.decoding.onnx_generator import OnnxGenerator
from registry.decoding.sid_index import SidIndex
from registry.hold_out import HoldOut
from serving.bundle_loader import LoadedBundle, LoadedRollout
from serving.exploration import Explorer
from serving.recommender import Recommender, Request
from streams.events import Arm, Recommendation, Rollout, Trigger
from tests.tiny_shop import ITEMS, SIZES, Shop, shop, sid_of
from trainer.generator.export import export_generator
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.quality import evaluate_held_out
from trainer.offline_checks.ranking import CatalogueRanker
from trainer.rewards.labels import UNKNOWN, learn_rewards, purchase_labels, reward_values, with_reward_labels
from trainer.sequences.held_out import split_log
from trainer.sequences.interactions import Interactions, training_catalogue, user_sequences
from trainer.sequences.rows import TrainingRows
from trainer.settings import RewardSettings
from trainer.tuning.broadcast import read_training_inputs, write_training_inputs
from trainer.tuning.sft import train

BOOK = "00000000aaaaaaaa"
KNOWN = training_catalogue({f"i{n:02}": sid_of(n) for n in range(4)}, {}, Prompt(SIZES, 8))
# A quarter of the items for each price, whatever item comes after which.
OFFERS = [Offer("", float(1 + item * 7 % 4)) for item in range(ITEMS)]


def chosen(**values: object) -> RewardSettings:
    return RewardSettings.model_validate({"bins": 4, "min_count": 5} | values)


def log_of(*events: tuple[str, int, int, bool]) -> Interactions:
    """(user, item, milliseconds, bought) each."""
    users, items, ts, bought = zip(*events, strict=True)
    return user_sequences(users, ts, [f"i{item:02}" for item in items], KNOWN, bought=bought)


def test_a_click_led_to_a_purchase_did_not_or_may_still() -> None:
    log = log_of(
        ("u", 0, 0, False), ("u", 0, 10, True), ("u", 1, 0, False), ("u", 1, 11, True),
        ("u", 2, 89, False), ("u", 3, 90, False), ("v", 0, 5, False), ("v", 1, 92, False), ("v", 1, 92, True),
        ("w", 2, 100, False),
    )  # fmt: skip
    labels = dict(zip(zip(log.items.tolist(), log.ts.tolist(), log.bought.tolist(), strict=True),
                     purchase_labels(log, 10).tolist(), strict=True))  # fmt: skip
    # Bought at the end of its window; just after it.
    assert (labels[0, 0, False], labels[1, 0, False]) == (1, 0)
    # The newest event is of 100: a window from 89 is closed, one from 90 on is open.
    assert (labels[2, 89, False], labels[3, 90, False], labels[2, 100, False]) == (0, UNKNOWN, UNKNOWN)
    # Somebody else's purchase; at the same moment; purchases themselves.
    assert (labels[0, 5, False], labels[1, 92, False]) == (0, 1)
    assert all(value == 1 for (_, _, bought), value in labels.items() if bought)


EVENTS = st.lists(
    st.tuples(st.sampled_from("uv"), st.integers(0, 3), st.integers(0, 20), st.booleans()), min_size=1
)


@settings(max_examples=60, deadline=None)
@given(EVENTS, st.integers(0, 8))
def test_labels_of_purchases_are_those_of_the_definition(
    events: list[tuple[str, int, int, bool]], window: int
) -> None:
    log = log_of(*events)
    user = np.repeat(log.users, np.diff(log.starts))
    rows = list(zip(user, log.items, log.ts, log.bought, purchase_labels(log, window), strict=True))
    for who, item, ts, bought, label in rows:
        converted = bought or any(
            paid and (other, what) == (who, item) and ts <= at <= ts + window
            for other, what, at, paid, _ in rows
        )
        closed = ts + window < log.ts.max()
        assert label == (1 if converted else 0 if closed else UNKNOWN)


def test_a_field_is_there_where_enough_is_known_of_it() -> None:
    log = log_of(*((f"u{n}", n % 4, n, n % 3 == 0) for n in range(60)))
    bought = purchase_labels(log, 1)
    priced = [Offer("", 1.0), Offer("", 2.0), None, None]
    rewards = learn_rewards(priced, log, bought, 0, chosen())
    assert rewards is not None
    assert sorted(rewards.mass) == ["price", "purchase"]
    assert rewards.mass["purchase"] == {"0": 0.0, "1": 1.0}
    assert sum(rewards.mass["price"].values()) == pytest.approx(1)
    nothing = learn_rewards(priced, log, bought, 0, chosen(min_share=0.6, min_count=50))
    assert nothing is not None
    assert nothing.mass == {}
    assert learn_rewards(priced, log, bought, 0, chosen(enabled=False)) is None
    offers = [Offer("", 1.0, 0.1), Offer("", 2.0, 0.1), None, None]
    both = learn_rewards(offers, log, bought, 0, chosen(min_count=50))
    assert both is not None
    assert sorted(both.mass) == ["commission", "price"]
    values = reward_values(both, priced, log.items, bought)
    assert values[log.items == 1][0].tolist() == [1, bought[log.items == 1][0], 3, UNKNOWN]
    assert (values[log.items == 3][:, 2:] == UNKNOWN).all()


def rewarded(**shop_options: object) -> tuple[Shop, Rewards]:
    """A shop where the next item is one of four, of four prices: only the reward says which.

    Users go on by 1 to 4 items at a time, so that every price is among what may come next.
    """
    plain = shop(**{"text_inputs": False, "weights": {"sid_to_title": 0, "title_to_sid": 0}} | shop_options)
    steps = np.random.default_rng(5).integers(1, 5, size=len(plain.whole_log))
    walks = np.split(steps, plain.whole_log.starts[1:-1])
    items = np.concatenate([np.cumsum(walk) % ITEMS for walk in walks])
    whole_log = replace(plain.whole_log, items=items)
    split = split_log(whole_log, HoldOut(share=plain.settings.validation_share), plain.settings)
    log = split.log
    bought = purchase_labels(log, 0)
    rewards = learn_rewards(OFFERS, log, bought, 0, chosen())
    assert rewards is not None
    context = with_reward_fields(plain.context, rewards)
    log = with_reward_labels(log, OFFERS, bought, rewards, context)
    split = replace(split, log=log)
    rows = TrainingRows(split, plain.catalogue, plain.tokenizer, plain.prompt, plain.settings)
    return replace(plain, whole_log=whole_log, split=split, rows=rows, context=context), rewards


def test_each_event_is_told_with_its_own_rewards_some_or_none() -> None:
    tiny_shop, rewards = rewarded(users=150, rewards={"dropout": 0.25, "unconditioned": 0.4, "bins": 4})
    assert list(tiny_shop.context.fields) == ["reward.click", "reward.purchase", "reward.price"]
    price = reward_values(rewards, OFFERS, tiny_shop.log.items, purchase_labels(tiny_shop.log, 0))[
        :, REWARD_NAMES.index("price")
    ]
    # Every event of this log is a click: neither it nor a purchase says anything.
    assert tiny_shop.log.rewards.tolist() == [
        [0, 0, tiny_shop.context.row(reward_fields({"price": int(value)}))[2]] for value in price
    ]
    total = labelled_count = 0
    for piece in tiny_shop.rows.sequence_batches(0):
        assert piece.context is not None
        there = piece.items >= 0
        assert not piece.context[~there].any()
        bins = torch.tensor([rewards.bin_of("price", offer) or 0 for offer in OFFERS])
        own = tiny_shop.log.rewards[:, 2].min() + bins[piece.items.clamp(min=0)]
        has_reward = piece.context[..., 2] != 0
        assert bool((piece.context[..., 2] == own)[has_reward].all())
        total, labelled_count = total + int(there.sum()), labelled_count + int(has_reward.sum())
    # Of events, not of sequences: .6 of them with rewards, and of those .75 with this one.
    assert labelled_count / total == pytest.approx(0.45, abs=0.05)
    first, repeated = tiny_shop.rows.sequence_batches(0), tiny_shop.rows.sequence_batches(0)
    assert all(torch.equal(a.context, b.context) for a, b in zip(first, repeated, strict=True))  # type: ignore[arg-type]


def test_other_processes_get_the_same_rewards(tmp_path: Path) -> None:
    tiny_shop, _ = rewarded(users=20)
    write_training_inputs(
        tmp_path, tiny_shop.model(), tiny_shop.tokenizer, tiny_shop.rows, tiny_shop.settings
    )
    _, rows, _ = read_training_inputs(tmp_path)
    np.testing.assert_array_equal(rows.log.rewards, tiny_shop.log.rewards)


@pytest.fixture(scope="module")
def trained() -> tuple[Shop, Rewards, GeneratorForCausalLM]:
    tiny_shop, rewards = rewarded(
        users=220, validation_share=0.3, epochs=25, batch_positions=256, lr=1e-2, patience=100
    )
    model = tiny_shop.model()
    train(model, tiny_shop.rows, tiny_shop.sids, tiny_shop.settings)
    return tiny_shop, rewards, model.eval()


@pytest.mark.learning
def test_the_model_follows_the_price_that_is_asked_for(
    trained: tuple[Shop, Rewards, GeneratorForCausalLM],
) -> None:
    tiny_shop, rewards, model = trained
    requests = [(item, value) for item in range(ITEMS) for value in range(4)]
    histories = [np.array([item]) for item, _ in requests]
    rows = np.array(
        [tiny_shop.context.row(reward_fields({"price": value})) for _, value in requests], dtype=np.int32
    )
    ranker = CatalogueRanker(model, tiny_shop.catalogue.codes, tiny_shop.sids, 10)
    best = ranker.candidates(histories, ranker.states(histories, rows)).order(1.0)[:, 0].tolist()
    right = [
        (best_item - item - 1) % ITEMS < 4 and rewards.bin_of("price", OFFERS[best_item]) == value
        for best_item, (item, value) in zip(best, requests, strict=True)
    ]
    assert np.mean(right) > 0.9


@pytest.mark.learning
def test_validation_is_of_requests_that_ask_for_nothing(
    trained: tuple[Shop, Rewards, GeneratorForCausalLM],
) -> None:
    tiny_shop, _, model = trained
    held_out = tiny_shop.split.held_out
    assert held_out.contexts is not None
    assert held_out.contexts.shape == (len(held_out.targets), 0)
    quality = evaluate_held_out(model, held_out, tiny_shop.catalogue, tiny_shop.sids)
    # One of four may come next, and nothing says which: told the price, it would be nearly always the first.
    assert quality.ndcg10 < 0.85
    assert quality.hr10 > 0.9


@pytest.mark.learning
def test_preferences_are_answered_from_the_exported_graphs(
    trained: tuple[Shop, Rewards, GeneratorForCausalLM], tmp_path: Path
) -> None:
    tiny_shop, rewards, model = trained
    export_generator(model, tmp_path)
    served = OnnxGenerator(tmp_path, SIZES, 8)
    bundle = LoadedBundle(
        "b0", BOOK, 8, (), served, served.items, Ranking(dense_weight=1.0), tiny_shop.context, rewards
    )
    rollout = Rollout.new(
        name="s", action="start", trial="t", arms=[Arm(name="champion", bundle="b0", weight=1.0, version="1")]
    )
    index = SidIndex.build(np.array(tiny_shop.catalogue.sids), tiny_shop.catalogue.item_ids)
    ask = Recommender(lambda _: index, ListLimits(9), Explorer(0, 1, 1.0))

    def answered(**wishes: float) -> Recommendation:
        trigger = Trigger.new(request_id="r", user_id="u", item_id="i07", k=1, preferences=wishes or None)
        (answer,) = ask.recommend([Request(trigger, None)], LoadedRollout(rollout, {"b0": bundle}))
        return answer.recommendation

    def price(answer: Recommendation) -> float | None:
        return OFFERS[int(answer.items[0].item_id[1:])].price

    high = answered(price=1)
    assert high.conditions is not None
    assert high.conditions["price"] == rewards.bin_of("price", Offer("", price(high)))
    assert high.conditions["price"] >= 2
    assert answered().conditions is None
    assert answered(click=1).conditions is None
    assert [answer.score for answer in answered(click=1).items] == [
        answer.score for answer in answered().items
    ]
