"""What each user saw, clicked and bought of a trial, from a whole log: no state, no watermarks."""

from __future__ import annotations

from collections.abc import Iterable

from streams.events import Click, Event, Impression, Purchase, Recommendation

# (trial, user, arm, bundle)
Owner = tuple[str, str, str, str]


def reference(events: Iterable[Event], window_ms: int, cohort_ms: int) -> dict[Owner, dict[int, list[int]]]:
    """Impressions, clicks and orders by owner and cohort; of two answers to a request the first counts."""
    answers: dict[tuple[str, str], Recommendation] = {}
    of_request: dict[tuple[str, str], list[Impression | Click | Purchase]] = {}
    for event in events:
        if isinstance(event, Recommendation):
            if event.trial is not None:
                answers.setdefault((event.user_id, event.request_id), event)
        elif isinstance(event, Impression | Click | Purchase) and event.request_id is not None:
            of_request.setdefault((event.user_id, event.request_id), []).append(event)
    found: dict[Owner, dict[int, list[int]]] = {}
    for (user, request), answer in answers.items():
        followed = of_request.get((user, request), [])
        offered = {ranked.item_id for ranked in answer.items}
        looks = [event for event in followed if isinstance(event, Impression)]
        start = min((look.ts for look in looks), default=answer.ts)
        seen = offered & {item for look in looks for item in look.item_ids}
        in_time = [event for event in followed if event.ts <= start + window_ms]
        clicked = offered & {event.item_id for event in in_time if isinstance(event, Click)}
        bought = offered & {event.item_id for event in in_time if isinstance(event, Purchase)}
        numbers = [len(seen), len(clicked), len(bought)]
        if not any(numbers):
            continue
        assert answer.trial is not None
        owner = answer.trial, user, answer.arm or "", answer.bundle or ""
        cohorts = found.setdefault(owner, {})
        before = cohorts.get(start // cohort_ms, [0, 0, 0])
        cohorts[start // cohort_ms] = [a + b for a, b in zip(before, numbers, strict=True)]
    return found
