"""Preference pairs from clicks, purchases and slates, as pure functions over one user's open windows.

W is the attribution window. Without a request: a click on X is *converted* where the user bought X within W
after it. For a purchase of P at t, the rejected items are those clicked in [t-W, t], of which no such click
is converted and which were not bought in [t-W, t], most recently clicked first. With a request: when the
window of its first impression at t closes, what was shown, clicked and bought by t+W is one slate, which
gives

- purchased_over_clicked: bought over clicked and not bought,
- purchased_over_shown: bought over passed over,
- clicked_over_shown: clicked over passed over.

An item is passed over where it was shown above the lowest item of the slate that was clicked or bought, and
was neither itself. Users look from the top and stop: what stands below that item was perhaps never looked at,
and says nothing of what its user prefers ("click > skip above", Joachims et al. 2005). More rejected items
than `max_rejected` are a sample of all places alike, drawn by a hash: the first ones would always be those
at the top. An event with a request takes part only in its slate, except that an item which the user bought in
time, by whatever way, is never rejected. Events may come in any order within the allowed lateness: a window
is decided when it closes, never before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import msgspec

from agents.attribution.window_stage import Fences, WindowRules
from streams.events import Click, Impression, Purchase, Recommendation, Scheme

UserEvent = Click | Purchase | Impression | Recommendation

# A recommendation that is never shown keeps its slate waiting for an impression: this bounds a user's slates.
MAX_SLATES: Final = 256

# State of a purchase: part of a slate; without a request and undecided; without a request and decided.
OF_SLATE: Final = 0
UNDECIDED: Final = 1
DECIDED: Final = 2


# (request id, items shown from the top, items clicked or bought) -> how many of the places were looked at.
ExaminedPlaces = Callable[[str, Sequence[str], Collection[str]], int]


def places_above_lowest_response(request_id: str, shown: Sequence[str], responded: Collection[str]) -> int:
    """The places down to the lowest item that was clicked or bought: these were looked at for certain."""
    return max((place for place, item in enumerate(shown, 1) if item in responded), default=0)


@dataclass(frozen=True, slots=True)
class PairRules:
    """What decides pairs: the windows, how many items one pair rejects, which items have a SID, and how much
    of a slate was looked at."""

    windows: WindowRules
    max_rejected: int
    has_sid: Callable[[str], bool]
    examined: ExaminedPlaces = places_above_lowest_response


@dataclass(frozen=True, slots=True)
class PairDecision:
    """A pair before it has SIDs: after the history before `before` (ms) the user took `chosen`.

    `moment` (ms) is the time of the purchase or of the first impression. It is part of the pair's identity.
    """

    scheme: Scheme
    ts: int
    before: int
    chosen: str
    rejected: tuple[str, ...]
    request_id: str | None = None
    trigger: str | None = None
    moment: int = 0
    scene: str | None = None


class Slate(msgspec.Struct, array_like=True):
    """The events of one request: impressions (ts, items) in order, first click and purchase of each item.

    Stored as an array, so the order of the fields is part of the stored layout.
    """

    impressions: list[tuple[int, list[str]]] = []
    clicks: dict[str, int] = {}
    purchases: dict[str, int] = {}
    trigger: str | None = None
    recommended_at: int | None = None
    closed: bool = False
    last_event_ts: int = 0
    scene: str | None = None

    def first_shown_at(self) -> int | None:
        """First impression (ms); None: not shown yet."""
        return self.impressions[0][0] if self.impressions else None

    def newest_ts(self) -> int:
        """Time (ms) of the newest event. The slate stays until that event is forgotten, so it closes once."""
        return self.last_event_ts or self.recommended_at or 0


class OpenPairWindows(msgspec.Struct, array_like=True):
    """One user's open windows; clicks: item -> ts; purchases: item -> (ts, OF_SLATE | UNDECIDED | DECIDED).

    Stored as an array, so the order of the fields is part of the stored layout.
    """

    version: int = 1
    clicks: dict[str, list[int]] = {}
    purchases: dict[str, list[tuple[int, int]]] = {}
    slates: dict[str, Slate] = {}
    fences: Fences = {}
    last_ts: int = 0

    def add_event(self, event: UserEvent, windows: WindowRules, closed_until: int | None) -> bool:
        """Put one event into the state. False: it is too late to change anything (`closed_until` in ms)."""
        if closed_until is not None and windows.forgotten_at(event.ts) <= closed_until:
            return False
        slate = None if event.request_id is None else self._slate(event.request_id)
        if isinstance(event, Recommendation):
            assert slate is not None
            slate.trigger = slate.trigger or event.trigger_item_id
            slate.scene = slate.scene or event.scene
            slate.recommended_at = event.ts
            return True
        self.last_ts = max(self.last_ts, event.ts)
        if slate is not None:
            slate.last_event_ts = max(slate.last_event_ts, event.ts)
        if isinstance(event, Impression):
            impression = (event.ts, list(event.item_ids))
            if slate is not None and not slate.closed and impression not in slate.impressions:
                slate.impressions.append(impression)
                slate.impressions.sort()
        elif isinstance(event, Click):
            if slate is not None:
                _keep_earliest(slate.clicks, event.item_id, event.ts)
            elif event.ts not in (times := self.clicks.setdefault(event.item_id, [])):
                times.append(event.ts)
        else:
            if slate is not None:
                _keep_earliest(slate.purchases, event.item_id, event.ts)
            self._add_purchase(event.ts, event.item_id, UNDECIDED if slate is None else OF_SLATE)
        return True

    def close_due(self, watermark: int, rules: PairRules) -> list[PairDecision]:
        """Decide every window that closes at or before `watermark` (ms), and forget what no window needs."""
        windows = rules.windows
        decisions: list[PairDecision] = []
        for item, purchases in self.purchases.items():
            for place, (ts, status) in enumerate(purchases):
                if status == UNDECIDED and windows.closes_at(ts) <= watermark:
                    purchases[place] = (ts, DECIDED)
                    decision = self._decide_purchase(ts, item, rules)
                    if decision is not None:
                        decisions.append(decision)
        for request_id, slate in self.slates.items():
            shown_at = slate.first_shown_at()
            if shown_at is not None and not slate.closed and windows.closes_at(shown_at) <= watermark:
                decisions += self._decide_slate(request_id, slate, shown_at, rules)
                slate.closed = True
                slate.clicks, slate.purchases = {}, {}
                slate.impressions = [(shown_at, [])]
        self._forget(watermark, windows)
        return decisions

    def next_due(self, windows: WindowRules, watermark: int | None = None) -> int | None:
        """When something closes or is forgotten next (ms), after `watermark`; None: nothing does."""
        times = [windows.forgotten_at(self.last_ts)] if self.last_ts else []
        if self.clicks:  # a purchase is compared with clicks; without any, a late one makes it due
            times += [
                windows.closes_at(ts)
                for purchases in self.purchases.values()
                for ts, status in purchases
                if status == UNDECIDED
            ]
        for slate in self.slates.values():
            shown_at = slate.first_shown_at()
            if shown_at is not None and not slate.closed:
                times.append(windows.closes_at(shown_at))
            else:
                times.append(windows.forgotten_at(slate.newest_ts()))
        return min((t for t in times if watermark is None or t > watermark), default=None)

    def is_finished(self, watermark: int, windows: WindowRules) -> bool:
        """True where the state may be deleted: an event that is read again is too late by now."""
        is_empty = not (self.clicks or self.purchases or self.slates)
        return is_empty and windows.forgotten_at(self.last_ts) <= watermark

    def _forget(self, watermark: int, windows: WindowRules) -> None:
        def needed(ts: int) -> bool:
            return windows.forgotten_at(ts) > watermark

        clicks = {item: [ts for ts in times if needed(ts)] for item, times in self.clicks.items()}
        self.clicks = {item: times for item, times in clicks.items() if times}
        purchases = {item: [p for p in bought if needed(p[0])] for item, bought in self.purchases.items()}
        self.purchases = {item: bought for item, bought in purchases.items() if bought}
        self.slates = {name: slate for name, slate in self.slates.items() if needed(slate.newest_ts())}

    def _slate(self, request_id: str) -> Slate:
        slate = self.slates.get(request_id)
        if slate is None:
            if len(self.slates) >= MAX_SLATES:
                not_shown = (name for name, other in self.slates.items() if other.first_shown_at() is None)
                self.slates.pop(next(not_shown, next(iter(self.slates))))
            slate = self.slates[request_id] = Slate([], {}, {})
        return slate

    def _add_purchase(self, ts: int, item: str, status: int) -> None:
        purchases = self.purchases.setdefault(item, [])
        # Two purchases of one moment, or one that is read again, make one decision; a decided one stays so.
        if not any(at == ts and (other == OF_SLATE) == (status == OF_SLATE) for at, other in purchases):
            purchases.append((ts, status))

    def _was_bought(self, item: str, first: int, last: int) -> bool:
        return any(first <= ts <= last for ts, _ in self.purchases.get(item, ()))

    def _decide_purchase(self, ts: int, item: str, rules: PairRules) -> PairDecision | None:
        """The pair of a purchase without a request, if it has rejected items."""
        if not self.clicks or not rules.has_sid(item):
            return None
        window = rules.windows.window_ms
        clicks = {
            clicked: times
            for clicked, all_times in self.clicks.items()
            if (times := [at for at in all_times if ts - window <= at <= ts])
        }
        rejected = [
            clicked
            for clicked, times in clicks.items()
            if clicked != item
            and rules.has_sid(clicked)
            and not self._was_bought(clicked, ts - window, ts)
            and not any(self._was_bought(clicked, at, at + window) for at in times)
        ]
        if not rejected:
            return None
        rejected.sort(key=lambda clicked: (-max(clicks[clicked]), clicked))
        rejected = rejected[: rules.max_rejected]
        before = min([ts, *clicks.get(item, ()), *(at for clicked in rejected for at in clicks[clicked])])
        return PairDecision("purchased_over_clicked", ts, before, item, tuple(rejected), moment=ts)

    def _decide_slate(
        self, request_id: str, slate: Slate, shown_at: int, rules: PairRules
    ) -> list[PairDecision]:
        """The pairs of a slate whose window is over."""
        last = shown_at + rules.windows.window_ms
        shown_in_time = (item for ts, items in slate.impressions if ts <= last for item in items)
        shown = list(dict.fromkeys(shown_in_time))
        bought = {i: slate.purchases[i] for i in shown if slate.purchases.get(i, last + 1) <= last}
        clicked = {i: slate.clicks[i] for i in shown if slate.clicks.get(i, last + 1) <= last}
        examined = shown[: rules.examined(request_id, shown, bought.keys() | clicked.keys())]
        not_bought = [
            i for i in shown
            if rules.has_sid(i) and i not in bought and not self._was_bought(i, shown_at, last)
        ]  # fmt: skip
        clicked_only = [i for i in not_bought if i in clicked]
        passed_over = [i for i in examined if i in not_bought and i not in clicked]
        decisions: list[PairDecision] = []

        def decide(scheme: Scheme, chosen: dict[str, int], candidates: Iterable[str]) -> None:
            rejected = tuple(sorted(candidates, key=lambda item: _draw(request_id, item)))
            for item, ts in chosen.items():
                if rejected and rules.has_sid(item):
                    origin = (request_id, slate.trigger, shown_at, slate.scene)
                    kept = rejected[: rules.max_rejected]
                    decisions.append(PairDecision(scheme, ts, shown_at, item, kept, *origin))

        decide("purchased_over_clicked", bought, clicked_only)
        decide("purchased_over_shown", bought, passed_over)
        decide("clicked_over_shown", clicked, passed_over)
        return decisions


def pair_id(user: str, decision: PairDecision, codebook: str) -> str:
    """32 hex digits: the same decision under the same codebook is the same pair."""
    content = msgspec.json.encode(
        [
            user, decision.scheme, decision.request_id or decision.moment, decision.chosen,
            sorted(decision.rejected), codebook,
        ]
    )  # fmt: skip
    return blake2b(content, digest_size=16).hexdigest()


def _draw(request_id: str, item: str) -> bytes:
    """Where an item stands in the sample of a slate: by chance, and the same for the same events."""
    return blake2b(f"{request_id}\x1f{item}".encode(), digest_size=8).digest()


def _keep_earliest(times: dict[str, int], item: str, ts: int) -> None:
    times[item] = min(ts, times.get(item, ts))
