"""Claim: a request that prefers commission gets items that bring more of it, all valid, in the same time.

    python -m benchmarks.preferences --name commission

Runs on the stack that `sidstream demo` left up. Each of 300 users asks twice for the same page, once with the
preference and once without, in random order. Prints one line of JSON: the mean commission (or price) of what
came, per request, with the paired bootstrap interval of the relative change; how many items were not in the
catalogue or not for sale; median seconds with and without, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import time
import uuid

import numpy as np

from benchmarks.results import line
from registry.bundles.rewards import Offer, log_value
from sidstream.settings import load
from streams.errors import SidstreamError
from streams.events import CatalogItem, Recommendation, SidAssignment, Trigger
from streams.replay import source_of, user_item_sequences
from streams.wire.client import Client
from streams.wire.topic_reader import read_newest_events
from trainer.offline_checks.bootstrap import relative_changes


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", choices=("commission", "price"), default="commission")
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    settings, random = load(), np.random.default_rng(options.seed)
    catalogue = read_newest_events(settings.kafka, CatalogItem)
    items_with_sid = {item.item_id for item in read_newest_events(settings.kafka, SidAssignment).values()}
    pasts = user_item_sequences(source_of("online-retail"))
    users = [sorted(pasts)[at] for at in random.permutation(len(pasts))[: options.users]]
    values: list[list[float]] = []
    seconds: list[list[float]] = []
    invalid_items = shown = ignored_preferences = 0
    with Client(settings.kafka) as client:
        for user in users:
            page = pasts[user][int(random.integers(len(pasts[user])))]
            by_preference: dict[bool, tuple[float, float]] = {}
            for prefers in random.permutation([True, False]).tolist():
                began = time.perf_counter()
                answer = client.ask(_request(user, page, options.name if prefers else None), timeout=30)
                elapsed = time.perf_counter() - began
                ignored_preferences += prefers and not answer.conditions
                shown += len(answer.items)
                invalid_items += _invalid_items(answer, catalogue, items_with_sid)
                by_preference[prefers] = (_mean(answer, catalogue, options.name), elapsed)
            values.append([by_preference[True][0], by_preference[False][0]])
            seconds.append([by_preference[True][1], by_preference[False][1]])
    if ignored_preferences:
        raise SidstreamError(
            f"{ignored_preferences} of {len(users)} answers had no conditions: the bundle in service "
            "has no rewards; train one from scratch on a catalogue with prices and commission rates"
        )
    paired_values = np.array(values)
    change = relative_changes(paired_values[:, :1], paired_values[:, 1:], np.arange(len(paired_values)))[0]
    baseline_mean = float(paired_values[:, 1].mean())
    times = np.median(np.array(seconds), axis=0)
    command = f"python -m benchmarks.preferences --name {options.name} --users {options.users}"
    print(json.dumps(line(
        f"a preference for {options.name} is followed", "UCI Online Retail, the demo's stack",
        "the bundle in service", f"mean {options.name} of ten items, relative change",
        round(change.value, 4), options.seed, command, round(change.low, 4), round(change.high, 4),
    ) | {
        "with": round(float(paired_values[:, 0].mean()), 4), "without": round(baseline_mean, 4),
        "items": shown, "not valid": invalid_items, "median_s_with": round(float(times[0]), 5),
        "median_s_without": round(float(times[1]), 5), "ratio": round(float(times[0] / times[1]), 4),
    }))  # fmt: skip


def _request(user: str, page: str, name: str | None) -> Trigger:
    return Trigger.new(
        request_id=uuid.uuid4().hex, user_id=user, item_id=page, scene="item-page",
        preferences=None if name is None else {name: 1.0},
    )  # fmt: skip


def _invalid_items(
    answer: Recommendation, catalogue: dict[str, CatalogItem], items_with_sid: set[str]
) -> int:
    """Items that are not for sale, or have no SID."""
    return sum(
        item.item_id not in items_with_sid
        or item.item_id not in catalogue
        or not catalogue[item.item_id].active
        for item in answer.items
    )


def _mean(answer: Recommendation, catalogue: dict[str, CatalogItem], name: str) -> float:
    """The mean of what the items bring, in the shop's currency; of those that say."""
    values = []
    for ranked in answer.items:
        item = catalogue[ranked.item_id]
        value = log_value(name, Offer(item.category, item.price, item.commission_rate))
        if value is not None:
            values.append(float(np.expm1(value)))
    return float(np.mean(values)) if values else 0.0


if __name__ == "__main__":
    main()
