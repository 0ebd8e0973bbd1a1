"""The stage that turns closed windows into preference pairs on the topic `preferences`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import redis.asyncio
from aiokafka import AIOKafkaProducer

from agents.assigned_sids import AssignedSids, sid_codes
from agents.attribution import pairs
from agents.attribution.event_time import PartitionClock
from agents.attribution.window_stage import StateChange, WindowRules, WindowStage, unapplied_events
from agents.attribution.window_states import WindowStates
from agents.metrics import PAIRS
from streams.errors import SidstreamError
from streams.events import Click, Impression, PreferencePair, Purchase, Recommendation, encode
from streams.state import keys
from streams.state.history import HistoryEntry
from streams.state.redisdb import run_pipeline
from streams.state.translation import entries_under
from streams.wire.batch_loop import EVENT_COUNT, ReceivedEvent

VERSION = 1


class PairStage(WindowStage[pairs.OpenPairWindows]):
    """Pairs are acknowledged by Kafka before the state that made them is replaced."""

    name = "preferences"
    topics = frozenset(kind.topic for kind in (Click, Purchase, Impression, Recommendation))

    def __init__(
        self, store: redis.asyncio.Redis, producer: AIOKafkaProducer, sids: AssignedSids, rules: WindowRules,
        max_rejected: int, clocks: Mapping[int, PartitionClock], incarnations: Mapping[str, int],
    ) -> None:  # fmt: skip
        super().__init__(WindowStates(store, self.name), clocks, incarnations)
        self._store = store
        self._producer = producer
        self._sids = sids
        self._rules = rules
        self._max_rejected = max_rejected
        self._decided: list[tuple[str, pairs.PairDecision]] = []
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(pairs.OpenPairWindows)

    def wants(self, event: Any) -> bool:
        """Impressions without a request open nothing."""
        return not isinstance(event, Impression) or event.request_id is not None

    def ready(self) -> bool:
        """Without a codebook nothing has a SID: windows stay open until there is one."""
        return self._sids.whole_since_ms() is not None

    def decode(self, body: bytes) -> pairs.OpenPairWindows:
        """Read a stored state."""
        state = self._decoder.decode(body)
        if state.version != VERSION:
            raise SidstreamError(
                f"a preference state has version {state.version}, this sidstream reads {VERSION}: "
                "replay the topics into an empty Redis"
            )
        return state

    def encode(self, state: pairs.OpenPairWindows) -> bytes:
        """Bytes of a state."""
        return self._encoder.encode(state)

    def add(
        self,
        user: str,
        state: pairs.OpenPairWindows | None,
        events: Sequence[ReceivedEvent],
        matured: int | None,
    ) -> StateChange[pairs.OpenPairWindows]:
        """The state with the events."""
        opened = state or pairs.OpenPairWindows()
        kept = False
        for record, event in unapplied_events(opened.fences, events, self._incarnations):
            if pairs.add(opened, event, self._rules, matured):
                kept = True
            else:
                EVENT_COUNT.labels(record.topic, "too_late_for_pairs").inc()
        if not kept and state is None:
            return StateChange(None, None)
        return StateChange(opened, pairs.due(opened, self._rules))

    def close(
        self, user: str, state: pairs.OpenPairWindows | None, watermark: int
    ) -> StateChange[pairs.OpenPairWindows]:
        """Decide what is due; the pairs go out by `emit`."""
        if state is None:
            return StateChange(None, None)
        known = lambda item: self._sids.get(item) is not None  # noqa: E731
        for decision in pairs.close(state, watermark, self._rules, self._max_rejected, known):
            self._decided.append((user, decision))
        if pairs.empty(state, watermark, self._rules):
            return StateChange(None, None)
        return StateChange(state, pairs.due(state, self._rules, watermark))

    async def emit(self) -> None:
        """Write the decided pairs and wait until Kafka has them."""
        decided, self._decided = self._decided, []
        if not decided:
            return
        users = list(dict.fromkeys(user for user, _ in decided))
        values = await run_pipeline(self._store, [("GET", keys.history(user)) for user in users])
        codebook = self._sids.codebook
        assert codebook is not None
        # Told under the codebook of the pair, also where a history was not brought over to it yet.
        pasts = {
            user: entries_under(value, codebook, self._sids.translate)
            for user, value in zip(users, values, strict=True)
        }
        made = [self.pair(user, decision, pasts[user]) for user, decision in decided]
        sent = [await self._producer.send(pair.topic, encode(pair), key=pair.key) for pair in made]
        await asyncio.gather(*sent)
        for pair in made:
            PAIRS.labels(pair.scheme).inc()

    def pair(self, user: str, decision: pairs.PairDecision, past: Sequence[HistoryEntry]) -> PreferencePair:
        """The event of a decision; its history is what the user did strictly before."""
        codebook = self._sids.codebook
        assert codebook is not None
        trigger = None if decision.trigger is None else self._sids.get(decision.trigger)
        return PreferencePair.new(
            event_id=pairs.pair_id(user, decision, codebook),
            ts=decision.ts,
            user_id=user,
            scheme=decision.scheme,
            codebook=codebook,
            chosen_item=decision.chosen,
            chosen=self._sid(decision.chosen),
            rejected_items=list(decision.rejected),
            rejected=[self._sid(item) for item in decision.rejected],
            history=[list(e.sid) for e in past if e.ts < decision.before],
            trigger=None if trigger is None else sid_codes(trigger),
            request_id=decision.request_id,
            scene=decision.scene,
        )

    def _sid(self, item: str) -> Sequence[int]:
        packed = self._sids.get(item)
        assert packed is not None
        return sid_codes(packed)
