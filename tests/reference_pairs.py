"""Preference pairs by the words of agents/pairs.py over a whole log at once, without state or watermarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

from streams.events import Click, Event, Impression, Purchase

# (user, scheme, request or purchase time, chosen, rejected)
Pair = tuple[str, str, str | int, str, tuple[str, ...]]


def reference(events: Iterable[Event], window_ms: int, max_rejected: int) -> set[Pair]:
    """Every pair of the log."""
    by_user: dict[str, list[Event]] = {}
    for event in events:
        by_user.setdefault(event.user_id, []).append(event)  # type: ignore[attr-defined]
    made: set[Pair] = set()
    for user, log in by_user.items():
        made.update(_by_purchase(user, log, window_ms, max_rejected))
        made.update(_by_slate(user, log, window_ms, max_rejected))
    return made


def _by_purchase(user: str, log: Sequence[Event], window: int, most: int) -> Iterable[Pair]:
    clicks = [(c.ts, c.item_id) for c in log if isinstance(c, Click) and c.request_id is None]
    sales = [(p.ts, p.item_id) for p in log if isinstance(p, Purchase)]
    for purchase in log:
        if not isinstance(purchase, Purchase) or purchase.request_id is not None:
            continue
        at = purchase.ts
        inside = [(t, i) for t, i in clicks if at - window <= t <= at]
        out = {purchase.item_id}
        out |= {i for t, i in sales if at - window <= t <= at}
        out |= {i for t, i in inside if any(j == i and t <= s <= t + window for s, j in sales)}
        last = {i: max(t for t, j in inside if j == i) for _, i in inside if i not in out}
        rejected = sorted(last, key=lambda i: (-last[i], i))[:most]
        if rejected:
            yield user, "purchased_over_clicked", at, purchase.item_id, tuple(rejected)


def _by_slate(user: str, log: Sequence[Event], window: int, most: int) -> Iterable[Pair]:
    requests = {i.request_id for i in log if isinstance(i, Impression) and i.request_id is not None}
    for request in requests:
        of_it = [e for e in log if getattr(e, "request_id", None) == request]
        looks = sorted((i.ts, i.item_ids) for i in of_it if isinstance(i, Impression))
        start, end = looks[0][0], looks[0][0] + window
        shown: list[str] = []
        for ts, items in looks:
            shown += [i for i in items if ts <= end and i not in shown]
        bought = [
            i for i in shown if any(isinstance(e, Purchase) and e.item_id == i and e.ts <= end for e in of_it)
        ]
        clicked = [
            i for i in shown if any(isinstance(e, Click) and e.item_id == i and e.ts <= end for e in of_it)
        ]
        any_way = {e.item_id for e in log if isinstance(e, Purchase) and start <= e.ts <= end}
        over_clicked = [i for i in clicked if i not in bought and i not in any_way]
        lowest = max((shown.index(i) for i in (*bought, *clicked)), default=-1)
        over_shown = [
            i for i in shown[: lowest + 1] if i not in clicked and i not in bought and i not in any_way
        ]
        for scheme, chosen, rejected in (
            ("purchased_over_clicked", bought, over_clicked),
            ("purchased_over_shown", bought, over_shown),
            ("clicked_over_shown", clicked, over_shown),
        ):  # fmt: skip
            few = tuple(sorted(rejected, key=lambda i: drawn(request, i))[:most])
            for item in chosen:
                if few:
                    yield user, scheme, str(request), item, few


def drawn(request: str, item: str) -> str:
    """The place of an item in the sample of its slate's rejected ones."""
    return blake2b(f"{request}\x1f{item}".encode(), digest_size=8).hexdigest()
