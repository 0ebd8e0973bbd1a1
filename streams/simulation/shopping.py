"""The shopping loop: simulated shoppers open pages, look at the answers, click and buy.

One session is a trigger, the recommendation that answers it, an impression of all its items, a click on some
of them and a purchase of some of the clicked. Decisions are drawn from (seed, time of the session, first item
shown), so that they do not depend on the wall clock; what is shown depends on the model in service.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from streams.errors import SidstreamError
from streams.events import Click, Event, Impression, Purchase, Recommendation, Trigger
from streams.settings import ShoppersSettings
from streams.simulation.shoppers import Shopper, Truth

# Event time from a page to a click on it, and from a click to the purchase: seconds.
_TO_CLICK_S = (2, 60)
_TO_PURCHASE_S = (20, 600)


class Asks(Protocol):
    """What the loop needs of a client."""

    def submit(self, trigger: Trigger, timeout: float = ...) -> Future[Recommendation]: ...

    def publish_all(
        self, events: Iterable[Event], on_progress: Callable[[int], Any] | None = None
    ) -> int: ...


@dataclass
class Tally:
    """What one arm's shoppers did, and what the truth expected of what they were shown."""

    sessions: int = 0
    shown: int = 0
    clicks: int = 0
    purchases: int = 0
    expected_clicks: float = 0.0
    expected_purchases: float = 0.0

    @property
    def ctr(self) -> float:
        """Clicks an item shown."""
        return self.clicks / self.shown if self.shown else 0.0

    @property
    def cvr(self) -> float:
        """Purchases a click."""
        return self.purchases / self.clicks if self.clicks else 0.0


@dataclass
class Shopping:
    """The sum of a run, by arm and bundle; `end_ts` is where the simulated clock stopped (ms)."""

    end_ts: int
    arms: dict[str, Tally] = field(default_factory=dict)
    unanswered: int = 0


class ShoppingTrip:
    """A run of sessions of one population against one recommender."""

    def __init__(
        self, client: Asks, truth: Truth, shoppers: list[Shopper], settings: ShoppersSettings, start_ts: int
    ) -> None:
        self._client = client
        self._truth = truth
        self._shoppers = shoppers
        self._settings = settings
        self._start_ts = start_ts

    def run(
        self, sessions: int, prices: dict[str, float], on_progress: Callable[[int], Any] | None = None
    ) -> Shopping:
        """Play `sessions` sessions and publish what the shoppers did, in event time."""
        settings = self._settings
        # The run's own seed: two runs that start at different times are different days.
        rng = np.random.default_rng([settings.seed, self._start_ts // 1000])
        result = Shopping(end_ts=self._start_ts)
        done = 0
        while done < sessions:
            count = min(settings.batch, sessions - done, len(self._shoppers))
            chosen = rng.choice(len(self._shoppers), size=count, replace=False)
            waiting = []
            for n, index in enumerate(chosen):
                shopper = self._shoppers[int(index)]
                ts = self._start_ts + int((done + n) * settings.session_spacing_s * 1000)
                trigger = self._trigger(shopper, ts, rng)
                waiting.append((shopper, ts, trigger, self._client.submit(trigger, settings.timeout_s)))
            events: list[Event] = []
            for shopper, ts, trigger, future in waiting:
                try:
                    answer = future.result()
                except SidstreamError:
                    result.unanswered += 1
                    continue
                events.extend(self._visit(shopper, ts, trigger, answer, prices, result))
            events.sort(key=lambda event: event.ts)
            self._client.publish_all(events)
            done += count
            result.end_ts = self._start_ts + int(done * settings.session_spacing_s * 1000)
            if on_progress:
                on_progress(count)
        return result

    def _trigger(self, shopper: Shopper, ts: int, rng: np.random.Generator) -> Trigger:
        request_id = f"shop-{ts}-{shopper.user_id}"
        return Trigger.new(
            event_id=request_id, request_id=request_id, ts=ts, user_id=shopper.user_id,
            item_id=shopper.trigger(self._truth, rng), scene="item-page", k=self._settings.k,
        )  # fmt: skip

    def _visit(
        self,
        shopper: Shopper,
        ts: int,
        trigger: Trigger,
        answer: Recommendation,
        prices: dict[str, float],
        result: Shopping,
    ) -> Iterable[Event]:
        """The events of one session, and the tally of its arm."""
        items = [item.item_id for item in answer.items if item.item_id in self._truth.row]
        if not items:
            return
        user, request = shopper.user_id, trigger.request_id
        rng = np.random.default_rng([self._settings.seed, ts // 1000, self._truth.row[items[0]]])
        click_chance = self._truth.click_probability(shopper.taste, items, trigger.item_id)
        buy_chance = self._truth.purchase_probability(shopper.taste, shopper.purchase_taste, items)
        tally = result.arms.setdefault(f"{answer.arm or '-'} {answer.bundle or '-'}", Tally())
        tally.sessions += 1
        tally.shown += len(items)
        tally.expected_clicks += float(click_chance.sum())
        tally.expected_purchases += float((click_chance * buy_chance).sum())
        examination = self._truth.examination(len(items))
        examined = self._truth.examined_places(len(items), rng)
        yield Impression.new(
            event_id=f"{request}-i", ts=ts + 200, user_id=user, item_ids=items, request_id=request,
            scene=trigger.scene,
        )  # fmt: skip
        for place, item in enumerate(items[:examined]):
            if rng.random() >= click_chance[place] / examination[place]:
                continue
            clicked = ts + int(rng.integers(*_TO_CLICK_S) * 1000)
            tally.clicks += 1
            yield Click.new(
                event_id=f"{request}-c{place}", ts=clicked, user_id=user, item_id=item,
                request_id=request, scene=trigger.scene,
            )  # fmt: skip
            if rng.random() >= buy_chance[place]:
                continue
            tally.purchases += 1
            yield Purchase.new(
                event_id=f"{request}-p{place}", ts=clicked + int(rng.integers(*_TO_PURCHASE_S) * 1000),
                user_id=user, item_id=item, price=prices.get(item, 0.0), request_id=request,
            )  # fmt: skip
