"""The Faust app of the agents: three batch loops as services, no tables, no web server, no Faust consumer.

One loop reads the topics keyed by user in one consumer group and runs histories, preferences and outcomes on
each batch, in this order: a pair's history must hold what came before it. The second loop gives new items
their SID, the third keeps users' profiles.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import faust
import platformdirs
from aiokafka import AIOKafkaProducer, TopicPartition
from faust.app.base import BootStrategy
from mode import Service
from prometheus_client import REGISTRY

from agents.assigned_sids import AssignedSids
from agents.attribution.event_time import PartitionClock
from agents.attribution.outcome_stage import OutcomeStage, store_rules
from agents.attribution.outcomes import OutcomeRules
from agents.attribution.pair_stage import PairStage
from agents.history_recoder import HistoryRecoder
from agents.history_writer import HistoryWriter
from agents.parked_events import ParkedEvents
from agents.profile_writer import ProfileWriter
from agents.settings import AgentsSettings
from agents.sid_allocator import CodebookRegistry, SidAllocator
from streams.errors import SidstreamError
from streams.events import (
    CatalogItem,
    Click,
    Impression,
    Purchase,
    Recommendation,
    SidAssignment,
    UserProfile,
)
from streams.settings import HistorySettings, KafkaSettings, RedisSettings
from streams.state import keys, redisdb
from streams.wire.admin import end_offsets, incarnations, missing_topic_error
from streams.wire.batch_loop import BatchLoop, BatchOptions
from streams.wire.batch_stage import BatchHooks, ReceivedEvent
from streams.wire.connect import bootstrap_servers, client_options
from streams.wire.dead_letters import RefusedRecord
from streams.wire.health_server import HealthServer

log = logging.getLogger(__name__)

USER_EVENTS: Final = (Click, Purchase, Impression, Recommendation)
# The topics whose events move event time forward. Answers only hold it back: a worker that catches up must
# not close the windows of answers that it has not read yet, and an answer only repeats its trigger's time.
CLOCK_TOPICS: Final = tuple(kind.topic for kind in (Click, Purchase, Impression))
# Loggers of libraries whose lower levels are noise, or slow.
_NOISY_LOGGERS: Final = ("aiokafka", "kafka", "faust", "mode", "asyncio", "wordllama", "urllib3")


class UserEventHooks(BatchHooks):
    """The work around the batches of user events: event time, open windows, parked records."""

    name = "clock"

    def __init__(
        self, kafka: KafkaSettings, store: Any, sids: AssignedSids, settings: AgentsSettings,
        history: HistorySettings, producer: AIOKafkaProducer,
    ) -> None:  # fmt: skip
        rules = OutcomeRules(
            settings.attribution_window_s * 1000, settings.allowed_lateness_s * 1000, settings.cohort_s * 1000
        )
        self._rules = rules
        self._kafka = kafka
        self._store = store
        self._idle_s = settings.idle_s
        self._clocks: dict[int, PartitionClock] = {}
        self._incarnations: dict[str, int] = {}
        self._sids = sids
        self._parked_events = ParkedEvents(store, sids, settings.park_seconds)
        self._recoder = HistoryRecoder(store, sids, history)
        self._history_writer = HistoryWriter(
            store, sids, self._parked_events, self._recoder, history, self._incarnations
        )
        self._pair_stage = PairStage(
            store, producer, sids, rules, settings.max_rejected, self._clocks, self._incarnations
        )
        self._outcome_stage = OutcomeStage(store, rules, self._clocks, self._incarnations)

    @property
    def stages(self) -> tuple[Any, ...]:
        """In the order in which a batch passes them; event time moves last, after all other stages."""
        return self._history_writer, self._pair_stage, self._outcome_stage, self

    async def apply(self, batch: Sequence[ReceivedEvent]) -> Sequence[RefusedRecord]:
        """Move event time."""
        now, wall = time.monotonic(), time.time_ns() // 1_000_000
        for record, event in batch:
            clock = self._clocks.get(record.partition)
            if clock is not None:
                clock.observe(record.topic, event.user_id, event.ts, now, wall)
        return ()

    async def on_start(self) -> None:
        """Read the topics' incarnations. Raises SidstreamError when a topic is missing."""
        await self.on_rewound()

    async def on_rewound(self) -> None:
        """Read the incarnations again: offsets of a new topic do not compare with those in Redis."""
        current = await asyncio.to_thread(incarnations, self._kafka)
        for kind in USER_EVENTS:
            if kind.topic not in current:
                raise missing_topic_error(kind.topic)
            self._incarnations[kind.topic] = current[kind.topic]

    async def on_assigned(self, partitions: frozenset[TopicPartition]) -> None:
        """Resume event time and parked records of the partitions."""
        # An assignment is the first sign of a topic with more partitions, or of other settings.
        await self.on_rewound()
        partition_ends = await asyncio.to_thread(end_offsets, self._kafka, Recommendation.topic)
        await store_rules(self._store, self._rules, len(partition_ends))
        numbers = sorted({p.partition for p in partitions})
        for number in numbers:
            await self._forget_earlier_incarnations(number)
        await self._pair_stage.take_partitions(numbers)
        await self._outcome_stage.take_partitions(numbers)
        now = time.monotonic()
        self._clocks.clear()
        for number in numbers:
            watermarks = [self._pair_stage.closed_until(number), self._outcome_stage.closed_until(number)]
            floor = max((ms for ms in watermarks if ms is not None), default=None)
            self._clocks[number] = PartitionClock(
                CLOCK_TOPICS, self._idle_s, now, floor, (Recommendation.topic,)
            )
        self._parked_events.take_partitions(numbers)
        self._recoder.take_partitions(numbers, len(partition_ends))

    async def on_lag(self, partition: TopicPartition, lag: int) -> None:
        """Tell the clock how far the topic is read."""
        clock = self._clocks.get(partition.partition)
        if clock is not None:
            clock.observe_lag(partition.topic, lag)

    async def on_tick(self) -> Sequence[RefusedRecord]:
        """Switch to a new codebook, close windows, apply parked records or return the expired ones."""
        # Only here: a batch, and a round of closing windows, see one codebook from beginning to end.
        self._sids.switch_to_newest()
        await self._recoder.run_slice()
        refused = await self._parked_events.sweep(self._history_writer.apply_parked)
        await self._pair_stage.close_due_windows()
        await self._outcome_stage.close_due_windows()
        return refused

    async def on_dead_lettered(self, refused: Sequence[RefusedRecord]) -> None:
        """Remove parked records that are in dead letters now."""
        await self._parked_events.remove_dead_lettered(refused)

    async def _forget_earlier_incarnations(self, partition: int) -> None:
        """Drop watermarks of earlier incarnations of the topics: events of the new ones may be older."""
        current = " ".join(str(self._incarnations[topic]) for topic in CLOCK_TOPICS)
        stored = await self._store.hget(keys.clock(partition), "incarnations")
        if stored is not None and stored.decode() != current:
            await self._store.delete(keys.clock(partition))
        await self._store.hset(keys.clock(partition), "incarnations", current)


class Agents(Service):
    """Owns the clients and the table of SIDs, and runs the loops on them."""

    def __init__(
        self, kafka: KafkaSettings, redis: RedisSettings, history: HistorySettings, agents: AgentsSettings,
        codebooks: CodebookRegistry, **service: Any,
    ) -> None:  # fmt: skip
        super().__init__(**service)
        self._kafka = kafka
        self._redis = redis
        self._history = history
        self._settings = agents
        self._codebooks = codebooks
        self._store: Any = None
        self._producer: Any = None
        self._sids: Any = None
        self._health_server: HealthServer | None = None

    async def on_start(self) -> None:
        """Connect, read the SIDs, then start the loops."""
        settings = self._settings
        if settings.metrics_port is not None:
            self._health_server = HealthServer(
                settings.metrics_host, settings.metrics_port, REGISTRY, "SIDSTREAM_AGENTS__METRICS_PORT"
            )
        self._store = redisdb.async_redis_client(self._redis)
        self._producer = AIOKafkaProducer(
            **client_options(self._kafka), enable_idempotence=True, max_batch_size=131_072
        )
        await self._producer.start()
        self._sids = AssignedSids(self._kafka, self._store)
        await self._sids.start()
        users = UserEventHooks(self._kafka, self._store, self._sids, settings, self._history, self._producer)
        catalogue = SidAllocator(
            self._kafka, self._store, self._producer, self._sids, self._codebooks,
            settings.codebook_check_s,
        )  # fmt: skip
        await self.add_runtime_dependency(
            BatchLoop(self._kafka, USER_EVENTS, users.stages, _options(settings, settings.group), users)
        )
        await self.add_runtime_dependency(
            BatchLoop(
                self._kafka,
                (CatalogItem,),
                (catalogue,),
                _options(settings, f"{settings.group}-catalog"),
                catalogue,
                tombstones=True,
            )
        )
        await self.add_runtime_dependency(
            BatchLoop(
                self._kafka,
                (UserProfile,),
                (ProfileWriter(self._store),),
                _options(settings, f"{settings.group}-users"),
                tombstones=True,
            )
        )

    async def on_shutdown(self) -> None:
        """Close the clients once the loops have ended."""
        if self._sids is not None:
            await self._sids.stop()
        if self._producer is not None:
            await self._producer.stop()
        if self._store is not None:
            await self._store.aclose()
        if self._health_server is not None:
            await asyncio.to_thread(self._health_server.close)


class _ServicesOnlyBoot(BootStrategy):
    """Faust's own consumer, producer, tables and web server stay off: the loops bring their own clients."""

    enable_kafka = False
    enable_web = False


class _App(faust.App):
    BootStrategy = _ServicesOnlyBoot


def create_app(
    kafka: KafkaSettings, redis: RedisSettings, history: HistorySettings, agents: AgentsSettings,
    codebooks: CodebookRegistry,
) -> faust.App:  # fmt: skip
    """The app, to be run by a `faust.Worker`. `codebooks` is the registry."""
    app = _App(
        agents.group,
        broker=[f"kafka://{address}" for address in bootstrap_servers(kafka)],
        web_enabled=False,
        web_tables_enabled=False,
        web_router_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        table_standby_replicas=0,
        store="memory://",
        # Faust creates this folder at each start; without tables it writes nothing there.
        datadir=platformdirs.user_cache_path("sidstream") / "faust",
    )

    @app.service
    class _Agents(Agents):
        def __init__(self, **service: Any) -> None:
            super().__init__(kafka, redis, history, agents, codebooks, **service)

    return app


def check_prerequisites(kafka: KafkaSettings, redis: RedisSettings) -> None:
    """Raise SidstreamError, in one sentence, where a worker could not start."""
    standing_topics = incarnations(kafka)
    for kind in (*USER_EVENTS, CatalogItem, UserProfile, SidAssignment):
        if kind.topic not in standing_topics:
            raise missing_topic_error(kind.topic)
    try:
        with redisdb.redis_client(redis) as store:
            store.ping()
    except redisdb.OUTAGES as error:
        raise SidstreamError(
            f"Redis does not answer ({type(error).__name__}): start the local stack with `sidstream up`, or "
            "correct SIDSTREAM_REDIS__URL"
        ) from error


def run_worker(make_app: Callable[[], faust.App]) -> None:
    """Run the app on uvloop until SIGTERM or SIGINT; batches in work are finished. Ends the process."""
    import mode.loop

    mode.loop.use("uvloop")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    silence_loggers(_NOISY_LOGGERS)
    app = make_app()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    worker = faust.Worker(app, loop=loop, quiet=True, override_logging=False, redirect_stdouts=False)
    worker.spinner = None  # writes escape sequences, also where no terminal is
    worker.execute_from_commandline()


def silence_loggers(loggers: Iterable[str]) -> None:
    """Let these loggers write warnings and errors only."""
    for name in loggers:
        logging.getLogger(name).setLevel(logging.WARNING)


def _options(settings: AgentsSettings, group: str) -> BatchOptions:
    return BatchOptions(
        group, settings.batch_size, settings.batch_deadline_s, settings.attempts, settings.session_timeout_s
    )
