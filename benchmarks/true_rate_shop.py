"""Simulated shoppers whose true rates are known for every bundle, and the agents that sum what they do.

Kafka is replaced by a list, serving by the pure function that assigns users to arms. The events go through
the agents' stage of outcomes into Redis, as in production.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import redis
import redis.asyncio

from agents.app import CLOCK_TOPICS
from agents.attribution.event_time import PartitionClock
from agents.attribution.outcome_stage import OutcomeStage, store_rules
from agents.attribution.outcomes import OutcomeRules
from registry.arms import DPO, SFT
from registry.releases.rollout import arm_of
from sidstream.settings import Settings
from streams.events import Arm, Click, Event, Impression, Purchase, RankedItem, Recommendation, Rollout
from streams.state import keys
from streams.wire.batch_stage import ReceivedEvent

_DAY_MS = 24 * 3600 * 1000
_BEGIN_MS = 1_600_000_000_000 // _DAY_MS * _DAY_MS
_SLATE = [RankedItem(str(n), [n, 0, 0], -1.0 - n) for n in range(10)]
_SHOWN = [item.item_id for item in _SLATE]
# Requests whose shadow is computed as well: the default of serving.shadow.
_SHADOW = 0.1
# Users whose events the agents get in one batch.
_BATCH = 500


@dataclass(frozen=True)
class TrueRates:
    """A version's true rates: clicks per shown item, orders per click."""

    ctr: float = 0.2
    cvr: float = 0.2


@dataclass(frozen=True)
class SimulatedShoppers:
    """Shoppers: they come on `days` of 14 on average, with `requests` answers of 10 items each day.

    Somebody looks at the trial every other day.
    Each has rates of their own, the same for ever: beta-distributed with a + b = `cohesion` around the first
    model's, and every version multiplies them all by the same factor.
    """

    users: int = 12_000
    days: float = 1.0
    requests: float = 16.0
    cohesion: float = 40.0
    first: TrueRates = TrueRates()


class _Record(NamedTuple):
    topic: str
    partition: int
    offset: int


class TrueRateShop:
    """Serving, its shoppers and the agents, a day at a time; `truth`: the rates of each bundle."""

    def __init__(self, url: str, shoppers: SimulatedShoppers, settings: Settings, seed: int) -> None:
        self.redis = redis.Redis.from_url(url)
        self.truth: dict[str, TrueRates] = {}
        self.requests = self.day_number = 0
        self._shoppers = shoppers
        self._random = np.random.default_rng(seed)
        # The hold-out is chosen by the users' names: another seed holds out others.
        self._names = [f"s{seed}-{n}" for n in range(shoppers.users)]
        self._click, self._buy = (self._own(rate) for rate in (shoppers.first.ctr, shoppers.first.cvr))
        self._offsets: Counter[str] = Counter()
        self._dealt: tuple[str, list[Arm]] = ("", [])
        self._runner = asyncio.Runner()
        agents = settings.agents
        rules = OutcomeRules(agents.attribution_window_s * 1000, agents.allowed_lateness_s * 1000,
                             agents.cohort_s * 1000)  # fmt: skip
        self._closed_ms = rules.closes_at(0)
        self._clock = PartitionClock(CLOCK_TOPICS, agents.idle_s, 0.0, None, (Recommendation.topic,))
        store = redis.asyncio.Redis.from_url(url)
        self._outcomes = OutcomeStage(store, rules, {0: self._clock}, dict.fromkeys(OutcomeStage.topics, 1))
        self._runner.run(store_rules(store, rules, 1))
        self._store = store

    def close(self) -> None:
        """Let go of Redis."""
        self._runner.run(self._store.aclose())
        self._runner.close()
        self.redis.close()

    def day(self, rollout: Rollout) -> None:
        """One day of visits under a rollout, and what agents and serving write of it."""
        if self._dealt[0] != rollout.trial:
            self._dealt = rollout.trial, [arm_of(rollout, name) for name in self._names]
        came = np.flatnonzero(self._random.random(self._shoppers.users) < self._shoppers.days / 14)
        arms = self._dealt[1]
        for begin in range(0, len(came), _BATCH):
            some = came[begin : begin + _BATCH]
            batch = [self._read(event) for event in self._visits(rollout.trial, some, arms)]
            self._runner.run(self._outcomes.apply(batch))
        self.day_number += 1
        # The next day's first visitors: event time passes the end of every window of this day.
        for topic in (*CLOCK_TOPICS, Recommendation.topic):
            self._clock.observe(topic, "", self._now() + self._closed_ms, 0.0, time.time_ns() // 1_000_000)
        self._runner.run(self._outcomes.close_due_windows())

    def _now(self) -> int:
        return _BEGIN_MS + self.day_number * _DAY_MS

    def _own(self, mean: float) -> np.ndarray:
        made: np.ndarray = self._random.beta(
            mean * self._shoppers.cohesion, (1 - mean) * self._shoppers.cohesion, self._shoppers.users
        )
        return made

    def _read(self, event: Event) -> ReceivedEvent:
        offset = self._offsets[event.topic]
        self._offsets[event.topic] += 1
        return ReceivedEvent(_Record(event.topic, 0, offset), event)

    def _visits(self, trial: str, came: np.ndarray, arms: Sequence[Arm]) -> Iterator[Event]:
        """The events of some users' day, and the health of the models that answered them."""
        random, first = self._random, self._shoppers.first
        who = np.repeat(came, 1 + random.poisson(self._shoppers.requests - 1, len(came)))
        truth = [self.truth[arms[user].bundle] for user in who]
        click = self._click[who] * np.array([rates.ctr for rates in truth]) / first.ctr
        buy = self._buy[who] * np.array([rates.cvr for rates in truth]) / first.cvr
        clicked = random.random((len(who), len(_SLATE))) < click[:, None]
        bought = clicked & (random.random(clicked.shape) < buy[:, None])
        # Within the day, so that the window of every request ends before the next day's first one.
        times = self._now() + random.integers(2 * 3_600_000, 22 * 3_600_000, len(who))
        self._health(trial, Counter(arms[user].name for user in who), len(who))
        for user, at, clicks, orders in zip(who, times.tolist(), clicked, bought, strict=True):
            arm, name = arms[user], self._names[user]
            self.requests += 1
            request = str(self.requests)
            yield Recommendation(
                schema_version=1, event_id=f"a{request}", ts=at, request_id=request, user_id=name,
                items=_SLATE, bundle=arm.bundle, arm=arm.name, trial=trial,
            )  # fmt: skip
            yield Impression(
                schema_version=1, event_id=f"i{request}", ts=at + 1000, user_id=name, item_ids=_SHOWN,
                request_id=request,
            )  # fmt: skip
            for place in clicks.nonzero()[0].tolist():
                yield Click(
                    schema_version=1, event_id=f"c{request}-{place}", ts=at + 20_000, user_id=name,
                    item_id=_SHOWN[place], request_id=request,
                )  # fmt: skip
            for place in orders.nonzero()[0].tolist():
                yield Purchase(
                    schema_version=1, event_id=f"p{request}-{place}", ts=at + 300_000, user_id=name,
                    item_id=_SHOWN[place], request_id=request, price=1.0,
                )  # fmt: skip

    def _health(self, trial: str, answered: Counter[str], count: int) -> None:
        """As serving: every answer under its arm, and a share of them once more in the shadow."""
        for name in {SFT, DPO} - answered.keys():
            answered[name] = round(_SHADOW * count)
        with self.redis.pipeline() as pipeline:
            for name, number in answered.items():
                for what in ("n", "le:10"):
                    pipeline.hincrby(keys.health(trial), f"{name}:{what}", number)
            pipeline.execute()
