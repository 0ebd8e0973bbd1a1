"""The Faust app of the agents: three batch loops as services, no tables, no web server, no Faust consumer.

One loop reads the topics keyed by user in one consumer group and runs histories, preferences and outcomes on
each batch, in this order: a pair's history must know what came before it. The second gives new items their
SID, the third keeps users' profiles.
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

from agents.attribution.clock import PartitionClock
from agents.attribution.outcomes import OutcomeRules, Outcomes, tell_rules
from agents.attribution.preferences import Preferences
from agents.catalogue import Catalogue, Codebooks
from agents.histories import Histories
from agents.parking import Parking
from agents.profiles import Profiles
from agents.recoding import Recoding
from agents.settings import AgentsSettings
from agents.sids import Sids
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
from streams.wire.admin import end_offsets, incarnations, missing
from streams.wire.batches import BatchLoop, BatchOptions, Hooks, Incoming
from streams.wire.connect import bootstrap, client_options
from streams.wire.dead_letters import Refusal
from streams.wire.health_server import HealthServer

log = logging.getLogger(__name__)

USER_EVENTS: Final = (Click, Purchase, Impression, Recommendation)
# The topics whose events carry event time forward. Answers only hold it back: a worker that catches up must
# not close the windows of answers that it has yet to read, and an answer only repeats its trigger's time.
CLOCK_TOPICS: Final = tuple(kind.topic for kind in (Click, Purchase, Impression))
# Loggers of libraries whose lower levels are noise, or slow.
_QUIET: Final = ("aiokafka", "kafka", "faust", "mode", "asyncio", "wordllama", "urllib3")


class UserEvents(Hooks):
    """What happens around the batches of user events: event time, open windows, parked records."""

    name = "clock"

    def __init__(
        self, kafka: KafkaSettings, store: Any, sids: Sids, settings: AgentsSettings,
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
        self._parking = Parking(store, sids, settings.park_seconds)
        self._recoding = Recoding(store, sids, history)
        self._histories = Histories(store, sids, self._parking, self._recoding, history, self._incarnations)
        self._preferences = Preferences(
            store, producer, sids, rules, settings.max_rejected, self._clocks, self._incarnations
        )
        self._outcomes = Outcomes(store, rules, self._clocks, self._incarnations)

    @property
    def stages(self) -> tuple[Any, ...]:
        """In the order in which a batch passes them; event time moves last, when all else is done."""
        return self._histories, self._preferences, self._outcomes, self

    async def apply(self, batch: Sequence[Incoming]) -> Sequence[Refusal]:
        """Move event time."""
        now, wall = time.monotonic(), time.time_ns() // 1_000_000
        for record, event in batch:
            clock = self._clocks.get(record.partition)
            if clock is not None:
                clock.observe(record.topic, event.user_id, event.ts, now, wall)
        return ()

    async def started(self) -> None:
        """Learn the topics' incarnations. Raises SidstreamError when a topic is missing or cut otherwise."""
        await self.rewound()

    async def rewound(self) -> None:
        """A topic may have been made anew: its offsets no longer compare with those in Redis."""
        found = await asyncio.to_thread(incarnations, self._kafka)
        for kind in USER_EVENTS:
            if kind.topic not in found:
                raise missing(kind.topic)
            self._incarnations[kind.topic] = found[kind.topic]

    async def assigned(self, partitions: frozenset[TopicPartition]) -> None:
        """Resume event time and parked records of the partitions."""
        # A topic that was given more partitions shows here first, and a worker with other settings.
        await self.rewound()
        counted = await asyncio.to_thread(end_offsets, self._kafka, Recommendation.topic)
        await tell_rules(self._store, self._rules, len(counted))
        numbers = sorted({p.partition for p in partitions})
        for number in numbers:
            await self._forget_other_lives(number)
        await self._preferences.load(numbers)
        await self._outcomes.load(numbers)
        now = time.monotonic()
        self._clocks.clear()
        for number in numbers:
            floors = [self._preferences.reached(number), self._outcomes.reached(number)]
            floor = max((f for f in floors if f is not None), default=None)
            self._clocks[number] = PartitionClock(
                CLOCK_TOPICS, self._idle_s, now, floor, (Recommendation.topic,)
            )
        self._parking.own(numbers)
        self._recoding.own(numbers, len(counted))

    async def observed(self, partition: TopicPartition, lag: int) -> None:
        """Tell the clock whether a topic is read to its end."""
        clock = self._clocks.get(partition.partition)
        if clock is not None:
            clock.position(partition.topic, lag)

    async def tick(self) -> Sequence[Refusal]:
        """Change over to a new codebook, close windows, apply or give up parked records."""
        # Here and nowhere else: a batch and a round of closing see one codebook from beginning to end.
        self._sids.follow()
        await self._recoding.tick()
        refused = await self._parking.sweep(self._histories.apply_parked)
        await self._preferences.mature()
        await self._outcomes.mature()
        return refused

    async def buried(self, refused: Sequence[Refusal]) -> None:
        """Parked records that stand in dead letters now."""
        await self._parking.forget(refused)

    async def _forget_other_lives(self, partition: int) -> None:
        """Event time belongs to one life of the topics: events of new ones may be older."""
        life = " ".join(str(self._incarnations[topic]) for topic in CLOCK_TOPICS)
        stored = await self._store.hget(keys.clock(partition), "incarnations")
        if stored is not None and stored.decode() != life:
            await self._store.delete(keys.clock(partition))
        await self._store.hset(keys.clock(partition), "incarnations", life)


class Agents(Service):
    """Owns the clients and the table of SIDs, and runs the loops on them."""

    def __init__(
        self, kafka: KafkaSettings, redis: RedisSettings, history: HistorySettings, agents: AgentsSettings,
        codebooks: Codebooks, **service: Any,
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
        self._store = redisdb.async_client(self._redis)
        self._producer = AIOKafkaProducer(
            **client_options(self._kafka), enable_idempotence=True, max_batch_size=131_072
        )
        await self._producer.start()
        self._sids = Sids(self._kafka, self._store)
        await self._sids.start()
        users = UserEvents(self._kafka, self._store, self._sids, settings, self._history, self._producer)
        catalogue = Catalogue(
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
                (Profiles(self._store),),
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


class _Boot(BootStrategy):
    """Faust's own consumer, producer, tables and web stay off: the loops bring what they need."""

    enable_kafka = False
    enable_web = False


class _App(faust.App):
    BootStrategy = _Boot


def create_app(
    kafka: KafkaSettings, redis: RedisSettings, history: HistorySettings, agents: AgentsSettings,
    codebooks: Codebooks,
) -> faust.App:  # fmt: skip
    """The app, to be run by a `faust.Worker`. `codebooks` is the registry."""
    app = _App(
        agents.group,
        broker=[f"kafka://{address}" for address in bootstrap(kafka)],
        web_enabled=False,
        web_tables_enabled=False,
        web_router_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        table_standby_replicas=0,
        store="memory://",
        # Faust makes this folder at each start; nothing is written there without tables.
        datadir=platformdirs.user_cache_path("sidstream") / "faust",
    )

    @app.service
    class _Agents(Agents):
        def __init__(self, **service: Any) -> None:
            super().__init__(kafka, redis, history, agents, codebooks, **service)

    return app


def check(kafka: KafkaSettings, redis: RedisSettings) -> None:
    """Raise SidstreamError, in one sentence, where a worker could not start."""
    found = incarnations(kafka)
    for kind in (*USER_EVENTS, CatalogItem, UserProfile, SidAssignment):
        if kind.topic not in found:
            raise missing(kind.topic)
    try:
        with redisdb.client(redis) as store:
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
    quieten(_QUIET)
    app = make_app()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    worker = faust.Worker(app, loop=loop, quiet=True, override_logging=False, redirect_stdouts=False)
    worker.spinner = None  # writes escape sequences, also where no terminal is
    worker.execute_from_commandline()


def quieten(loggers: Iterable[str]) -> None:
    """Warnings and worse only."""
    for name in loggers:
        logging.getLogger(name).setLevel(logging.WARNING)


def _options(settings: AgentsSettings, group: str) -> BatchOptions:
    return BatchOptions(
        group, settings.batch_size, settings.batch_deadline_s, settings.attempts, settings.session_timeout_s
    )
