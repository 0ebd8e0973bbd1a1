"""The benchmark of closed loops: shops of one start, whose lists are their arms', and what the page says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import lineage_shop
from benchmarks.lineage_models import ShopItems, log_purchase_rates, shop_items
from benchmarks.lineage_report import BEGIN, END, lines_of, publish, relative_change, tables_of
from benchmarks.lineage_shop import LineageShop
from benchmarks.lineage_variants import VARIANTS, CycleTrainer
from registry.arms import CHAMPION, DPO, SFT
from streams.events import CatalogItem, Event, Purchase, Trigger
from trainer.settings import TrainerSettings

ITEMS, USERS, START_MS = 30, 24, 1_700_000_000_000
WORDS = ("red", "blue", "lantern", "mug", "bag", "wooden", "heart", "clock", "tin", "garden")
SETTINGS = TrainerSettings.model_validate({
    "width": 16, "layers": 1, "heads": 2, "max_items": 8, "max_seconds": None, "validation_users": 6,
    "rewards": {"min_count": 1}, "dpo": {"max_seconds": None, "max_pairs": 32, "probe_users": 0},
    "min_validity": 0, "max_fall": 0.99,
})  # fmt: skip


class Year:
    """A log of purchases of a few items by a few users."""

    def catalogue(self) -> Iterator[CatalogItem]:
        for n in range(ITEMS):
            title = f"{WORDS[n % 10]} {WORDS[(n // 10 + 3 * n) % 10]} {WORDS[n // 3]}"
            yield CatalogItem.new(item_id=f"i{n}", title=title, price=1.0 + n)

    def events(self, start: int | None = None, end: int | None = None) -> Iterator[Event]:
        random = np.random.default_rng(0)
        for n in range(USERS * 6):
            item = f"i{random.integers(ITEMS)}"
            yield Purchase.new(
                event_id=f"e{n}", ts=START_MS + 1_000 * n, user_id=str(n % USERS), item_id=item, price=1.0
            )

    def profiles(self) -> Iterator[Any]:
        return iter(())

    def count(self, start: int | None = None, end: int | None = None) -> int:
        return USERS * 6


class FixedList:
    """A model that shows everybody the items from one on."""

    def __init__(self, number: int, first: int) -> None:
        self.number, self.first = number, first

    def best_items(self, pasts: Sequence[Any], k: int) -> list[list[int]]:
        return [[(self.first + place) % ITEMS for place in range(k)] for _ in pasts]


@pytest.fixture(scope="module")
def items() -> ShopItems:
    return shop_items(Year(), SETTINGS)


@pytest.fixture
def shop(items: ShopItems, monkeypatch: pytest.MonkeyPatch) -> LineageShop:
    monkeypatch.setattr(lineage_shop, "SESSIONS_PER_LOOK", 60)
    monkeypatch.setattr(lineage_shop, "LOOKS", 2)
    monkeypatch.setattr(lineage_shop, "JUDGING_SHOPPERS", 20)
    return LineageShop(1, "title", Year(), items)


def triggers() -> list[Trigger]:
    return [
        Trigger(
            schema_version=1, event_id=f"t{n}", ts=START_MS, request_id=f"r{n}", user_id=str(n), item_id="i29"
        )
        for n in range(USERS)
    ]


def test_every_request_is_answered_in_its_place_by_the_model_of_its_users_arm(shop: LineageShop) -> None:
    shop.arms = {CHAMPION: FixedList(1, 0), SFT: FixedList(2, 10)}  # type: ignore[dict-item]
    shop.weights = {CHAMPION: 0.5, SFT: 0.5}
    answers = shop.answer(triggers())
    assert [answer.request_id for answer in answers] == [f"r{n}" for n in range(USERS)]
    assert {answer.arm for answer in answers} == {CHAMPION, SFT}
    catalogue = shop.items.catalogue.item_ids
    for answer in answers:
        assert answer.arm == shop.arm_of(answer.user_id)
        assert answer.items[0].item_id == catalogue[0 if answer.arm == CHAMPION else 10]


def test_two_shops_of_one_start_do_not_change_one_another(shop: LineageShop) -> None:
    shop.start(FixedList(1, 0))  # type: ignore[arg-type]
    one, other = shop.copy(), shop.copy()
    before = (len(shop.log.users), len(shop.preference_pairs), shop.now, shop.shoppers[0].taste.copy())
    one.visit(40)
    one.turn_tastes()
    assert len(one.log.users) > before[0]
    for left in (shop, other):
        assert (len(left.log.users), len(left.preference_pairs), left.now) == before[:3]
        assert (left.shoppers[0].taste == before[3]).all()
    other.visit(40)
    other.turn_tastes()
    assert other.log == one.log
    assert (other.shoppers[0].taste == one.shoppers[0].taste).all()


def test_true_orders_a_page_are_what_clicks_and_conversion_come_to(shop: LineageShop) -> None:
    rates = shop.true_rates(FixedList(1, 0))  # type: ignore[arg-type]
    assert rates.orders == pytest.approx(10 * rates.ctr * rates.cvr, rel=1e-3)
    assert 0 < rates.cvr < 1


def test_an_item_that_is_bought_more_often_a_click_has_the_higher_rate_and_few_clicks_say_little() -> None:
    row_of = {"a": 0, "b": 1, "c": 2, "d": 3}
    clicks = [("a", 100), ("b", 100), ("c", 1)]
    orders = [("a", 50), ("b", 5), ("c", 1)]
    names = [name for name, count in clicks + orders for _ in range(count)]
    bought = [False] * 201 + [True] * 56
    rates = np.exp(log_purchase_rates(names, bought, row_of))
    assert rates[0] > rates[2] > rates[3] > rates[1]
    assert rates[3] == pytest.approx(56 / 201)  # nothing is known of it: as all
    assert rates[0] == pytest.approx((50 + 20 * 56 / 201) / 120)


@pytest.mark.learning
def test_every_variant_tries_what_its_name_says(shop: LineageShop) -> None:
    notes: list[str] = []
    trainer = CycleTrainer(shop.items, SETTINGS, notes.append)
    first = trainer.first_version(shop, 2)
    shop.start(first)
    arms = {}
    for name, variant in VARIANTS.items():
        own = trainer.copy()
        arms[name] = own.candidates(shop, variant, 2)
        assert all(version.number > first.number for version in arms[name].values()), name
        assert arms[name].keys() == ({SFT} if name == "sft" else {SFT, DPO}), (name, notes)
    past = [np.array([1, 2, 3])]
    for name in ("rates", "ric"):
        beside = arms[name][DPO]
        assert beside.model is arms[name][SFT].model
    asked, rates = arms["ric"][DPO], arms["rates"][DPO]
    assert asked.request is not None
    assert asked.request.any(), "the model has a token for what is asked for"
    assert rates.addend is not None
    assert len(rates.best_items(past, 5)[0]) == len(arms["rates"][SFT].best_items(past, 5)[0]) == 5
    aligned = arms["softmax_dpo"][DPO]
    assert aligned.tuned is arms["softmax_dpo"][SFT].model, "the next fine-tuning goes on from what was tuned"


def row(variant: str, seed: int, cvr: float, cycle: int = 2, did: str = "promote") -> dict[str, Any]:
    return {
        "value": "title", "variant": variant, "seed": seed, "cycle": cycle, "did": did, "ctr": 0.25,
        "cvr": cvr, "orders": 2.5 * cvr,
    }  # fmt: skip


ROWS = [
    row("sft", 4, 0.2, 1), row("sft", 4, 0.25), row("sft", 5, 0.3), row("softmax_dpo", 4, 0.3),
    row("softmax_dpo", 5, 0.33), row("rates", 4, 0.3, did="inconclusive"), row("rates", 5, 0.3),
]  # fmt: skip


def test_a_change_is_the_mean_of_log_ratios_and_its_interval_has_the_spread_of_the_seeds() -> None:
    change = relative_change({4: 0.3, 5: 0.33}, {4: 0.25, 5: 0.3})
    assert change.value == pytest.approx((1.2 * 1.1) ** 0.5 - 1)
    assert change.low < 0.1 < 0.2 < change.high
    alike = relative_change({4: 0.3, 5: 0.6, 6: 0.9}, {4: 0.2, 5: 0.4, 6: 0.6})
    assert alike == pytest.approx((0.5, 0.5, 0.5))
    alone = relative_change({4: 0.3, 9: 1.0}, {4: 0.2, 5: 0.3})
    assert alone.value == pytest.approx(0.5)
    assert np.isnan(alone.low)


@given(st.lists(st.tuples(st.floats(0.5, 1), st.floats(0.5, 1)), min_size=2, max_size=6))
def test_a_change_and_its_opposite_undo_one_another(rates: list[tuple[float, float]]) -> None:
    ours, theirs = ({seed: pair[side] for seed, pair in enumerate(rates)} for side in (0, 1))
    forth, back = relative_change(ours, theirs), relative_change(theirs, ours)
    assert (1 + forth.value) * (1 + back.value) == pytest.approx(1)
    assert (1 + forth.low) * (1 + back.high) == pytest.approx(1)
    assert forth.low <= forth.value <= forth.high


def test_the_last_cycle_counts_and_every_promotion() -> None:
    lines = lines_of(ROWS, "command")
    of_sft = [figure for figure in lines if (figure["model"], figure["seed"]) == ("sft", 4)]
    assert {figure["metric"]: figure["value"] for figure in of_sft}["true CVR"] == 0.25
    assert {figure["promotions"] for figure in of_sft} == {2}
    changes = {
        (figure["model"], figure["metric"]): figure for figure in lines if "change" in figure["metric"]
    }
    aligned = changes["softmax_dpo", "true CVR, change over sft"]
    assert aligned["value"] == pytest.approx((1.2 * 1.1) ** 0.5 - 1, abs=1e-4)
    assert changes["softmax_dpo", "true CVR, change over rates"]["value"] == pytest.approx(0.0488, abs=1e-4)


def test_the_page_is_made_of_the_lines_alone(tmp_path: Path) -> None:
    (tmp_path / "lineages.md").write_text(f"# Page\n\n{BEGIN}{END}")
    publish(ROWS, "command", tmp_path)
    page = (tmp_path / "lineages.md").read_text()
    assert "\n".join(tables_of(lines_of(ROWS, "another command"))).strip() in page
    assert "| sft | 2 | 1.5 | 0.2750 |" in page
    assert "| rates | 2 | 0.5 |" in page
    assert "own taste" not in page, "nothing was measured there"


def test_shops_are_told_apart_by_what_is_bought() -> None:
    other = [dict(figure, value="taste", cvr=figure["cvr"] / 2) for figure in ROWS]
    lines = lines_of([*ROWS, *other], "command")
    means = {
        figure["dataset"]: figure["value"]
        for figure in lines
        if (figure["model"], figure["seed"], figure["metric"]) == ("sft", 4, "true CVR")
    }
    assert sorted(means.values()) == [0.125, 0.25]
    assert sum(text.startswith("## ") for text in tables_of(lines)) == 2
