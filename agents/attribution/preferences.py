"""The stage that turns closed windows into preference pairs on the topic `preferences`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import redis.asyncio
from aiokafka import AIOKafkaProducer

from agents.attribution import pairs
from agents.attribution.clock import PartitionClock
from agents.attribution.states import States
from agents.attribution.windows import Rules, Step, Windowed, fenced
from agents.metrics import PAIRS
from agents.sids import Sids, as_list
from streams.errors import SidstreamError
from streams.events import Click, Impression, PreferencePair, Purchase, Recommendation, encode
from streams.state import keys
from streams.state.history import Entry
from streams.state.redisdb import run_pipeline
from streams.state.translation import under
from streams.wire.batches import EVENTS, Incoming

VERSION = 1


class Preferences(Windowed[pairs.Open]):
    """Pairs are acknowledged by Kafka before the state that made them is replaced."""

    name = "preferences"
    topics = frozenset(kind.topic for kind in (Click, Purchase, Impression, Recommendation))

    def __init__(
        self, store: redis.asyncio.Redis, producer: AIOKafkaProducer, sids: Sids, rules: Rules,
        max_rejected: int, clocks: Mapping[int, PartitionClock], incarnations: Mapping[str, int],
    ) -> None:  # fmt: skip
        super().__init__(States(store, self.name), clocks, incarnations)
        self._store = store
        self._producer = producer
        self._sids = sids
        self._rules = rules
        self._max_rejected = max_rejected
        self._decided: list[tuple[str, pairs.Decision]] = []
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(pairs.Open)

    def wants(self, event: Any) -> bool:
        """Impressions without a request open nothing."""
        return not isinstance(event, Impression) or event.request_id is not None

    def ready(self) -> bool:
        """Without a codebook nothing has a SID: windows stay open until there is one."""
        return self._sids.whole_since_ms() is not None

    def decode(self, body: bytes) -> pairs.Open:
        """Read a stored state."""
        state = self._decoder.decode(body)
        if state.version != VERSION:
            raise SidstreamError(
                f"a preference state has version {state.version}, this sidstream reads {VERSION}: "
                "replay the topics into an empty Redis"
            )
        return state

    def encode(self, state: pairs.Open) -> bytes:
        """Bytes of a state."""
        return self._encoder.encode(state)

    def add(
        self, user: str, state: pairs.Open | None, events: Sequence[Incoming], matured: int | None
    ) -> Step[pairs.Open]:
        """The state with the events."""
        opened = state or pairs.Open()
        kept = False
        for record, event in fenced(opened.fences, events, self._incarnations):
            if pairs.add(opened, event, self._rules, matured):
                kept = True
            else:
                EVENTS.labels(record.topic, "too_late_for_pairs").inc()
        if not kept and state is None:
            return Step(None, None)
        return Step(opened, pairs.due(opened, self._rules))

    def close(self, user: str, state: pairs.Open | None, watermark: int) -> Step[pairs.Open]:
        """Decide what is due; the pairs go out by `emit`."""
        if state is None:
            return Step(None, None)
        known = lambda item: self._sids.get(item) is not None  # noqa: E731
        for decision in pairs.close(state, watermark, self._rules, self._max_rejected, known):
            self._decided.append((user, decision))
        if pairs.empty(state, watermark, self._rules):
            return Step(None, None)
        return Step(state, pairs.due(state, self._rules, watermark))

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
            user: under(value, codebook, self._sids.translate)
            for user, value in zip(users, values, strict=True)
        }
        made = [self.pair(user, decision, pasts[user]) for user, decision in decided]
        sent = [await self._producer.send(pair.topic, encode(pair), key=pair.key) for pair in made]
        await asyncio.gather(*sent)
        for pair in made:
            PAIRS.labels(pair.scheme).inc()

    def pair(self, user: str, decision: pairs.Decision, past: Sequence[Entry]) -> PreferencePair:
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
            trigger=None if trigger is None else as_list(trigger),
            request_id=decision.request_id,
            scene=decision.scene,
        )

    def _sid(self, item: str) -> Sequence[int]:
        packed = self._sids.get(item)
        assert packed is not None
        return as_list(packed)
