"""A shop of one lineage for `benchmarks.lineages`: shoppers, log, preference pairs, trials, in one process.

What a cycle does is done by the product's own functions; what Kafka, Redis, MLflow and the serving process do
between them is a list, a dictionary and a call here.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agents.attribution.pairs import OpenPairWindows, PairDecision, PairRules
from agents.attribution.window_stage import WindowRules
from benchmarks.lineage_models import SHOWN_ITEMS, ModelVersion, ShopItems
from registry.arms import CHAMPION
from registry.experiment.decision import Judgement, judge
from registry.experiment.statistics import arm_sums
from registry.settings import GateSettings, RolloutSettings
from streams.events import (
    Click,
    Event,
    Impression,
    PreferencePair,
    Purchase,
    RankedItem,
    Recommendation,
    Trigger,
)
from streams.replay import EventSource, user_item_sequences
from streams.settings import ShoppersSettings
from streams.simulation.shoppers import Truth, population
from streams.simulation.shopping import ShoppingTrip

WINDOW_MS, DAY_MS = 86_400_000, 86_400_000
TASTE_DRIFT = 0.2
# Sessions between two looks at a trial, and the looks after which it ends undecided.
SESSIONS_PER_LOOK, LOOKS = 3000, 4
# Sessions in flight at once: as many requests are answered in one batch.
BATCH = 1000
JUDGING_SHOPPERS = 2000
CODEBOOK_ID = "codebook"
RULES = WindowRules(WINDOW_MS, 0)
GATE = GateSettings.model_validate({})
ROLLOUT = RolloutSettings.model_validate({})


@dataclass
class InteractionLog:
    """Clicks and purchases in the order of their arrival, as the trainer's log has them."""

    users: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    ts: list[int] = field(default_factory=list)
    bought: list[bool] = field(default_factory=list)

    def add(self, user: str, item: str, ts: int, bought: bool) -> None:
        self.users.append(user)
        self.items.append(item)
        self.ts.append(ts)
        self.bought.append(bought)

    def copy(self) -> InteractionLog:
        return InteractionLog(list(self.users), list(self.items), list(self.ts), list(self.bought))


@dataclass(frozen=True)
class TrueRates:
    """What is expected of what a model shows, by the true chances of clicks and purchases."""

    ctr: float  # clicks an item shown
    cvr: float  # orders a click
    orders: float  # a page of SHOWN_ITEMS


class LineageShop:
    """One lineage's shoppers, what they did, and the models in service and on trial."""

    def __init__(self, seed: int, value: str, year: EventSource, items: ShopItems) -> None:
        """`value`: as in `ShoppersSettings`, what is worth buying; `year`: a log of purchases."""
        self.seed, self.items = seed, items
        self.random = np.random.default_rng(seed)
        self.shoppers_settings = ShoppersSettings.model_validate(
            {"seed": seed, "value": value, "batch": BATCH, "k": SHOWN_ITEMS}
        )
        self.truth = Truth(list(year.catalogue()), self.shoppers_settings)
        self.shoppers = population(self.truth, user_item_sequences(year))
        self.log = InteractionLog()
        for event in year.events():
            self.log.add(str(event.user_id), str(event.item_id), event.ts, True)  # type: ignore[attr-defined]
        # Rows from here on are of shoppers, who click before they buy: the year has purchases alone.
        self.first_visit = len(self.log.users)
        self.now = max(self.log.ts) + DAY_MS
        self.rows_seen_by_champion = 0  # rows of the log that the champion has learned from
        self.history: dict[str, list[int]] = defaultdict(list)
        for at in np.argsort(self.log.ts, kind="stable").tolist():
            self._remember(self.log.users[at], self.log.items[at])
        self.open_windows: dict[str, OpenPairWindows] = defaultdict(OpenPairWindows)
        self.preference_pairs: list[PreferencePair] = []
        self.arms: dict[str, ModelVersion] = {}
        self.weights: dict[str, float] = {}
        self.outcome_sums: dict[str, np.ndarray] = {}
        self.trial = 0

    def copy(self) -> LineageShop:
        """A shop that goes on from here on its own; models, items and the truth are shared."""
        twin = copy.copy(self)
        twin.random = copy.deepcopy(self.random)
        twin.shoppers = [copy.copy(shopper) for shopper in self.shoppers]
        twin.log = self.log.copy()
        twin.history = defaultdict(list, {user: list(rows) for user, rows in self.history.items()})
        twin.open_windows = copy.deepcopy(self.open_windows)
        twin.preference_pairs = list(self.preference_pairs)
        twin.arms, twin.weights = dict(self.arms), dict(self.weights)
        twin.outcome_sums = copy.deepcopy(self.outcome_sums)
        return twin

    def _remember(self, user: str, item: str) -> None:
        row = self.items.row_of.get(item)
        if row is not None:
            self.history[user].append(row)

    # What the shopping loop calls

    def answer(self, triggers: list[Trigger]) -> list[Recommendation]:
        """The ten best of each request, from the model of its user's arm; the page's own item left out."""
        by_arm: dict[str, list[int]] = defaultdict(list)
        for at, trigger in enumerate(triggers):
            by_arm[self.arm_of(trigger.user_id)].append(at)
        replies: dict[int, Recommendation] = {}
        for arm, places in by_arm.items():
            asked = [triggers[at] for at in places]
            for at, trigger, rows in zip(places, asked, self.rank(self.arms[arm], asked), strict=True):
                replies[at] = self._reply(trigger, arm, rows)
        return [replies[at] for at in range(len(triggers))]

    def arm_of(self, user: str) -> str:
        """The arm of a user; each trial assigns users anew."""
        if len(self.weights) == 1:
            return next(iter(self.weights))
        share = np.random.default_rng([self.seed, self.trial, int(user)]).random()
        for arm, weight in self.weights.items():
            share -= weight
            if share < 0:
                return arm
        return CHAMPION

    def rank(self, version: ModelVersion, triggers: list[Trigger]) -> list[list[int]]:
        """Rows of the ten best items of each request."""
        pages = [self.items.row_of[trigger.item_id or ""] for trigger in triggers]
        length = self.items.prompt.max_items - 1
        pasts = [
            np.array([*self.history[trigger.user_id][-length:], page])
            for trigger, page in zip(triggers, pages, strict=True)
        ]
        return [
            [row for row in rows if row >= 0 and row != page][:SHOWN_ITEMS]
            for rows, page in zip(version.best_items(pasts, SHOWN_ITEMS + 1), pages, strict=True)
        ]

    def _reply(self, trigger: Trigger, arm: str, rows: list[int]) -> Recommendation:
        catalogue = self.items.catalogue
        items = [
            RankedItem(item_id=catalogue.item_ids[row], sid=list(catalogue.sids[row]), score=-1.0 - place)
            for place, row in enumerate(rows)
        ]
        return Recommendation(
            schema_version=1, event_id=f"a-{trigger.request_id}", ts=trigger.ts,
            request_id=trigger.request_id,
            user_id=trigger.user_id, items=items, bundle=str(self.arms[arm].number), arm=arm, trial="t",
            scene=trigger.scene, trigger_item_id=trigger.item_id,
        )  # fmt: skip

    def record_events(self, events: Iterable[Event]) -> int:
        """Apply events to histories, log, sums of the trial and open windows, as the agents do; how many."""
        count = 0
        for event in events:
            count += 1
            if not isinstance(event, Impression | Click | Purchase):
                continue
            user = event.user_id
            self.open_windows[user].add_event(event, RULES, None)
            sums_of = self.outcome_sums.setdefault(user, np.zeros(3, np.int64))
            if isinstance(event, Impression):
                sums_of[0] += len(event.item_ids)
                continue
            bought = isinstance(event, Purchase)
            sums_of[2 if bought else 1] += 1
            self.log.add(user, event.item_id, event.ts, bought)
            self._remember(user, event.item_id)
        return count

    def visit(self, sessions: int) -> None:
        """Let shoppers visit; then all windows close."""
        prices = self.items.prices
        trip = ShoppingTrip(
            InProcessClient(self), self.truth, self.shoppers, self.shoppers_settings, self.now
        )
        self.now = trip.run(sessions, prices).end_ts + 2 * WINDOW_MS
        rules = PairRules(RULES, SHOWN_ITEMS, lambda item: item in self.items.row_of)
        for user, state in self.open_windows.items():
            for decision in state.close_due(self.now, rules):
                self.preference_pairs.append(self._pair(user, decision))

    def _pair(self, user: str, decision: PairDecision) -> PreferencePair:
        # What came since the page was opened is at the end of the history: its items are left out.
        row_of, sid, length = self.items.row_of, self.items.catalogue.sids, self.items.prompt.max_items
        later = {row_of[item] for item in (decision.chosen, *decision.rejected)}
        past = [row for row in self.history[user][-2 * length :] if row not in later][-length:]
        page = row_of.get(decision.trigger or "")
        return PreferencePair(
            schema_version=1, event_id=f"{user}-{decision.ts}-{decision.scheme}-{decision.chosen}",
            ts=decision.ts, user_id=user, scheme=decision.scheme, codebook=CODEBOOK_ID,
            chosen_item=decision.chosen,
            chosen=list(sid[row_of[decision.chosen]]), rejected_items=list(decision.rejected),
            rejected=[list(sid[row_of[item]]) for item in decision.rejected],
            history=[list(sid[row]) for row in past], trigger=None if page is None else list(sid[page]),
        )  # fmt: skip

    # The trial

    def start(self, version: ModelVersion) -> None:
        """Put the first model in service."""
        self.arms, self.weights = {CHAMPION: version}, {CHAMPION: 1.0}
        self.rows_seen_by_champion = len(self.log.users)
        self.visit(SESSIONS_PER_LOOK)

    def try_out(self, candidates: dict[str, ModelVersion]) -> Judgement:
        """Put candidates, by arm, on trial beside the champion; promote what the gate promotes."""
        self.trial += 1
        self.arms = {CHAMPION: self.arms[CHAMPION], **candidates}
        shares = np.array([getattr(ROLLOUT, share) for share in ("champion", "sft", "dpo")[: len(self.arms)]])
        self.weights = dict(zip(self.arms, (shares / shares.sum()).tolist(), strict=True))
        self.outcome_sums.clear()
        bundles = {name: str(version.number) for name, version in self.arms.items()}
        read = len(self.log.users)
        for _ in range(LOOKS):
            self.visit(SESSIONS_PER_LOOK)
            by_arm: dict[str, list[np.ndarray]] = {name: [] for name in self.arms}
            for user, counts in self.outcome_sums.items():
                by_arm[self.arm_of(user)].append(counts)
            arms = {name: arm_sums(np.array(rows).reshape(-1, 3)) for name, rows in by_arm.items()}
            verdict = judge(arms, GATE, GATE.mode, self.weights, bundles)
            if verdict.verdict != "inconclusive":
                break
        if verdict.verdict == "promote":
            self.arms[CHAMPION] = self.arms[verdict.winner]
            self.rows_seen_by_champion = read
        self.arms, self.weights = {CHAMPION: self.arms[CHAMPION]}, {CHAMPION: 1.0}
        return verdict

    def true_rates(self, version: ModelVersion) -> TrueRates:
        """Of what a model shows to 2,000 shoppers, the same ones for every model."""
        random = np.random.default_rng([self.seed, 7])
        shoppers = [self.shoppers[int(i)] for i in random.choice(len(self.shoppers), JUDGING_SHOPPERS)]
        triggers = [
            Trigger(schema_version=1, event_id="", ts=0, request_id="", user_id=shopper.user_id,
                    item_id=shopper.trigger(self.truth, random))
            for shopper in shoppers
        ]  # fmt: skip
        clicks = orders = shown = 0.0
        for shopper, trigger, rows in zip(shoppers, triggers, self.rank(version, triggers), strict=True):
            items = [self.items.catalogue.item_ids[row] for row in rows]
            chance = self.truth.click_probability(shopper.taste, items, trigger.item_id)
            bought = self.truth.purchase_probability(shopper.taste, shopper.purchase_taste, items)
            clicks += float(chance.sum())
            orders += float((chance * bought).sum())
            shown += len(items)
        return TrueRates(
            round(clicks / shown, 5), round(orders / clicks, 5), round(SHOWN_ITEMS * orders / shown, 5)
        )

    def turn_tastes(self) -> None:
        """What each shopper clicks turns by about 12 degrees."""
        for shopper in self.shoppers:
            noise = TASTE_DRIFT * self.random.standard_normal(len(shopper.taste)) / len(shopper.taste) ** 0.5
            moved = shopper.taste + noise
            shopper.taste = moved / np.linalg.norm(moved)


class InProcessClient:
    """A client of the shopping loop that answers from models in this process, a batch at a time."""

    def __init__(self, shop: LineageShop) -> None:
        self.shop = shop
        self._waiting: list[tuple[Trigger, Future[Recommendation]]] = []

    def submit(self, trigger: Trigger, timeout: float = 0.0) -> Future[Recommendation]:
        """A future that the whole batch of triggers resolves when its first result is read."""
        promise = _LazyRecommendation(self._answer)
        self._waiting.append((trigger, promise))
        return promise

    def _answer(self) -> None:
        waiting, self._waiting = self._waiting, []
        answers = self.shop.answer([trigger for trigger, _ in waiting])
        for (_, promise), answer in zip(waiting, answers, strict=True):
            promise.set_result(answer)

    def publish_all(self, events: Iterable[Event], on_progress: Callable[[int], Any] | None = None) -> int:
        """Record the events in the shop at once."""
        return self.shop.record_events(events)


class _LazyRecommendation(Future[Recommendation]):
    def __init__(self, make: Callable[[], None]) -> None:
        super().__init__()
        self._make = make

    def result(self, timeout: float | None = None) -> Recommendation:
        if not self.done():
            self._make()
        return super().result(timeout)
