"""What serving saw of each arm's model in a trial: answers, failures, times, invalid mass; kept in Redis.

Counted in the process and written by a task of its own, so that no answer waits for it. This is what a trial
is stopped by when a new model raises, is slow, or spells items that are none.
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

_PERIOD_S: Final = 1.0
_KEPT_S: Final = 30 * 24 * 3600
# Nobody waits for a write, and one that is given up but was done is counted twice: be patient.
_TIMEOUT_S: Final = 10.0

# Of each trial, by field of its hash (streams.state.keys.health).
Counts = dict[str, Counter[str]]


def counted(answers: Iterable[Answer]) -> Counts:
    """What answers add to their trials' hashes.

    `<arm>:n` for a request that a model was asked; with it `<arm>:failed` where it raised, else
    `<arm>:invalid`, the probability in millionths that the spelled SID is no item's. `<arm>:le:<bound>` for a
    call of the model, by the smallest bound (ms) that its time keeps: the requests of one call share one
    time, and to count it for each would make one slow call look like many.
    """
    made: Counts = {}
    calls: set[tuple[str, str, float]] = set()
    for answer in answers:
        arm, trial = answer.recommendation.arm, answer.recommendation.trial
        if answer.model_s is None or arm is None or trial is None:
            continue
        fields = made.setdefault(trial, Counter())
        fields[f"{arm}:n"] += 1
        # Two calls are never equally long, to the last bit of a clock of nanoseconds.
        if (trial, arm, answer.model_s) not in calls:
            calls.add((trial, arm, answer.model_s))
            fields[f"{arm}:le:{BOUNDS_MS[bisect_left(BOUNDS_MS, 1000 * answer.model_s)]:g}"] += 1
        if answer.model_failed:
            fields[f"{arm}:failed"] += 1
        else:
            invalid = 1 - math.prod(1 - mass for mass in answer.invalid_mass)
            fields[f"{arm}:invalid"] += round(MASS_UNIT * invalid)
    return made


class ModelHealth:
    """Counts answers, and adds them to Redis once a second; while Redis is away they are kept."""

    def __init__(self, settings: RedisSettings) -> None:
        # No retries of the client's own: an increment that was done without our hearing of it would be twice.
        self._redis = async_redis_client(settings, _TIMEOUT_S, retries=False)
        self._counts: Counts = {}
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._down = False

    def start(self) -> None:
        """Begin to write."""
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
        """Count answers that were sent, or would have been."""
        self._add(counted(answers))

    def _add(self, counts: Counts) -> None:
        for trial, fields in counts.items():
            self._counts.setdefault(trial, Counter()).update(fields)

    async def _run(self) -> None:
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _PERIOD_S)
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
            pipeline.expire(key, _KEPT_S)
            await pipeline.execute()
