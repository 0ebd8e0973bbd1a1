"""A stand-in for serving: answers every trigger with an empty recommendation, where it is asked to."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any, Self

from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from streams.events import Recommendation, Trigger, decode, encode
from streams.settings import KafkaSettings
from streams.wire.connect import client_options


def read_new(
    kafka: KafkaSettings, topic: str, count: int, since: dict[int, int], timeout: float = 30.0
) -> list[Any]:
    """The first `count` records of a topic from the offsets `since` on; AssertionError if there are fewer."""

    found: list[Any] = []
    deadline = time.monotonic() + timeout
    with KafkaConsumer(**client_options(kafka), group_id=None, enable_auto_commit=False) as consumer:
        consumer.assign([TopicPartition(topic, partition) for partition in since])
        for partition, offset in since.items():
            consumer.seek(TopicPartition(topic, partition), offset)
        while len(found) < count:
            assert time.monotonic() < deadline, (
                f"{len(found)} of {count} records on {topic} in {timeout:.0f} s"
            )
            for records in consumer.poll(timeout_ms=200).values():
                found.extend(records)
    return found


class Responder:
    """Reads `triggers` from now on in a thread of its own and answers; `answer` makes the answer's bytes."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="responder", daemon=True)
        self.seen: list[Trigger] = []

    def answer(self, trigger: Trigger) -> bytes:
        """What is sent back."""
        return encode(
            Recommendation.new(
                request_id=trigger.request_id, user_id=trigger.user_id, items=[], fallback="no_catalog",
                trigger_item_id=trigger.item_id,
            )
        )  # fmt: skip

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(30), "the responder did not reach the end of `triggers`"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        options = client_options(self._kafka)
        with (
            KafkaConsumer(**options, group_id=None, enable_auto_commit=False) as consumer,
            KafkaProducer(**options) as producer,
        ):
            triggers = [TopicPartition("triggers", p) for p in consumer.partitions_for_topic("triggers")]
            consumer.assign(triggers)
            consumer.seek_to_end(*triggers)
            for partition in triggers:
                consumer.position(partition)
            self._ready.set()
            while not self._stop.is_set():
                for records in consumer.poll(timeout_ms=100).values():
                    for record in records:
                        trigger = decode(Trigger, record.value)
                        self.seen.append(trigger)
                        for topic in filter(None, ("recommendations", trigger.reply_to)):
                            producer.send(topic, key=trigger.key, value=self.answer(trigger))
