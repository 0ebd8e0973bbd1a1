"""Preference pairs from clicks, purchases and slates, as pure functions over one user's open windows.

W is the attribution window. Without a request: a click on X is *converted* where the user bought X within W
after it. For a purchase of P at t, the rejected items are those clicked in [t-W, t], of which no such click
is converted and which were not bought in [t-W, t], most recently clicked first. With a request: when the
window of its first impression at t closes, what was shown, clicked and bought by t+W is one slate, which
gives

- purchased_over_clicked: bought over clicked and not bought,
- purchased_over_shown: bought over shown and neither clicked nor bought,
- clicked_over_shown: clicked over shown and neither clicked nor bought,

the rejected ones nearest to the top first. An event with a request takes part only in its slate, except that
an item which the user bought in time, by whatever way, is never rejected. Events may come in any order within
the allowed lateness: a window is looked at when it closes, never before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import msgspec

from agents.attribution.window_stage import Fences, WindowRules
from streams.events import Click, Impression, Purchase, Recommendation, Scheme

UserEvent = Click | Purchase | Impression | Recommendation

# A slate whose recommendation was never shown waits for its impression; a user has at most so many slates.
MAX_SLATES: Final = 256


class Slate(msgspec.Struct, array_like=True):
    """What is known of one request: impressions (ts, items) in order, first click and purchase of an item."""

    impressions: list[tuple[int, list[str]]] = []
    clicks: dict[str, int] = {}
    bought: dict[str, int] = {}
    trigger: str | None = None
    recommended: int | None = None
    closed: bool = False
    last: int = 0
    scene: str | None = None

    def opened(self) -> int | None:
        """First impression (ms); None: not shown yet."""
        return self.impressions[0][0] if self.impressions else None

    def newest(self) -> int:
        """Time (ms) of its newest event: until that is forgotten, the slate must be known as closed."""
        return self.last or self.recommended or 0


# What a purchase is here: of a slate; without a request and undecided; without a request and decided.
OF_SLATE: Final = 0
WAITS: Final = 1
DECIDED: Final = 2


class OpenPairWindows(msgspec.Struct, array_like=True):
    """One user's open windows. Clicks: item -> ts, purchases: item -> (ts, OF_SLATE | WAITS | DECIDED)."""

    version: int = 1
    clicks: dict[str, list[int]] = {}
    purchases: dict[str, list[tuple[int, int]]] = {}
    slates: dict[str, Slate] = {}
    fences: Fences = {}
    last_ts: int = 0


@dataclass(frozen=True, slots=True)
class PairDecision:
    """A pair before it has SIDs: with the past before `before` the user took `chosen`, not `rejected`."""

    scheme: Scheme
    ts: int
    before: int
    chosen: str
    rejected: tuple[str, ...]
    request_id: str | None = None
    trigger: str | None = None
    # When the decision was asked for: part of the pair's identity, like the request.
    moment: int = 0
    scene: str | None = None


def add(state: OpenPairWindows, event: UserEvent, rules: WindowRules, matured: int | None) -> bool:
    """Put one event into the state. False: it came too late to change anything."""
    if matured is not None and rules.forgets(event.ts) <= matured:
        return False
    slate = None if event.request_id is None else _slate(state, event.request_id)
    if isinstance(event, Recommendation):
        assert slate is not None
        slate.trigger = slate.trigger or event.trigger_item_id
        slate.scene = slate.scene or event.scene
        slate.recommended = event.ts
        return True
    state.last_ts = max(state.last_ts, event.ts)
    if slate is not None:
        slate.last = max(slate.last, event.ts)
    if isinstance(event, Impression):
        shown = (event.ts, list(event.item_ids))
        if slate is not None and not slate.closed and shown not in slate.impressions:
            slate.impressions.append(shown)
            slate.impressions.sort()
    elif isinstance(event, Click):
        if slate is not None:
            _earliest(slate.clicks, event.item_id, event.ts)
        elif event.ts not in (times := state.clicks.setdefault(event.item_id, [])):
            times.append(event.ts)
    else:
        if slate is not None:
            _earliest(slate.bought, event.item_id, event.ts)
        _buy(state, event.ts, event.item_id, WAITS if slate is None else OF_SLATE)
    return True


def close(
    state: OpenPairWindows,
    watermark: int,
    rules: WindowRules,
    max_rejected: int,
    known: Callable[[str], bool],
) -> list[PairDecision]:
    """Decide what event time has passed, and forget what nothing can ask for any more.

    `known(item)`: the item has a SID; others are left out.
    """
    decisions: list[PairDecision] = []
    for item, sales in state.purchases.items():
        for place, (ts, standing) in enumerate(sales):
            if standing == WAITS and rules.closes(ts) <= watermark:
                sales[place] = (ts, DECIDED)
                decision = _of_purchase(state, ts, item, rules, max_rejected, known)
                if decision is not None:
                    decisions.append(decision)
    for request_id, slate in state.slates.items():
        opened = slate.opened()
        if opened is not None and not slate.closed and rules.closes(opened) <= watermark:
            decisions += _of_slate(state, request_id, slate, opened, rules, max_rejected, known)
            slate.closed = True
            slate.clicks, slate.bought = {}, {}
            slate.impressions = [(opened, [])]
    clicks = {i: [ts for ts in times if rules.forgets(ts) > watermark] for i, times in state.clicks.items()}
    state.clicks = {item: times for item, times in clicks.items() if times}
    sold = {i: [s for s in sales if rules.forgets(s[0]) > watermark] for i, sales in state.purchases.items()}
    state.purchases = {item: sales for item, sales in sold.items() if sales}
    state.slates = {r: s for r, s in state.slates.items() if rules.forgets(s.newest()) > watermark}
    return decisions


def due(state: OpenPairWindows, rules: WindowRules, watermark: int | None = None) -> int | None:
    """When something closes next (ms), after `watermark`; None: nothing does."""
    times = [rules.forgets(state.last_ts)] if state.last_ts else []
    if state.clicks:  # a purchase is compared with clicks; without any, a late one makes it due
        times += [
            rules.closes(ts) for sales in state.purchases.values() for ts, kind in sales if kind == WAITS
        ]
    for slate in state.slates.values():
        opened = slate.opened()
        waits = opened is not None and not slate.closed
        times.append(rules.closes(opened or 0) if waits else rules.forgets(slate.newest()))
    return min((t for t in times if watermark is None or t > watermark), default=None)


def empty(state: OpenPairWindows, watermark: int, rules: WindowRules) -> bool:
    """True where the state may be deleted: an event seen again would be too late by now."""
    return not (state.clicks or state.purchases or state.slates) and rules.forgets(state.last_ts) <= watermark


def pair_id(user: str, decision: PairDecision, codebook: str) -> str:
    """32 hex digits: the same decision under the same codebook is the same pair."""
    content = msgspec.json.encode(
        [
            user, decision.scheme, decision.request_id or decision.moment, decision.chosen,
            sorted(decision.rejected), codebook,
        ]
    )  # fmt: skip
    return blake2b(content, digest_size=16).hexdigest()


def _slate(state: OpenPairWindows, request_id: str) -> Slate:
    slate = state.slates.get(request_id)
    if slate is None:
        if len(state.slates) >= MAX_SLATES:
            unshown = (r for r, s in state.slates.items() if s.opened() is None)
            state.slates.pop(next(unshown, next(iter(state.slates))))
        slate = state.slates[request_id] = Slate([], {}, {})
    return slate


def _earliest(times: dict[str, int], item: str, ts: int) -> None:
    times[item] = min(ts, times.get(item, ts))


def _buy(state: OpenPairWindows, ts: int, item: str, standing: int) -> None:
    sales = state.purchases.setdefault(item, [])
    # Bought twice in one moment, or seen again: one decision, and once decided it does not wait again.
    if not any(at == ts and (other == OF_SLATE) == (standing == OF_SLATE) for at, other in sales):
        sales.append((ts, standing))


def _bought(state: OpenPairWindows, item: str, first: int, last: int) -> bool:
    return any(first <= ts <= last for ts, _ in state.purchases.get(item, ()))


def _of_purchase(
    state: OpenPairWindows,
    ts: int,
    item: str,
    rules: WindowRules,
    max_rejected: int,
    known: Callable[[str], bool],
) -> PairDecision | None:
    if not state.clicks or not known(item):
        return None
    window = rules.window_ms
    clicks = {
        what: times
        for what, all_times in state.clicks.items()
        if (times := [at for at in all_times if ts - window <= at <= ts])
    }
    rejected = [
        what
        for what, times in clicks.items()
        if what != item
        and known(what)
        and not _bought(state, what, ts - window, ts)
        and not any(_bought(state, what, at, at + window) for at in times)
    ]
    if not rejected:
        return None
    rejected.sort(key=lambda what: (-max(clicks[what]), what))
    rejected = rejected[:max_rejected]
    before = min([ts, *clicks.get(item, ()), *(at for what in rejected for at in clicks[what])])
    return PairDecision("purchased_over_clicked", ts, before, item, tuple(rejected), moment=ts)


def _of_slate(
    state: OpenPairWindows, request_id: str, slate: Slate, opened: int, rules: WindowRules, max_rejected: int,
    known: Callable[[str], bool],
) -> list[PairDecision]:  # fmt: skip
    last = opened + rules.window_ms
    shown = list(
        dict.fromkeys(
            i for ts, items in slate.impressions if ts <= last for i in items if known(i)
        )
    )  # fmt: skip
    bought = {i: slate.bought[i] for i in shown if slate.bought.get(i, last + 1) <= last}
    clicked = {i: slate.clicks[i] for i in shown if slate.clicks.get(i, last + 1) <= last}
    left = [i for i in shown if i not in bought and not _bought(state, i, opened, last)]
    passed_over = [i for i in left if i in clicked]
    ignored = [i for i in left if i not in clicked]
    decisions: list[PairDecision] = []

    def decide(scheme: Scheme, chosen: dict[str, int], rejected: Iterable[str]) -> None:
        few = tuple(rejected)[:max_rejected]
        for item, ts in chosen.items():
            if few:
                about = (request_id, slate.trigger, opened, slate.scene)
                decisions.append(PairDecision(scheme, ts, opened, item, few, *about))

    decide("purchased_over_clicked", bought, passed_over)
    decide("purchased_over_shown", bought, ignored)
    decide("clicked_over_shown", clicked, ignored)
    return decisions
