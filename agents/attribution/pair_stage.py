"""The stage that turns closed windows into preference pairs on the topic `preferences`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import redis.asyncio
from aiokafka import AIOKafkaProducer

from agents.assigned_sids import AssignedSids, sid_codes
from agents.attribution.event_time import PartitionClock
from agents.attribution.pairs import OpenPairWindows, PairDecision, PairRules, pair_id
from agents.attribution.window_stage import StateChange, WindowRules, WindowStage, unapplied_events
from agents.attribution.window_states import WindowStates
from agents.metrics import PAIRS
from streams.errors import SidstreamError
from streams.events import Click, Impression, PreferencePair, Purchase, Recommendation, encode
from streams.state import keys
from streams.state.history import HistoryEntry
from streams.state.redisdb import run_pipeline
from streams.state.translation import entries_under
from streams.wire.batch_stage import EVENT_COUNT, ReceivedEvent

VERSION = 1


class PairStage(WindowStage[OpenPairWindows]):
    """Kafka confirms a pair before the state that it came from is replaced, so no pair is lost."""

    name = "preferences"
    topics = frozenset(kind.topic for kind in (Click, Purchase, Impression, Recommendation))

    def __init__(
        self, store: redis.asyncio.Redis, producer: AIOKafkaProducer, sids: AssignedSids,
        windows: WindowRules, max_rejected: int, clocks: Mapping[int, PartitionClock],
        incarnations: Mapping[str, int],
    ) -> None:  # fmt: skip
        super().__init__(WindowStates(store, self.name), clocks, incarnations)
        self._store = store
        self._producer = producer
        self._sids = sids
        self._rules = PairRules(windows, max_rejected, lambda item: sids.get(item) is not None)
        self._unpublished: list[tuple[str, PairDecision]] = []
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(OpenPairWindows)

    def is_relevant(self, event: Any) -> bool:
        """False for impressions without a request: they open no window."""
        return not isinstance(event, Impression) or event.request_id is not None

    def can_close(self) -> bool:
        """Without a codebook no item has a SID: windows stay open until there is one."""
        return self._sids.complete_since_ms() is not None

    def decode(self, body: bytes) -> OpenPairWindows:
        """Read a stored state."""
        state = self._decoder.decode(body)
        if state.version != VERSION:
            raise SidstreamError(
                f"a preference state has version {state.version}, this sidstream reads {VERSION}: "
                "replay the topics into an empty Redis"
            )
        return state

    def encode(self, state: OpenPairWindows) -> bytes:
        """Bytes of a state."""
        return self._encoder.encode(state)

    def add_events(
        self, state: OpenPairWindows | None, events: Sequence[ReceivedEvent], closed_until: int | None
    ) -> StateChange[OpenPairWindows]:
        """The state with the events."""
        windows = state or OpenPairWindows()
        has_new = False
        for record, event in unapplied_events(windows.fences, events, self._incarnations):
            if windows.add_event(event, self._rules.windows, closed_until):
                has_new = True
            else:
                EVENT_COUNT.labels(record.topic, "too_late_for_pairs").inc()
        if not has_new and state is None:
            return StateChange(None, None)
        return StateChange(windows, windows.next_due(self._rules.windows))

    def close_windows(
        self, user: str, state: OpenPairWindows | None, watermark: int
    ) -> StateChange[OpenPairWindows]:
        """Decide what is due; `publish_output` sends the pairs."""
        if state is None:
            return StateChange(None, None)
        for decision in state.close_due(watermark, self._rules):
            self._unpublished.append((user, decision))
        if state.is_finished(watermark, self._rules.windows):
            return StateChange(None, None)
        return StateChange(state, state.next_due(self._rules.windows, watermark))

    async def publish_output(self) -> None:
        """Write the decided pairs and wait until Kafka has them."""
        decisions, self._unpublished = self._unpublished, []
        if not decisions:
            return
        users = list(dict.fromkeys(user for user, _ in decisions))
        values = await run_pipeline(self._store, [("GET", keys.history(user)) for user in users])
        codebook = self._sids.codebook
        assert codebook is not None
        # Under the pair's codebook, also where the stored history is not recoded to it yet.
        histories = {
            user: entries_under(value, codebook, self._sids.translate)
            for user, value in zip(users, values, strict=True)
        }
        pairs = [self._pair(user, decision, histories[user]) for user, decision in decisions]
        confirmations = [await self._producer.send(pair.topic, encode(pair), key=pair.key) for pair in pairs]
        await asyncio.gather(*confirmations)
        for pair in pairs:
            PAIRS.labels(pair.scheme).inc()

    def _pair(self, user: str, decision: PairDecision, entries: Sequence[HistoryEntry]) -> PreferencePair:
        """The event of a decision; its history is what the user did strictly before it."""
        codebook = self._sids.codebook
        assert codebook is not None
        trigger = None if decision.trigger is None else self._sids.get(decision.trigger)
        return PreferencePair.new(
            event_id=pair_id(user, decision, codebook),
            ts=decision.ts,
            user_id=user,
            scheme=decision.scheme,
            codebook=codebook,
            chosen_item=decision.chosen,
            chosen=self._codes(decision.chosen),
            rejected_items=list(decision.rejected),
            rejected=[self._codes(item) for item in decision.rejected],
            history=[list(entry.sid) for entry in entries if entry.ts < decision.before],
            trigger=None if trigger is None else sid_codes(trigger),
            request_id=decision.request_id,
            scene=decision.scene,
        )

    def _codes(self, item: str) -> Sequence[int]:
        packed = self._sids.get(item)
        assert packed is not None
        return sid_codes(packed)
