"""Clicks and purchases -> packed histories: one script a user and batch, fenced by source offsets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import redis.asyncio
from redis.exceptions import NoScriptError

from agents.parking import Parking
from agents.recoding import Recoding
from agents.sids import Sids
from streams.events import Click
from streams.settings import HistorySettings
from streams.state import history, keys
from streams.state.redisdb import run_pipeline
from streams.wire.batches import EVENTS, Incoming
from streams.wire.dead_letters import Refusal

# Scripts in one write: enough to hide the round trip, small against the server's and our buffers.
_AT_ONCE: Final = 500


class Histories:
    """The stage that writes `h:{user}`; events on items without a SID go to `parking`."""

    name = "histories"

    def __init__(
        self, store: redis.asyncio.Redis, sids: Sids, parking: Parking, recoding: Recoding,
        bounds: HistorySettings, incarnations: Mapping[str, int],
    ) -> None:  # fmt: skip
        self._store = store
        self._sids = sids
        self._parking = parking
        self._recoding = recoding
        self._bounds = bounds
        self._incarnations = incarnations
        self._script: str | None = None

    async def apply(self, batch: Sequence[Incoming]) -> Sequence[Refusal]:
        """Write what has a SID, park what has none."""
        changes: dict[str, list[history.Change]] = {}
        waiting: list[Incoming] = []
        for incoming in batch:
            record, event = incoming
            if record.topic not in history.SOURCES:
                continue
            packed = self._sids.get(event.item_id)
            if packed is None:
                waiting.append(incoming)
            else:
                changes.setdefault(event.user_id, []).append(
                    history.Change(record.topic, record.offset, entry(event, packed))
                )
        if waiting:
            await self._parking.park(waiting)
        applied, repeated = await self._write(changes)
        for topic in history.SOURCES:
            EVENTS.labels(topic, "in_history").inc(applied[topic])
            EVENTS.labels(topic, "repeated").inc(repeated[topic])
        return ()

    async def apply_parked(self, events: Iterable[Any]) -> None:
        """Write events whose items have a SID by now, whatever the fences say: equal entries are one."""
        changes: dict[str, list[history.Change]] = {}
        for event in events:
            packed = self._sids.get(event.item_id)
            assert packed is not None
            changes.setdefault(event.user_id, []).append(history.Change(None, 0, entry(event, packed)))
        await self._write(changes)

    async def _write(
        self, changes: Mapping[str, Sequence[history.Change]]
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Run the script for each user; (applied, skipped by the fence), by source topic of whole users."""
        applied = dict.fromkeys(history.SOURCES, 0)
        repeated = dict.fromkeys(history.SOURCES, 0)
        users = list(changes)
        for start in range(0, len(users), _AT_ONCE):
            chunk = users[start : start + _AT_ONCE]
            results = await self._run([self._command(user, changes[user]) for user in chunk])
            await self._bring_over(chunk, changes, results)
            for user, (_, skipped) in zip(chunk, results, strict=True):
                for change in changes[user]:
                    if change.source is None:
                        continue
                    if skipped:
                        repeated[change.source] += 1
                        skipped -= 1
                    else:
                        applied[change.source] += 1
        return applied, repeated

    async def _bring_over(
        self, users: Sequence[str], changes: Mapping[str, Sequence[history.Change]], results: list[list[int]]
    ) -> None:
        """Bring histories of another codebook over, apply their changes, and put the results in place."""
        while old := [at for at, result in enumerate(results) if result == history.OTHER_CODEBOOK]:
            await self._recoding.recode([users[at] for at in old], "touch")
            again = await self._run([self._command(users[at], changes[users[at]]) for at in old])
            for at, result in zip(old, again, strict=True):
                results[at] = result

    def _command(self, user: str, changes: Sequence[history.Change]) -> tuple[Any, ...]:
        assert self._sids.codebook is not None
        return (
            keys.history(user),
            *history.script_arguments(
                changes,
                codebook=self._sids.codebook,
                levels=self._sids.levels,
                incarnations=self._incarnations,
                bounds=self._bounds,
            ),
        )

    async def _run(self, arguments: Sequence[tuple[Any, ...]]) -> list[list[int]]:
        while True:
            if self._script is None:
                self._script = await self._store.script_load(history.SCRIPT)
            try:
                return await run_pipeline(
                    self._store, [("EVALSHA", self._script, 1, *argument) for argument in arguments]
                )
            except NoScriptError:
                self._script = None  # a restarted server has no scripts; what was written is written again


def entry(event: Any, packed_sid: bytes) -> bytes:
    """The packed entry of a click or purchase."""
    kind = history.KINDS[event.kind] if isinstance(event, Click) else history.PURCHASE
    return history.pack_entry(event.ts, kind, event.event_id, packed_sid)
