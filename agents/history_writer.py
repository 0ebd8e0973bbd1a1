"""Clicks and purchases -> packed histories: one script call a user and batch, fenced by source offsets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import redis.asyncio

from agents.assigned_sids import AssignedSids
from agents.history_recoder import HistoryRecoder
from agents.parked_events import ParkedEvents
from streams.events import Click
from streams.settings import HistorySettings
from streams.state import history, keys
from streams.state.redisdb import run_pipeline
from streams.wire.batch_stage import EVENT_COUNT, ReceivedEvent
from streams.wire.dead_letters import RefusedRecord

# Script calls in one round trip: enough to hide its latency, small against the buffers of both sides.
_SCRIPTS_PER_PIPELINE: Final = 500


class HistoryWriter:
    """The stage that writes `h:{user}`; events on items without a SID are parked."""

    name = "histories"

    def __init__(
        self, store: redis.asyncio.Redis, sids: AssignedSids, parked_events: ParkedEvents,
        recoder: HistoryRecoder,
        bounds: HistorySettings, incarnations: Mapping[str, int],
    ) -> None:  # fmt: skip
        self._store = store
        self._sids = sids
        self._parked_events = parked_events
        self._recoder = recoder
        self._bounds = bounds
        self._incarnations = incarnations

    async def apply(self, batch: Sequence[ReceivedEvent]) -> Sequence[RefusedRecord]:
        """Write events on items with a SID, park the others."""
        changes: dict[str, list[history.HistoryChange]] = {}
        without_sid: list[ReceivedEvent] = []
        for received in batch:
            record, event = received
            if record.topic not in history.SOURCE_TOPICS:
                continue
            packed = self._sids.get(event.item_id)
            if packed is None:
                without_sid.append(received)
            else:
                changes.setdefault(event.user_id, []).append(
                    history.HistoryChange(record.topic, record.offset, packed_entry(event, packed))
                )
        if without_sid:
            await self._parked_events.park(without_sid)
        applied, repeated = await self._write(changes)
        for topic in history.SOURCE_TOPICS:
            EVENT_COUNT.labels(topic, "in_history").inc(applied[topic])
            EVENT_COUNT.labels(topic, "repeated").inc(repeated[topic])
        return ()

    async def apply_parked(self, events: Iterable[Any]) -> None:
        """Write parked events whose items have a SID now. No fence skips them; equal entries are one."""
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
        """Run the script for each user; the numbers of changes applied and skipped by the fence, by topic."""
        applied = dict.fromkeys(history.SOURCE_TOPICS, 0)
        repeated = dict.fromkeys(history.SOURCE_TOPICS, 0)
        users = list(changes)
        for start in range(0, len(users), _SCRIPTS_PER_PIPELINE):
            chunk = users[start : start + _SCRIPTS_PER_PIPELINE]
            results = await self._run([self._call(user, changes[user]) for user in chunk])
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
        """Recode histories of another codebook, apply their changes, and put the results into `results`."""

        def other_codebook() -> list[int]:
            return [at for at, result in enumerate(results) if result == history.OTHER_CODEBOOK_RESULT]

        while places := other_codebook():
            await self._recoder.recode_users([users[at] for at in places], "touch")
            retried = await self._run([self._call(users[at], changes[users[at]]) for at in places])
            for at, result in zip(places, retried, strict=True):
                results[at] = result

    def _call(self, user: str, changes: Sequence[history.HistoryChange]) -> tuple[Any, ...]:
        assert self._sids.codebook is not None
        arguments = history.script_arguments(
            changes,
            codebook=self._sids.codebook,
            levels=self._sids.levels,
            incarnations=self._incarnations,
            bounds=self._bounds,
        )
        return history.APPLY_CHANGES.command([keys.history(user)], arguments)

    async def _run(self, calls: Sequence[tuple[Any, ...]]) -> list[list[int]]:
        return await run_pipeline(self._store, calls, history.APPLY_CHANGES)


def packed_entry(event: Any, packed_sid: bytes) -> bytes:
    """The packed entry of a click or purchase."""
    kind = history.KIND_CODES[event.kind] if isinstance(event, Click) else history.PURCHASE
    return history.pack_entry(event.ts, kind, event.event_id, packed_sid)
