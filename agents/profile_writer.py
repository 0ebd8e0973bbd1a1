"""Events on `users` -> a profile of each user: the newest one, by the time at which it was true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import redis.asyncio
from redis.exceptions import NoScriptError

from streams.events import UserProfile
from streams.state import keys, profile
from streams.state.redisdb import run_pipeline
from streams.wire.batch_loop import EVENT_COUNT, ReceivedEvent
from streams.wire.dead_letters import RefusedRecord

# Scripts in one write: enough to hide the round trip, small against the server's and our buffers.
_SCRIPTS_PER_PIPELINE: Final = 500


class ProfileWriter:
    """The stage that writes `u:{user}`. Nothing else waits for it, so it has a loop of its own."""

    name = "profiles"

    def __init__(self, store: redis.asyncio.Redis) -> None:
        self._store = store
        self._script: str | None = None

    async def apply(self, batch: Sequence[ReceivedEvent]) -> Sequence[RefusedRecord]:
        """Keep the newest profile of each user; a record without a value deletes it."""
        changes: list[tuple[str, bytes]] = []
        for record, event in batch:
            if event is not None:
                changes.append((event.user_id, profile.pack_profile(event)))
            elif record.key:
                # A key that is no UTF-8 is nobody's.
                changes.append((record.key.decode(errors="replace"), b""))
        for start in range(0, len(changes), _SCRIPTS_PER_PIPELINE):
            chunk = changes[start : start + _SCRIPTS_PER_PIPELINE]
            for (_, packed), done in zip(chunk, await self._run(chunk), strict=True):
                outcome = "in_profile" if packed and done else "profile_deleted" if done else "older_profile"
                EVENT_COUNT.labels(UserProfile.topic, outcome).inc()
        return ()

    async def _run(self, changes: Sequence[tuple[str, bytes]]) -> list[Any]:
        while True:
            if self._script is None:
                self._script = await self._store.script_load(profile.STORE_IF_NEWER)
            commands = [("EVALSHA", self._script, 1, keys.profile(user), packed) for user, packed in changes]
            try:
                return await run_pipeline(self._store, commands)
            except NoScriptError:
                self._script = None  # a restarted server has no scripts; what was written is written again
