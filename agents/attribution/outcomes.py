"""Impressions, clicks and purchases joined to the answer that led to them, summed by trial, user and cohort.

Only items of the recommendation count: an impression is a recommended item that was shown, a click a distinct
recommended item that was clicked, an order one that was bought; each at most once a request, clicks and
orders within the attribution window from the first impression (from the answer, where no impression came).
The revenue and the commission of an order are those of its first purchase. An answer without a trial (no
model in service, or a fallback outside the rollout) is no evidence for any arm and is not kept.

The window's first moment also says which cohort a request belongs to, with all that followed from it: a
purchase counts for the hour of its impression, not for its own. So cohorts of one age can be compared.

The counts of a request are a function of its events. The sums change by the difference to the counts before,
in the same script as the state: where an earlier impression comes late, all counts of the request move to the
earlier cohort. So the order of events does not matter, and an event that is read again changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

from agents.attribution.window_stage import Fences, WindowRules
from agents.attribution.window_states import SumChange
from streams.events import Click, Event, Impression, Purchase, Recommendation

VERSION: Final = 2
# An answer that is never shown has no event that ends it: this bounds the requests kept for a user.
MAX_REQUESTS: Final = 256
# Money is summed in whole hundredths of the shop's currency: integers add up exactly, whoever adds first.
_MONEY_UNIT: Final = 100

Counts = tuple[int, int, int, int, int, int]
Money = tuple[int, int]


def money_of(purchase: Purchase) -> Money:
    """(revenue, commission) of a purchase in hundredths of the currency; a commission not named is 0."""
    return (
        round(purchase.price * purchase.quantity * _MONEY_UNIT),
        round((purchase.commission or 0.0) * _MONEY_UNIT),
    )


@dataclass(frozen=True, slots=True)
class OutcomeRules(WindowRules):
    """The windows, and the length (ms) of a cohort."""

    cohort_ms: int


class RequestOutcome(msgspec.Struct, array_like=True):
    """The events of one request. `trial` None: its answer has not come. clicks, purchases: item -> first ts.

    `money`: item -> revenue and commission of its first purchase; of two at one time the larger counts, so
    that their order does not matter. `summed` and `summed_money`: the result of `counts` that the sums in
    Redis hold. Stored as an array, so the order of the fields is part of the stored layout; a state without
    the last two is one of an earlier version.
    """

    answered_at: int | None = None
    trial: str | None = None
    arm: str = ""
    bundle: str = ""
    items: list[str] = []
    first_shown_at: int | None = None
    shown_items: list[str] = []
    clicks: dict[str, int] = {}
    purchases: dict[str, int] = {}
    summed: tuple[int, int, int, int] = (0, 0, 0, 0)
    last_event_ts: int = 0
    money: dict[str, Money] = {}
    summed_money: Money = (0, 0)

    def newest_ts(self) -> int:
        """Time (ms) of the newest event: until it is forgotten, that event may be read again."""
        return self.last_event_ts or self.answered_at or 0

    def window_start(self) -> int:
        """The time (ms) from which the window is counted, and whose cohort this request belongs to."""
        if self.first_shown_at is not None:
            return self.first_shown_at
        if self.answered_at is not None:
            return self.answered_at
        return min((*self.clicks.values(), *self.purchases.values()), default=0)

    def counts(self, rules: OutcomeRules) -> Counts:
        """(cohort, impressions, clicks, orders, revenue, commission) so far; all 0 without the answer."""
        if self.trial is None:
            return 0, 0, 0, 0, 0, 0
        start = self.window_start()
        end = start + rules.window_ms
        items = set(self.items)
        ordered = [item for item, ts in self.purchases.items() if item in items and ts <= end]
        return (
            start // rules.cohort_ms,
            len(items.intersection(self.shown_items)),
            sum(item in items and ts <= end for item, ts in self.clicks.items()),
            len(ordered),
            sum(self.money.get(item, (0, 0))[0] for item in ordered),
            sum(self.money.get(item, (0, 0))[1] for item in ordered),
        )

    def add_purchase(self, purchase: Purchase) -> None:
        """The first purchase of an item counts, whichever comes first."""
        earlier = (self.purchases.get(purchase.item_id), self.money.get(purchase.item_id, (0, 0)))
        first = (purchase.ts, money_of(purchase))
        if earlier[0] is None or (first[0], *(-m for m in first[1])) < (
            earlier[0],
            *(-m for m in earlier[1]),
        ):
            self.purchases[purchase.item_id], self.money[purchase.item_id] = first


class OpenOutcomes(msgspec.Struct, array_like=True):
    """One user's requests whose window is open.

    Stored as an array, so the order of the fields is part of the stored layout.
    """

    version: int = VERSION
    requests: dict[str, RequestOutcome] = {}
    fences: Fences = {}
    last_ts: int = 0

    def add_event(self, event: Event, rules: WindowRules, closed_until: int | None) -> bool:
        """Put one event into the state. False: it is too late to change anything (`closed_until` in ms)."""
        if closed_until is not None and rules.forgotten_at(event.ts) <= closed_until:
            return False
        if isinstance(event, Recommendation):
            request = self._request(event.request_id)
            if request.trial is None:
                request.answered_at = event.ts
                request.trial = event.trial
                request.arm, request.bundle = event.arm or "", event.bundle or ""
                request.items = [item.item_id for item in event.items]
            return True
        assert isinstance(event, Impression | Click | Purchase)
        assert event.request_id is not None
        self.last_ts = max(self.last_ts, event.ts)
        request = self._request(event.request_id)
        request.last_event_ts = max(request.last_event_ts, event.ts)
        if isinstance(event, Impression):
            earlier = request.first_shown_at
            request.first_shown_at = event.ts if earlier is None else min(earlier, event.ts)
            request.shown_items = sorted({*request.shown_items, *event.item_ids})
        elif isinstance(event, Click):
            request.clicks[event.item_id] = min(event.ts, request.clicks.get(event.item_id, event.ts))
        else:
            request.add_purchase(event)
        return True

    def take_sum_changes(self, rules: OutcomeRules) -> list[SumChange]:
        """The changes of the sums since the last call: out of the old cohorts, into the new ones."""
        changes: dict[tuple[str, str, str, int], list[int]] = {}
        for request in self.requests.values():
            counts = request.counts(rules)
            summed = (*request.summed, *request.summed_money)
            if counts == summed or request.trial is None:
                continue
            for sign, (cohort, *numbers) in ((-1, summed), (1, counts)):
                key = (request.trial, request.arm, request.bundle, cohort)
                total = changes.setdefault(key, [0] * len(numbers))
                for place, number in enumerate(numbers):
                    total[place] += sign * number
            request.summed, request.summed_money = counts[:4], counts[4:]
        return [SumChange(*key, *total) for key, total in changes.items() if any(total)]

    def forget_finished(self, watermark: int, rules: WindowRules) -> int:
        """Drop requests that no event can change any more; the number of events that found no answer."""
        finished = [
            name for name, request in self.requests.items()
            if rules.forgotten_at(request.newest_ts()) <= watermark
        ]  # fmt: skip
        unattributed = 0
        for request_id in finished:
            request = self.requests.pop(request_id)
            if request.trial is None:
                unattributed += request.first_shown_at is not None
                unattributed += len(request.clicks) + len(request.purchases)
        return unattributed

    def next_due(self, rules: WindowRules, watermark: int | None = None) -> int | None:
        """When something is forgotten next (ms), after `watermark`; None: nothing is."""
        times = [rules.forgotten_at(request.newest_ts()) for request in self.requests.values()]
        if self.last_ts:
            times.append(rules.forgotten_at(self.last_ts))
        return min((t for t in times if watermark is None or t > watermark), default=None)

    def is_finished(self, watermark: int, rules: WindowRules) -> bool:
        """True where the state may be deleted: an event that is read again is too late by now."""
        return not self.requests and rules.forgotten_at(self.last_ts) <= watermark

    def _request(self, request_id: str) -> RequestOutcome:
        request = self.requests.get(request_id)
        if request is None:
            if len(self.requests) >= MAX_REQUESTS:
                not_shown = (name for name, other in self.requests.items() if other.first_shown_at is None)
                self.requests.pop(next(not_shown, next(iter(self.requests))))
            request = self.requests[request_id] = RequestOutcome(clicks={}, purchases={}, money={})
        return request
