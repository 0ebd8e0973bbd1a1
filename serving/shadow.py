"""Arms without users answer a share of the requests as well, so that a model is measured before it serves.

A shadow's answers are thrown away; only the health of its model is counted. Shadows take spare time only: one
runs at a time, it begins after the answers of its batch were sent, and none begins while requests wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from registry.hold_out import user_share
from serving.bundle_loader import LoadedRollout
from serving.model_health import ModelHealthRecorder
from serving.recommender import Recommender, Request
from streams.events import Arm

log = logging.getLogger(__name__)


class Shadow:
    """Runs the bundles of arms with weight 0 on a share of the requests. `busy()` is true
    while requests wait."""

    def __init__(
        self, recommender: Recommender, health: ModelHealthRecorder, portion: float, busy: Callable[[], bool]
    ) -> None:
        """`portion`: share of requests in [0, 1], chosen by a hash of their ids."""
        self._recommender = recommender
        self._health = health
        self._portion = portion
        self._busy = busy
        self._task: asyncio.Task[None] | None = None

    def offer(self, requests: Sequence[Request], loaded_rollout: LoadedRollout | None) -> None:
        """Start a shadow of answered requests and return at once; nothing happens while a shadow runs."""
        if loaded_rollout is None or (self._task is not None and not self._task.done()):
            return
        arms = [arm for arm in loaded_rollout.rollout.arms if arm.weight == 0]
        sampled_requests = [
            request
            for request in requests
            if user_share("shadow", request.trigger.request_id) < self._portion
        ]
        if arms and sampled_requests:
            self._task = asyncio.create_task(
                self._run(sampled_requests, loaded_rollout, arms), name="serving shadow"
            )

    async def stop(self) -> None:
        """Wait for the running shadow: a call of a model cannot be cancelled."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def _run(
        self, requests: Sequence[Request], loaded_rollout: LoadedRollout, arms: Sequence[Arm]
    ) -> None:
        for arm in arms:
            if self._busy():
                return
            try:
                # In a thread: answers go on meanwhile.
                answers = await asyncio.to_thread(self._recommender.shadow, requests, loaded_rollout, arm)
            except Exception:  # a defect of ours, since the recommender answers for its models
                log.exception("the shadow of arm %s", arm.name)
                return
            self._health.count(answers)
