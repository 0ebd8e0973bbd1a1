"""Clicks and purchases -> packed histories: one script a user and batch, fenced by source offsets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import redis.asyncio
from redis.exceptions import NoScriptError

from agents.assigned_sids import AssignedSids
from agents.history_recoder import HistoryRecoder
from agents.parked_events import ParkedEvents
from streams.events import Click
from streams.settings import HistorySettings
from streams.state import history, keys
from streams.state.redisdb import run_pipeline
from streams.wire.batch_loop import EVENT_COUNT, ReceivedEvent
from streams.wire.dead_letters import RefusedRecord

# Scripts in one write: enough to hide the round trip, small against the server's and our buffers.
_SCRIPTS_PER_PIPELINE: Final = 500


class HistoryWriter:
    """The stage that writes `h:{user}`; events on items without a SID go to `parking`."""

    name = "histories"

    def __init__(
        self, store: redis.asyncio.Redis, sids: AssignedSids, parking: ParkedEvents, recoding: HistoryRecoder,
        bounds: HistorySettings, incarnations: Mapping[str, int],
    ) -> None:  # fmt: skip
        self._store = store
        self._sids = sids
        self._parked_events = parking
        self._recoder = recoding
        self._bounds = bounds
        self._incarnations = incarnations
        self._script: str | None = None

    async def apply(self, batch: Sequence[ReceivedEvent]) -> Sequence[RefusedRecord]:
        """Write what has a SID, park what has none."""
        changes: dict[str, list[history.HistoryChange]] = {}
        waiting: list[ReceivedEvent] = []
        for incoming in batch:
            record, event = incoming
            if record.topic not in history.SOURCE_TOPICS:
                continue
            packed = self._sids.get(event.item_id)
            if packed is None:
                waiting.append(incoming)
            else:
                changes.setdefault(event.user_id, []).append(
                    history.HistoryChange(record.topic, record.offset, packed_entry(event, packed))
                )
        if waiting:
            await self._parked_events.park(waiting)
        applied, repeated = await self._write(changes)
        for topic in history.SOURCE_TOPICS:
            EVENT_COUNT.labels(topic, "in_history").inc(applied[topic])
            EVENT_COUNT.labels(topic, "repeated").inc(repeated[topic])
        return ()

    async def apply_parked(self, events: Iterable[Any]) -> None:
        """Write events whose items have a SID by now, whatever the fences say: equal entries are one."""
        changes: dict[str, list[history.HistoryChange]] = {}
        for event in events:
            packed = self._sids.get(event.item_id)
            assert packed is not None
            changes.setdefault(event.user_id, []).append(
                history.HistoryChange(None, 0, packed_entry(event, packed))
            )
        await self._write(changes)

    async def _write(
        self, changes: Mapping[str, Sequence[history.HistoryChange]]
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Run the script for each user; (applied, skipped by the fence), by source topic of whole users."""
        applied = dict.fromkeys(history.SOURCE_TOPICS, 0)
        repeated = dict.fromkeys(history.SOURCE_TOPICS, 0)
        users = list(changes)
        for start in range(0, len(users), _SCRIPTS_PER_PIPELINE):
            chunk = users[start : start + _SCRIPTS_PER_PIPELINE]
            results = await self._run([self._command(user, changes[user]) for user in chunk])
            await self._recode_and_retry(chunk, changes, results)
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

    async def _recode_and_retry(
        self,
        users: Sequence[str],
        changes: Mapping[str, Sequence[history.HistoryChange]],
        results: list[list[int]],
    ) -> None:
        """Bring histories of another codebook over, apply their changes, and put the results in place."""
        while old := [at for at, result in enumerate(results) if result == history.OTHER_CODEBOOK_RESULT]:
            await self._recoder.recode_users([users[at] for at in old], "touch")
            again = await self._run([self._command(users[at], changes[users[at]]) for at in old])
            for at, result in zip(old, again, strict=True):
                results[at] = result

    def _command(self, user: str, changes: Sequence[history.HistoryChange]) -> tuple[Any, ...]:
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
                self._script = await self._store.script_load(history.APPLY_CHANGES)
            try:
                return await run_pipeline(
                    self._store, [("EVALSHA", self._script, 1, *argument) for argument in arguments]
                )
            except NoScriptError:
                self._script = None  # a restarted server has no scripts; what was written is written again


def packed_entry(event: Any, packed_sid: bytes) -> bytes:
    """The packed entry of a click or purchase."""
    kind = history.KIND_CODES[event.kind] if isinstance(event, Click) else history.PURCHASE
    return history.pack_entry(event.ts, kind, event.event_id, packed_sid)
