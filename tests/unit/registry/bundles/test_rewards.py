"""What preferences ask a model for, and the frozen bins of prices and commissions."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.bundles.context import Context
from registry.bundles.rewards import (
    REWARD_NAMES,
    Offer,
    Rewards,
    log_value,
    quantile_edges,
    read,
    reward_fields,
    with_reward_fields,
    without_reward_fields,
    write,
)
from streams.errors import SidstreamError

MASSES = st.lists(st.integers(0, 50), min_size=8, max_size=8).filter(any)


def shares(counts: list[int]) -> dict[str, float]:
    return {str(value): count / sum(counts) for value, count in enumerate(counts)}


@st.composite
def bundles(draw: st.DrawFn) -> Rewards:
    """Masses of prices and commissions; clicks and purchases among conversions are all 1."""
    sure = {"0": 0.0, "1": 1.0}
    mass = {
        "price": shares(draw(MASSES)),
        "commission": shares(draw(MASSES)),
        "click": sure,
        "purchase": sure,
    }
    return Rewards(
        {}, {name: mass[name] for name in draw(st.sets(st.sampled_from(REWARD_NAMES), min_size=1))}
    )


WEIGHT = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))
WEIGHTS = st.dictionaries(st.sampled_from(REWARD_NAMES), WEIGHT, min_size=1).filter(
    lambda weights: any(weights.values())
)
EVEN = Rewards({}, {name: shares([1] * 8) for name in ("price", "commission")})


def test_the_highest_weight_asks_for_the_most_and_the_others_for_their_share_of_it() -> None:
    # Of eight equal bins, nine tenths are reached in bin 7, a half in bin 3.
    assert EVEN.requested_rewards({"price": 3}) == {"price": 7}
    assert EVEN.requested_rewards({"price": 3, "commission": 0}) == {"price": 7}
    assert EVEN.requested_rewards({"price": 2, "commission": 2}) == {"price": 7, "commission": 7}
    assert EVEN.requested_rewards({"price": 3, "commission": 1}) == {"price": 7, "commission": 5}
    assert EVEN.requested_rewards({"price": 1e6, "commission": 1e-6}) == {"price": 7, "commission": 3}
    assert EVEN.requested_rewards({"click": 1, "commission": 1}) == {"commission": 7}
    assert EVEN.requested_rewards({"click": 1}) == {}


@given(bundles(), WEIGHTS, st.sampled_from(REWARD_NAMES), st.floats(1, 1e3))
def test_more_weight_never_asks_for_less_of_it(
    rewards: Rewards, weights: dict[str, float], name: str, more: float
) -> None:
    before = rewards.requested_rewards(weights).get(name, -1)
    raised = weights | {name: more * weights.get(name, 0) or 1.0}
    assert rewards.requested_rewards(raised).get(name, -1) >= before


@given(bundles(), WEIGHTS, st.integers(-9, 9))
def test_only_the_proportions_of_weights_count(
    rewards: Rewards, weights: dict[str, float], power: int
) -> None:
    # Powers of two change no digit of a number.
    assert rewards.requested_rewards({name: weight * 2.0**power for name, weight in weights.items()}) == (
        rewards.requested_rewards(weights)
    )


@given(bundles(), WEIGHTS)
def test_what_is_asked_for_was_seen_often_enough_and_zero_asks_for_nothing(
    rewards: Rewards, weights: dict[str, float]
) -> None:
    requested = rewards.requested_rewards(weights)
    assert set(requested) == {name for name, weight in weights.items() if weight > 0 and name in rewards.mass}
    for name, value in requested.items():
        assert rewards.mass[name][str(value)] >= 0.01
    assert {requested[name] for name in ("click", "purchase") if name in requested} <= {1}


def test_a_rare_bin_gives_way_to_the_nearest_that_enough_conversions_have() -> None:
    rare = Rewards({}, {"price": shares([300, 300, 300, 0, 0, 4, 96, 0])})
    assert rare.requested_rewards({"price": 1}) == {"price": 2}
    rarer = Rewards({}, {"price": shares([300, 300, 290, 0, 0, 8, 7, 95])})
    assert rarer.requested_rewards({"price": 1}) == {"price": 7}


def test_bins_are_of_the_category_where_it_has_enough_items_and_of_all_items_elsewhere() -> None:
    cheap = [Offer("pens", price) for price in range(1, 9)]
    dear = [Offer("cars", 1000.0 * price) for price in range(1, 9)]
    few = [Offer("maps", 5.0)]
    edges = quantile_edges("price", [*cheap, *dear, *few, Offer("pens")], 4, 8)
    assert sorted(edges) == ["", "cars", "pens"]
    rewards = Rewards({"price": edges}, {})
    assert [rewards.bin_of("price", item) for item in cheap] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [rewards.bin_of("price", item) for item in dear] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rewards.bin_of("price", few[0]) == 1
    assert rewards.bin_of("price", Offer("boats", 1e9)) == 3
    assert rewards.bin_of("price", Offer("pens")) is None
    assert rewards.bin_of("commission", cheap[0]) is None
    assert log_value("commission", Offer("pens", 2.0)) is None
    assert log_value("commission", Offer("pens", 2.0, 0.5)) == pytest.approx(0.6931, abs=1e-4)


def test_a_bundle_keeps_its_bins_and_one_without_has_none(tmp_path: Path) -> None:
    rewards = Rewards({"price": {"": [0.5, 1.25]}}, {"price": {"0": 0.5, "1": 0.25, "2": 0.25}})
    assert read(tmp_path) is None
    write(None, tmp_path)
    assert read(tmp_path) is None
    write(rewards, tmp_path)
    assert read(tmp_path) == rewards
    (tmp_path / "rewards.json").write_text('{"edges": {}}')
    with pytest.raises(SidstreamError, match="fetch the bundle again"):
        read(tmp_path)


def test_reward_fields_stand_behind_a_context_and_change_none_of_its_tokens() -> None:
    plain = Context(50, {"scene": ["home", "cart"]})
    extended = with_reward_fields(plain, Rewards({}, {"price": {"0": 0.5, "1": 0.5}}))
    assert extended.row({"scene": "cart"} | reward_fields({"price": 1, "click": 0})) == [51, 52, 0, 57]
    assert without_reward_fields(extended) == plain
    assert with_reward_fields(plain, None) == plain


def test_clicks_and_purchases_have_tokens_before_anything_can_be_asked_of_them() -> None:
    none = Rewards({}, {})
    assert none.fields == {"click": ["0", "1"], "purchase": ["0", "1"]}
    assert none.requested_rewards({"click": 1, "price": 2}) == {}
