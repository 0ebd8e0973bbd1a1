"""The serving agent: triggers in, recommendations out.

Triggers queue up while a batch is answered, and the next batch takes all that are in the queue: a single
request never waits for others, and under load the batches grow by themselves. Offsets are acknowledged after
the broker has confirmed the answers, so a trigger is answered at least once; after a crash it may be answered
twice, under the same request_id.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import faust
import platformdirs

from serving.answer_producer import AnswerProducer
from serving.bundle_loader import BundleLoader, BundleSource, LoadedRollout
from serving.catalogue import ServingCatalogue
from serving.exploration import Explorer
from serving.history_reader import HistoryReader, StoredUser
from serving.metrics import ServingMetrics
from serving.model_health import ModelHealthRecorder
from serving.recommender import Answer, Recommender, Request
from serving.settings import ServingSettings
from serving.shadow import Shadow
from streams.errors import SidstreamError
from streams.events import (
    CatalogItem,
    EventError,
    Exploration,
    Recommendation,
    Rollout,
    SidAssignment,
    Trigger,
    decode,
    encode,
)
from streams.settings import KafkaSettings, RedisSettings
from streams.wire.connect import bootstrap_servers
from streams.wire.dead_letters import RefusedRecord
from streams.wire.health_server import HealthServer
from streams.wire.records import KafkaRecord, kafka_record
from streams.wire.topic_table import TopicTable

log = logging.getLogger(__name__)


class ServingAgent:
    """One worker of the serving group. Call `run()`; `start()` and `stop()` are its halves."""

    def __init__(
        self,
        kafka: KafkaSettings,
        redis: RedisSettings,
        settings: ServingSettings,
        bundle_source: BundleSource,
        name: str,
    ) -> None:
        """`source` is where bundles come from, `name` the recommender whose rollouts are followed."""
        self._kafka = kafka
        self._settings = settings
        self.metrics = ServingMetrics()
        self._catalogue = ServingCatalogue(settings.index_delay_s, self.metrics.observe_index_build)
        self._bundle_loader = BundleLoader(
            bundle_source, name, settings.threads, settings.retry_max_s,
            indexed=lambda codebook: self._catalogue.index(codebook) is not None,
            on_loaded=self._on_rollout_loaded, on_failure=self.metrics.bundle_failures.inc,
        )  # fmt: skip
        explorer = Explorer(settings.explore, settings.explore_candidates, settings.explore_temperature)
        self._recommender = Recommender(
            self._catalogue.index, settings.limits, explorer,
            translator=self._catalogue.translator, title_of=self._catalogue.title_of,
        )  # fmt: skip
        self._history_reader = HistoryReader(redis, settings.redis_timeout_s, settings.redis_wait_s)
        self._answer_producer = AnswerProducer(kafka, settings.retry_max_s)
        self._model_health = ModelHealthRecorder(redis)
        self._shadow = Shadow(
            self._recommender, self._model_health, settings.shadow, busy=lambda: not self._queue.empty()
        )
        self._tables: list[TopicTable[Any]] = []
        # Room for two batches: the next is complete when this one ends, the rest waits in Kafka.
        self._queue: asyncio.Queue[tuple[Any, Any]] = asyncio.Queue(2 * settings.max_batch)
        self._tasks: list[asyncio.Task[None]] = []
        self._app: Any = None
        self._health_server: HealthServer | None = None
        self.waiting_for: str | None = "its start"

    @property
    def health_port(self) -> int | None:
        """The port of /health and /metrics; None: they are not served."""
        return self._health_server.port if self._health_server else None

    async def run(self, stop: asyncio.Event) -> None:
        """Answer triggers until `stop` is set. Raises the error that ended it otherwise."""
        stop_requested = asyncio.create_task(stop.wait())
        try:
            start_task = asyncio.create_task(self.start())
            await asyncio.wait({start_task, stop_requested}, return_when=asyncio.FIRST_COMPLETED)
            if not start_task.done():
                start_task.cancel()
                await asyncio.wait({start_task})
                return
            await start_task
            stream_end = asyncio.create_task(self._app.wait_until_stopped())
            done, _ = await asyncio.wait(
                {stop_requested, stream_end, *self._tasks}, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done - {stop_requested}:
                await task
            if stream_end in done:
                raise SidstreamError(f"the stream ended ({self._app.crash_reason!r}); start the agent again")
        finally:
            stop_requested.cancel()
            await self.stop()

    async def start(self) -> None:
        """Read the tables, load the bundles of the newest rollout, then join the group of serving agents.

        An agent without its bundle takes no partitions, so others answer meanwhile. Raises SidstreamError
        when Kafka does not answer or a topic does not exist.
        """
        if self._settings.metrics_port is not None:
            self._health_server = HealthServer(
                self._settings.metrics_host, self._settings.metrics_port, self.metrics.registry,
                "SIDSTREAM_SERVING__METRICS_PORT", lambda: self.waiting_for,
            )  # fmt: skip
        await self._answer_producer.start()
        if self._settings.explore > 0:
            await self._answer_producer.require(Exploration.topic)
        self._model_health.start()
        self._wait_for("the catalogue and its SIDs")
        await self._follow(TopicTable(self._kafka, CatalogItem, self._catalogue.on_item))
        await self._follow(TopicTable(self._kafka, SidAssignment, self._catalogue.on_sid))
        await self._catalogue.refresh()
        self._spawn(self._catalogue.run(), "index")
        self._wait_for("the newest rollout")
        await self._follow(TopicTable(self._kafka, Rollout, self._bundle_loader.on_rollout))
        self._wait_for("the bundles of the newest rollout")
        self._spawn(self._bundle_loader.run(), "bundles")
        await self._bundle_loader.wait_ready()
        self._wait_for("its share of the triggers")
        self._spawn(self._serve_batches(), "answers")
        self._app = self._create_faust_app()
        await self._app.start()

    async def stop(self) -> None:
        """Leave the group, then end everything else; another worker answers the triggers that wait."""
        self._wait_for("its end")
        if self._app is not None and self._app.started:
            await self._app.stop()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for table in self._tables:
            await table.stop()
        await self._shadow.stop()
        await self._model_health.stop()
        await self._answer_producer.stop()
        await self._history_reader.close()
        if self._health_server is not None:
            await asyncio.to_thread(self._health_server.close)
            self._health_server = None

    def _wait_for(self, what: str | None) -> None:
        self.waiting_for = what
        self.metrics.ready.set(0 if what else 1)

    def _on_rollout_loaded(self, loaded_rollout: Any) -> None:
        self.metrics.set_model_info(loaded_rollout)
        arms = ", ".join(f"{arm.name} {arm.bundle} ({arm.weight:g})" for arm in loaded_rollout.rollout.arms)
        log.info("in service after %s: %s", loaded_rollout.rollout.action, arms)

    async def _follow(self, table: TopicTable[Any]) -> None:
        await table.start()
        self._tables.append(table)
        await table.wait_caught_up()

    def _spawn(self, work: Any, name: str) -> None:
        self._tasks.append(asyncio.create_task(work, name=f"serving {name}"))

    def _create_faust_app(self) -> Any:
        """The Faust app: one agent that hands raw triggers to the queue; everything else of Faust is off."""
        app = faust.App(
            self._settings.group,
            broker=[f"kafka://{address}" for address in bootstrap_servers(self._kafka)],
            broker_credentials=_credentials(self._kafka),
            store="memory://", table_standby_replicas=0, topic_disable_leader=True,
            topic_allow_declare=False, web_enabled=False, stream_wait_empty=False, producer_linger=0,
            consumer_auto_offset_reset="earliest",
            broker_session_timeout=self._settings.session_timeout_s,
            # A third of the session: two heartbeats may be lost before a live worker counts as dead.
            broker_heartbeat_interval=self._settings.session_timeout_s / 3,
            # Faust makes this folder at each start; nothing is written there without tables.
            datadir=platformdirs.user_cache_path("sidstream") / "faust",
        )  # fmt: skip
        topic = app.topic(
            Trigger.topic, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw"
        )

        @app.agent(topic, name="serving", concurrency=1)
        async def queue_triggers(stream: Any) -> None:
            stream_without_acks = stream.noack()
            async for event in stream_without_acks.events():
                await self._queue.put((stream_without_acks, event))

        @app.on_partitions_assigned.connect
        async def on_partitions_assigned(*_: Any, **__: Any) -> None:
            self._wait_for(None)

        return app

    async def _serve_batches(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self._settings.max_batch and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            await self._answer_or_dead_letter([event for _, event in batch])
            for stream, event in batch:
                await stream.ack(event)

    async def _answer_or_dead_letter(self, events: Sequence[Any]) -> None:
        """Answer or dead-letter every event; an error with one event does not touch the others."""
        try:
            await self._answer_batch(events)
        except Exception as error:  # a defect of ours: it must not end the stream, nor take the batch with it
            if len(events) > 1:
                for event in events:
                    await self._answer_or_dead_letter([event])
                return
            log.exception("trigger %d:%d", events[0].message.partition, events[0].message.offset)
            await self._answer_producer.send([], [_refusal(events[0], "internal_error", repr(error))])

    async def _answer_batch(self, events: Sequence[Any]) -> None:
        begun = perf_counter()
        records: list[KafkaRecord] = []
        refusals: list[RefusedRecord] = []
        decoded_triggers: list[tuple[Any, Trigger]] = []
        for event in events:
            try:
                decoded_triggers.append((event, decode(Trigger, event.message.value)))
            except EventError as error:
                refusals.append(_refusal(event, error.reason, error.detail))
        requests = await self._read_requests([trigger for _, trigger in decoded_triggers])
        loaded_rollout = self._bundle_loader.loaded_rollout
        answers = await self._recommend_in_thread(requests, loaded_rollout)
        reply_topics = {trigger.reply_to for _, trigger in decoded_triggers if trigger.reply_to is not None}
        refused_topics = (
            await self._answer_producer.refused_reply_topics(reply_topics - {Recommendation.topic})
            if reply_topics
            else {}
        )
        copies: list[tuple[Any, KafkaRecord]] = []
        for (event, trigger), answer in zip(decoded_triggers, answers, strict=True):
            recommendation = answer.recommendation
            value = encode(recommendation)
            records.append(KafkaRecord(recommendation.topic, recommendation.key, value))
            if answer.exploration is not None:
                records += self._exploration_records(answer.exploration)
            if trigger.reply_to in refused_topics:
                refusals.append(_refusal(event, "reply_topic", refused_topics[trigger.reply_to]))
            elif trigger.reply_to is not None and trigger.reply_to != Recommendation.topic:
                copies.append((event, KafkaRecord(trigger.reply_to, recommendation.key, value)))
        with self.metrics.timed("reply"):
            _, failures = await asyncio.gather(
                self._answer_producer.send(records, refusals),
                self._answer_producer.offer([copy for _, copy in copies]),
            )
            unconfirmed_copies = [
                (event, why) for (event, _), why in zip(copies, failures, strict=True) if why is not None
            ]
            await self._answer_producer.send(
                [], [_refusal(event, "reply_topic", why) for event, why in unconfirmed_copies]
            )
        self.metrics.seconds.labels("total").observe(perf_counter() - begun)
        # After the answers are confirmed: a batch that fails is answered again, and counts once.
        self._model_health.count(answers)
        self._shadow.offer(requests, loaded_rollout)

    def _exploration_records(self, exploration: Exploration) -> list[KafkaRecord]:
        """The event's record, in a list; the list is empty where it is larger than topics take."""
        try:
            return [kafka_record(exploration, self._kafka.max_event_bytes)]
        except SidstreamError as error:
            log.warning("an exploration is not logged: %s; or lower serving.explore_candidates", error)
            return []

    async def _read_requests(self, triggers: Sequence[Trigger]) -> list[Request]:
        if not triggers:
            return []
        with self.metrics.timed("history"):
            stored_users = await self._history_reader.read([trigger.user_id for trigger in triggers])
        if stored_users is None:
            self.metrics.degraded.labels("redis").inc(len(triggers))
            stored_users = [StoredUser()] * len(triggers)
        return [Request(trigger, *user) for trigger, user in zip(triggers, stored_users, strict=True)]

    async def _recommend_in_thread(
        self, requests: Sequence[Request], loaded_rollout: LoadedRollout | None
    ) -> list[Answer]:
        if not requests:
            return []
        with self.metrics.timed("model"):
            # In a thread: the event loop goes on reading Kafka while the model computes.
            answers = await asyncio.to_thread(self._recommender.recommend, requests, loaded_rollout)
        self.metrics.batch.observe(len(requests))
        for answer in answers:
            self.metrics.answers.labels(answer.recommendation.arm or "none").inc()
            if answer.recommendation.fallback is not None:
                self.metrics.fallbacks.labels(answer.recommendation.fallback).inc()
            if answer.model_failed:
                self.metrics.degraded.labels("model").inc()
            for level, mass in enumerate(answer.invalid_mass):
                self.metrics.invalid_mass.labels(str(level)).observe(mass)
        return answers


def _refusal(event: Any, reason: str, detail: str) -> RefusedRecord:
    return RefusedRecord(event.message, "serving", reason, detail)


def _credentials(kafka: KafkaSettings) -> Any:
    """Faust's form of the connection's security; None for plain text."""
    import ssl

    context = (
        ssl.create_default_context(cafile=kafka.ssl_cafile)
        if kafka.security_protocol.endswith("SSL")
        else None
    )
    if kafka.sasl_mechanism is not None:
        password = kafka.sasl_password.get_secret_value() if kafka.sasl_password else None
        return faust.SASLCredentials(
            username=kafka.sasl_username,
            password=password,
            mechanism=kafka.sasl_mechanism,
            ssl_context=context,
        )
    return faust.SSLCredentials(context) if context is not None else None
