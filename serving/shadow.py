"""Arms without users answer some requests as well, so that a model is seen at work before anybody sees it.

A shadow's answers are thrown away; what is kept is how its model behaved. It has the time that answers leave:
one shadow at a time, begun after the answers of its batch were sent, and none while requests wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from registry.releases.rollout import user_share
from serving.bundles import Service
from serving.model_health import ModelHealth
from serving.recommender import Recommender, Request
from streams.events import Arm

log = logging.getLogger(__name__)


class Shadow:
    """Runs the bundles of arms with weight 0 on a share of the requests. `busy()`: requests wait."""

    def __init__(
        self, recommender: Recommender, health: ModelHealth, portion: float, busy: Callable[[], bool]
    ) -> None:
        """`portion`: share of requests in [0, 1], chosen by a hash of their ids."""
        self._recommender = recommender
        self._health = health
        self._portion = portion
        self._busy = busy
        self._task: asyncio.Task[None] | None = None

    def offer(self, requests: Sequence[Request], service: Service | None) -> None:
        """Requests of one service that were answered; returns at once. Left out while a shadow runs."""
        if service is None or (self._task is not None and not self._task.done()):
            return
        arms = [arm for arm in service.rollout.arms if arm.weight == 0]
        some = [one for one in requests if user_share("shadow", one.trigger.request_id) < self._portion]
        if arms and some:
            self._task = asyncio.create_task(self._run(some, service, arms), name="serving shadow")

    async def stop(self) -> None:
        """Wait for the shadow that is under way: a call of a model cannot be broken off."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def _run(self, requests: Sequence[Request], service: Service, arms: Sequence[Arm]) -> None:
        for arm in arms:
            if self._busy():
                return
            try:
                # In a thread: answers go on meanwhile.
                answers = await asyncio.to_thread(self._recommender.shadow, requests, service, arm)
            except Exception:  # a defect of ours, since the recommender answers for its models
                log.exception("the shadow of arm %s", arm.name)
                return
            self._health.count(answers)
