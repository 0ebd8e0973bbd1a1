"""Records that cannot be applied, written to `dead-letters` with their bytes, their place and the reason."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.errors import MessageSizeTooLargeError
from prometheus_client import Counter

from streams.events import DeadLetter, encode

DEAD_LETTER_COUNT: Final = Counter(
    "sidstream_dead_letters_total", "Records that could not be applied", ["stage", "reason"]
)
# A decoder's message may quote its input.
_DETAIL_CHARS: Final = 500
# Bytes that a dead letter keeps of a value too large for the topic: enough to recognise it.
_CUT_BYTES: Final = 65_536


@dataclass(frozen=True, slots=True)
class RefusedRecord:
    """A record (topic, partition, offset, key, value), and why it was refused."""

    record: Any
    stage: str
    reason: str
    detail: str
    attempt: int = 1


def dead_letter(refusal: RefusedRecord) -> DeadLetter:
    """The event for a refused record; its id is the same where a stage refuses the record again."""
    record = refusal.record
    content = msgspec.msgpack.encode(
        [record.topic, record.partition, record.offset, refusal.stage, record.key, record.value]
    )
    return DeadLetter.new(
        event_id=blake2b(content, digest_size=16).hexdigest(),
        source=record.topic,
        partition=record.partition,
        offset=record.offset,
        key_base64=None if record.key is None else base64.b64encode(record.key).decode(),
        value_base64=None if record.value is None else base64.b64encode(record.value).decode(),
        stage=refusal.stage,
        reason=refusal.reason,
        detail=refusal.detail[:_DETAIL_CHARS],
        attempt=refusal.attempt,
    )


async def write_dead_letters(producer: AIOKafkaProducer, refusals: Iterable[RefusedRecord]) -> None:
    """Write dead letters and return when the broker has them. Raises KafkaError when it refuses one."""
    refusals = list(refusals)
    letters = [dead_letter(refusal) for refusal in refusals]
    await asyncio.gather(*[_send_dead_letter(producer, letter) for letter in letters])
    for refusal in refusals:
        DEAD_LETTER_COUNT.labels(refusal.stage, refusal.reason).inc()


async def _send_dead_letter(producer: AIOKafkaProducer, letter: DeadLetter) -> None:
    try:
        await producer.send_and_wait(letter.topic, encode(letter), key=letter.key)
    except MessageSizeTooLargeError:
        # Base64 grows a value by a third; one close to the limit may then be over it.
        value = base64.b64decode(letter.value_base64 or "")
        shortened = msgspec.structs.replace(
            letter,
            value_base64=base64.b64encode(value[:_CUT_BYTES]).decode(),
            key_base64=(letter.key_base64 or "")[: 4 * 1024] or None,
            detail=f"{letter.detail} (the first {_CUT_BYTES} of {len(value)} bytes are kept)",
        )
        await producer.send_and_wait(shortened.topic, encode(shortened), key=shortened.key)
