"""An event becomes a record that every Java client would place alike, or is refused before it is sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka.partitioner import DefaultPartitioner

from streams.errors import SidstreamError
from streams.events import Click, Purchase, SidAssignment, UserProfile
from streams.wire.records import BATCH_OVERHEAD, kafka_record, partition_of, require_size_within_limit

# org.apache.kafka.common.utils.UtilsTest.testMurmur2, as Java's signed integers.
JAVA = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}
LIMIT = 262_144


@pytest.mark.parametrize(("key", "murmur2"), JAVA.items())
@pytest.mark.parametrize("partitions", [1, 3, 4, 12, 2**31])
def test_a_key_goes_where_java_puts_it(key: bytes, murmur2: int, partitions: int) -> None:
    assert partition_of(key, partitions) == (murmur2 & 0x7FFFFFFF) % partitions


@given(key=st.binary(min_size=1), partitions=st.integers(1, 512))
def test_bulk_and_single_publishing_agree_on_the_partition(key: bytes, partitions: int) -> None:
    class Cluster:
        def topics(self) -> set[str]:
            return {"t"}

        def partitions_for_topic(self, topic: str) -> set[int]:
            return set(range(partitions))

        available_partitions_for_topic = partitions_for_topic

    assert DefaultPartitioner().partition("t", key, key, None, None, Cluster()) == partition_of(
        key, partitions
    )


def test_a_record_has_the_topic_the_key_and_the_json_of_its_event() -> None:
    click = Click.new(user_id="käufer", item_id="85123A", event_id="e", ts=1_767_225_600_000)
    click_record = kafka_record(click, LIMIT)
    assert (click_record.topic, click_record.key) == ("clicks", "käufer".encode())
    assert click_record.value.startswith(b'{"schema_version":1,"event_id":"e","ts":1767225600000,')


def test_the_sids_of_an_item_under_two_codebooks_have_two_keys_so_that_compaction_keeps_both() -> None:
    old, new = (SidAssignment.new(item_id="a/b", sid=[1], codebook=book) for book in ("0b", "1c"))
    assert (old.key, new.key) == (b"0b/a/b", b"1c/a/b")


def test_an_event_above_the_limit_is_refused_in_one_sentence_with_type_size_and_limit() -> None:
    huge = UserProfile.new(user_id="u", attributes={"about": "x" * LIMIT})
    with pytest.raises(SidstreamError) as refused:
        kafka_record(huge, LIMIT)
    text = str(refused.value)
    assert text.startswith("UserProfile weighs 262,")
    assert "262,144" in text
    assert "SIDSTREAM_KAFKA__MAX_EVENT_BYTES" in text
    assert "\n" not in text


def test_the_limit_counts_key_value_and_what_a_batch_adds() -> None:
    require_size_within_limit("v", b"key", bytes(100), 100 + 3 + BATCH_OVERHEAD)
    with pytest.raises(SidstreamError):
        require_size_within_limit("v", b"key", bytes(100), 100 + 3 + BATCH_OVERHEAD - 1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"price": -1.0}, "price is -1.0"),
        ({"user_id": ""}, "user_id"),
        ({"ts": 32503680000000}, "timestamp_in_future"),
    ],
)
def test_an_event_that_would_end_in_dead_letters_is_not_sent(change: dict[str, object], named: str) -> None:
    fields = {"schema_version": 1, "event_id": "e1", "ts": 1_767_225_600_000, "user_id": "u", "item_id": "i"}
    broken = Purchase(**{**fields, "price": 1.0, **change})  # type: ignore[arg-type]
    with pytest.raises(SidstreamError, match="Purchase e1 was not sent") as refused:
        kafka_record(broken, LIMIT)
    assert named in str(refused.value)
