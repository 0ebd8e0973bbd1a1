"""Events on `users` -> a profile of each user: the newest one, by the time at which it was true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import redis.asyncio

from streams.events import UserProfile
from streams.state import keys
from streams.state.profile import STORE_IF_NEWER, pack_profile
from streams.state.redisdb import run_pipeline
from streams.wire.batch_stage import EVENT_COUNT, ReceivedEvent
from streams.wire.dead_letters import RefusedRecord

# Script calls in one round trip: enough to hide its latency, small against the buffers of both sides.
_SCRIPTS_PER_PIPELINE: Final = 500


class ProfileWriter:
    """The stage that writes `u:{user}`. No other stage waits for it, so it has a loop of its own."""

    name = "profiles"

    def __init__(self, store: redis.asyncio.Redis) -> None:
        self._store = store

    async def apply(self, batch: Sequence[ReceivedEvent]) -> Sequence[RefusedRecord]:
        """Keep the newest profile of each user; a record without a value deletes it."""
        changes: list[tuple[str, bytes]] = []
        for record, event in batch:
            if event is not None:
                changes.append((event.user_id, pack_profile(event)))
            elif record.key:
                # A key that is not UTF-8 belongs to no user.
                changes.append((record.key.decode(errors="replace"), b""))
        for start in range(0, len(changes), _SCRIPTS_PER_PIPELINE):
            chunk = changes[start : start + _SCRIPTS_PER_PIPELINE]
            calls = [STORE_IF_NEWER.command([keys.profile(user)], [packed]) for user, packed in chunk]
            replies = await run_pipeline(self._store, calls, STORE_IF_NEWER)
            for (_, packed), changed in zip(chunk, replies, strict=True):
                outcome = (
                    "in_profile" if packed and changed else "profile_deleted" if changed else "older_profile"
                )
                EVENT_COUNT.labels(UserProfile.topic, outcome).inc()
        return ()
