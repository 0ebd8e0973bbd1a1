"""The simulated shoppers: their truth is fixed by a seed, and clicks and purchases want different things."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.events import CatalogItem
from streams.settings import ShoppersSettings
from streams.simulation.shoppers import Shopper, Truth, population

WORDS = ("red", "blue", "lantern", "mug", "bag", "wooden", "heart", "clock", "tin", "garden", "candle", "box")


def catalogue(count: int = 60) -> list[CatalogItem]:
    rng = np.random.default_rng(3)
    return [
        CatalogItem.new(item_id=f"i{n}", title=" ".join(rng.choice(WORDS, 3, replace=False)))
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(catalogue(), ShoppersSettings())


def test_the_same_seed_is_the_same_truth_and_another_seed_another(truth: Truth) -> None:
    again = Truth(catalogue(), ShoppersSettings())
    other = Truth(catalogue(), ShoppersSettings(seed=ShoppersSettings().seed + 1))
    assert (again.vectors == truth.vectors).all()
    assert (again.factors == truth.factors).all()
    assert not np.allclose(other.factors, truth.factors)


@given(st.lists(st.integers(0, 59), min_size=1, max_size=12, unique=True), st.integers(0, 59))
def test_propensities_are_probabilities(rows: list[int], opened: int) -> None:
    truth = Truth(catalogue(), ShoppersSettings())
    shopper = Shopper(truth, "u", [f"i{opened}"])
    items = [f"i{row}" for row in rows]
    for chance in (
        truth.click_probability(shopper.taste, items, f"i{opened}"),
        truth.purchase_probability(shopper.taste, shopper.purchase_taste, items),
    ):
        assert chance.shape == (len(items),)
        assert ((chance > 0) & (chance < 1)).all()


def test_value_moves_purchases_and_leaves_clicks_alone(truth: Truth) -> None:
    taste = truth.taste("u", ["i0"])
    other = Truth(catalogue(), ShoppersSettings())
    other.factors = -truth.factors
    assert (
        other.click_probability(taste, truth.items, "i1") == truth.click_probability(taste, truth.items, "i1")
    ).all()
    best, worst = truth.items[int(truth.factors.argmax())], truth.items[int(truth.factors.argmin())]
    high, low = truth.purchase_probability(np.zeros_like(taste), np.ones(1), [best, worst])
    assert high > low
    flipped = other.purchase_probability(np.zeros_like(taste), np.ones(1), [best, worst])
    assert flipped[0] < flipped[1]


def test_choosing_by_purchase_sells_more_than_choosing_by_click(truth: Truth) -> None:
    """What the alignment is for: the items most clicked are not those that sell most once clicked."""
    gains = []
    for user in range(20):
        taste = truth.taste(f"u{user}", [f"i{user}"])
        clicks = truth.click_probability(taste, truth.items, None) / ShoppersSettings().click_position ** (
            np.arange(len(truth.items))
        )
        buys = truth.purchase_probability(taste, np.ones(1), truth.items)
        by_click, by_both = np.argsort(-clicks)[:5], np.argsort(-clicks * buys)[:5]
        gains.append((clicks * buys)[by_both].sum() / (clicks * buys)[by_click].sum())
    assert np.mean(gains) > 1.05


def test_a_click_is_likelier_on_an_earlier_place_and_on_what_the_page_is_about(truth: Truth) -> None:
    taste = truth.taste("u", ["i0"])
    first, second = truth.click_probability(taste, ["i5", "i5"], None)
    assert first > second
    assert truth.click_probability(taste, ["i5"], "i5")[0] > truth.click_probability(taste, ["i5"], None)[0]


def test_items_that_are_unknown_count_for_nothing(truth: Truth) -> None:
    known, mixed = Shopper(truth, "u", ["i1"]), Shopper(truth, "u", ["gone", "i1"])
    assert (known.taste == mixed.taste).all()
    assert mixed.past == ["i1"]
    stranger = Shopper(truth, "v", ["gone"])
    assert np.linalg.norm(stranger.taste) == pytest.approx(1)
    assert stranger.trigger(truth, np.random.default_rng(0)) in truth.row


def test_a_population_is_in_the_order_of_its_users(truth: Truth) -> None:
    made = population(truth, {"b": ["i1"], "a": ["i2"], "c": []})
    assert [shopper.user_id for shopper in made] == ["a", "b", "c"]


def test_a_hidden_taste_is_each_shoppers_own_and_no_title_says_it() -> None:
    settings = ShoppersSettings(value="taste")
    truth = Truth(catalogue(), settings)
    retitled = Truth([CatalogItem.new(item_id=item, title="mug") for item in truth.items], settings)
    shoppers = [Shopper(truth, f"u{n}", [f"i{n}", f"i{n + 20}"]) for n in range(40)]
    values = np.array([truth.factors @ shopper.purchase_taste for shopper in shoppers])
    assert (retitled.factors == truth.factors).all()
    assert (Shopper(retitled, "u0", ["i0", "i20"]).purchase_taste == shoppers[0].purchase_taste).all()
    # As unequal as a title's value to a shopper, and with hardly an order that all share.
    assert values.std(axis=1).mean() == pytest.approx(1, abs=0.15)
    assert values.mean(axis=0).std() < 0.5


def test_a_titles_value_is_the_same_to_all_shoppers(truth: Truth) -> None:
    first, second = Shopper(truth, "u", ["i1"]), Shopper(truth, "v", ["i2"])
    values = [truth.factors @ shopper.purchase_taste for shopper in (first, second)]
    assert (values[0] == values[1]).all()
    assert values[0].std() == pytest.approx(1)


def test_shoppers_look_from_the_top_and_stop_by_the_examination_curve() -> None:
    truth = Truth(catalogue(), ShoppersSettings(click_position=0.7))
    rng = np.random.default_rng(5)
    looked = np.array([truth.examined_places(10, rng) for _ in range(4000)])
    shares = (looked[:, None] > np.arange(10)).mean(axis=0)
    assert shares[0] == 1
    # A share of 4,000 has a standard error of .008 at most.
    assert np.abs(shares - truth.examination(10)).max() < 0.03
