"""The Lua script and the Python function write the same history, byte for byte, on a real Redis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streams.settings import HistorySettings
from streams.state import history
from streams.state.history import (
    HistoryChange,
    OtherCodebookError,
    apply_changes,
    pack_entry,
    pack_sid,
    script_arguments,
)
from streams.state.translation import REPLACE_IF_UNCHANGED, recode_history

pytestmark = pytest.mark.integration

BOOKS = ["00112233" * 2, "ffeeddcc" * 2]


@pytest.fixture(scope="module")
def store(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def translate_most(_tag: str, packed: bytes) -> bytes | None:
    """Another SID for most, none for those that begin with 0 or 255: their entries wait."""
    return None if packed[:2] in (b"\x00\x00", b"\x00\xff") else packed[::-1]


# Few timestamps, kinds and codes, so that equal entries and ties happen; bytes above 127 and NUL, so that
# a comparison by locale would show.
change = st.builds(
    lambda source, offset, ts, kind, event, sid: (source, offset, ts, kind, event, sid),
    st.sampled_from([None, "clicks", "purchases"]),
    st.integers(0, 40) | st.integers(0, 2**48 - 2),
    st.integers(0, 40).map(lambda n: 1_600_000_000_000 + n * 43_200_000) | st.integers(0, 2**48 - 1),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 20).map(str),
    st.tuples(*[st.sampled_from([0, 1, 127, 128, 255, 256, 65_535])] * 3),
)
batches = st.lists(st.lists(change, max_size=12), min_size=1, max_size=5)


@given(
    batches, st.integers(1, 15), st.integers(1, 30),
    st.lists(st.tuples(st.sampled_from(BOOKS), st.sampled_from([1, 2**32 - 1])), min_size=5, max_size=5),
)  # fmt: skip
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_script_and_function_agree_on_every_sequence_of_batches(store, batches, length, days, lives) -> None:
    bounds = HistorySettings(max_length=length, max_age_days=days)
    script, replace = (
        store.register_script(history.APPLY_CHANGES.source),
        store.register_script(REPLACE_IF_UNCHANGED.source),
    )
    store.delete("h:{test}")
    value: bytes | None = None
    for batch, (book, incarnation) in zip(batches, lives, strict=False):
        changes = [
            HistoryChange(source, offset, pack_entry(ts, kind, event, pack_sid(sid)))
            for source, offset, ts, kind, event, sid in batch
        ]
        incarnations = {"clicks": incarnation, "purchases": 5}
        arguments = script_arguments(
            changes, codebook=book, levels=3, incarnations=incarnations, bounds=bounds
        )
        try:
            value, applied, skipped = apply_changes(
                value, changes, codebook=book, levels=3, incarnations=incarnations, bounds=bounds
            )
        except OtherCodebookError:
            assert script(keys=["h:{test}"], args=arguments) == history.OTHER_CODEBOOK_RESULT
            assert store.get("h:{test}") == value
            assert value is not None
            new = recode_history(value, translate_most, codebook=book, levels=3, bounds=bounds)
            assert replace(keys=["h:{test}"], args=[value + b"x", new]) == 0
            assert replace(keys=["h:{test}"], args=[value, new]) == 1
            value, applied, skipped = apply_changes(
                new, changes, codebook=book, levels=3, incarnations=incarnations, bounds=bounds
            )
        assert script(keys=["h:{test}"], args=arguments) == [applied, skipped]
        assert store.get("h:{test}") == value


def test_a_history_of_another_layout_is_left_alone(store) -> None:
    store.set("h:{test}", b"\x09" + bytes(30))
    bounds = HistorySettings()
    changes = [HistoryChange(None, 0, pack_entry(1, 1, "e", pack_sid((1, 2, 3))))]
    arguments = script_arguments(
        changes, codebook=BOOKS[0], levels=3, incarnations={"clicks": 1, "purchases": 1}, bounds=bounds
    )
    with pytest.raises(redis.ResponseError, match="layout 9"):
        store.register_script(history.APPLY_CHANGES.source)(keys=["h:{test}"], args=arguments)
    assert store.get("h:{test}") == b"\x09" + bytes(30)
