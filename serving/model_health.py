"""Counts each arm's answers, failures, times and invalid mass in a trial, and adds the counts to Redis.

They are counted in the process and written by a task of its own, so that no answer waits for it. The guards
read them: they end a trial whose new model raises, is slow, or puts probability on SIDs without an item.
"""

from __future__ import annotations

import asyncio
import logging
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from registry.experiment.health import BOUNDS_MS, MASS_UNIT
from serving.recommender import Answer
from streams.settings import RedisSettings
from streams.state import keys
from streams.state.redisdb import async_redis_client

log = logging.getLogger(__name__)

_WRITE_PERIOD_S: Final = 1.0
_EXPIRY_S: Final = 30 * 24 * 3600
# No answer waits for a write, and a write that timed out but took place is counted twice: so wait long.
_TIMEOUT_S: Final = 10.0

# By trial, then by field of the trial's hash (streams.state.keys.health).
CountsByTrial = dict[str, Counter[str]]


def count_by_trial(answers: Iterable[Answer]) -> CountsByTrial:
    """What answers add to the hash of each trial, by field.

    `<arm>:n` counts requests that called a model; `<arm>:failed` those where it raised; for the others
    `<arm>:invalid` sums the probability, in millionths, that the model's SID belongs to no item.
    `<arm>:le:<bound>` counts calls of the model by the smallest bound (ms) that is not below their time: the
    requests of one call share one time, and counting it for each would make one slow call look like many.
    """
    counts_by_trial: CountsByTrial = {}
    calls: set[tuple[str, str, float]] = set()
    for answer in answers:
        arm, trial = answer.recommendation.arm, answer.recommendation.trial
        if answer.model_s is None or arm is None or trial is None:
            continue
        fields = counts_by_trial.setdefault(trial, Counter())
        fields[f"{arm}:n"] += 1
        # Two calls never take equally long on a clock of nanoseconds, so equal times are one call.
        if (trial, arm, answer.model_s) not in calls:
            calls.add((trial, arm, answer.model_s))
            fields[f"{arm}:le:{BOUNDS_MS[bisect_left(BOUNDS_MS, 1000 * answer.model_s)]:g}"] += 1
        if answer.model_failed:
            fields[f"{arm}:failed"] += 1
        else:
            invalid = 1 - math.prod(1 - mass for mass in answer.invalid_mass)
            fields[f"{arm}:invalid"] += round(MASS_UNIT * invalid)
    return counts_by_trial


class ModelHealthRecorder:
    """Counts answers and adds the counts to Redis once a second; while Redis is away it keeps them."""

    def __init__(self, settings: RedisSettings) -> None:
        # No retries inside the client: an increment whose reply was lost would be added twice.
        self._redis = async_redis_client(settings, _TIMEOUT_S, retries=False)
        self._counts: CountsByTrial = {}
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._down = False

    def start(self) -> None:
        """Start the task that writes."""
        self._task = asyncio.create_task(self._run(), name="serving model health")

    async def stop(self) -> None:
        """Write what is left, once, and disconnect."""
        self._stopping.set()
        if self._task is not None:
            await self._task
        if self._counts:
            log.warning("what was seen of the models since Redis went away is lost: %s", dict(self._counts))
        await self._redis.aclose()

    def count(self, answers: Iterable[Answer]) -> None:
        """Count answers that were sent, and those of shadows."""
        self._add(count_by_trial(answers))

    def _add(self, counts: CountsByTrial) -> None:
        for trial, fields in counts.items():
            self._counts.setdefault(trial, Counter()).update(fields)

    async def _run(self) -> None:
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _WRITE_PERIOD_S)
            await self._flush()

    async def _flush(self) -> None:
        counts, self._counts = self._counts, {}
        for trial in list(counts):
            try:
                await self._write(trial, counts[trial])
            except Exception as error:  # whatever goes wrong here, answers go on, and nothing is forgotten
                if not self._down:
                    log.warning("what is seen of the models is kept until Redis takes it: %r", error)
                self._down = True
                self._add(counts)
                return
            del counts[trial]
        self._down = False

    async def _write(self, trial: str, fields: Counter[str]) -> None:
        key = keys.health(trial)
        # A transaction, of one key: all of it is added or nothing, and it fits one slot of a cluster.
        async with self._redis.pipeline(transaction=True) as pipeline:
            for field, value in fields.items():
                pipeline.hincrby(key, field, value)
            pipeline.expire(key, _EXPIRY_S)
            await pipeline.execute()
