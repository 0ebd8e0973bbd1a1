"""The packed history: any order of the same events gives the same bytes, and redelivery changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.errors import SidstreamError
from streams.settings import HistorySettings
from streams.state import history
from streams.state.history import (
    CLICK,
    PURCHASE,
    HistoryChange,
    OtherCodebookError,
    apply_changes,
    decode_history,
    join_parts,
    pack_entry,
    pack_sid,
    split_parts,
)

BOOK = "0123456789abcdef"
LIVES = {"clicks": 7, "purchases": 9}
T0 = 1_600_000_000_000


def bounds(length: int = 50, days: int = 400) -> HistorySettings:
    return HistorySettings(max_length=length, max_age_days=days)


def change(
    source: str | None, offset: int, ts: int, event_id: str, sid: tuple[int, ...] = (1, 2, 3)
) -> HistoryChange:
    kind = PURCHASE if source == "purchases" else CLICK
    return HistoryChange(source, offset, pack_entry(ts, kind, event_id, pack_sid(sid)))


def run(
    value: bytes | None, changes: list[HistoryChange], limits: HistorySettings | None = None
) -> bytes | None:
    return apply_changes(
        value, changes, codebook=BOOK, levels=3, incarnations=LIVES, bounds=limits or bounds()
    )[0]  # fmt: skip


def test_a_history_decodes_to_what_was_applied() -> None:
    value = run(None, [change("purchases", 4, T0 + 5, "b", (7, 8, 9)), change("clicks", 2, T0, "a")])
    decoded = decode_history(value)
    assert decoded.codebook_tag == BOOK[:8]
    assert [(e.ts, e.kind, e.sid) for e in decoded.entries] == [
        (T0, CLICK, (1, 2, 3)), (T0 + 5, PURCHASE, (7, 8, 9)),
    ]  # fmt: skip
    assert decoded.fences == {"clicks": (7, 3), "purchases": (9, 5)}
    assert value is not None
    assert len(value) == 26 + 2 * 16


entries = st.lists(
    st.tuples(st.sampled_from(["clicks", "purchases"]), st.integers(0, 30), st.integers(0, 5)),
    max_size=30,
)


def _changes(raw: list[tuple[str, int, int]]) -> list[HistoryChange]:
    # Offsets per topic in log order, as Kafka gives them.
    counts = {"clicks": 0, "purchases": 0}
    packed_changes = []
    for source, day, code in raw:
        packed_changes.append(
            change(source, counts[source], T0 + day * 86_400_000, f"{source}{counts[source]}", (1, 2, code))
        )
        counts[source] += 1
    return packed_changes


@given(entries, st.randoms(use_true_random=False), st.integers(1, 12), st.integers(1, 20))
def test_any_order_of_parked_events_gives_the_same_entries(raw, random, length, days) -> None:
    limits = bounds(length, days)
    changes = [c._replace(source=None) for c in _changes(raw)]
    shuffled = list(changes)
    random.shuffle(shuffled)
    one_by_one = None
    for c in shuffled:
        one_by_one = run(one_by_one, [c], limits)
    assert one_by_one == run(None, changes, limits)


@given(entries, st.data(), st.integers(1, 12))
def test_redelivery_of_any_part_of_the_log_changes_nothing(raw, data, length) -> None:
    changes = _changes(raw)
    limits = bounds(length, 20)
    once = run(None, changes, limits)
    start = data.draw(st.integers(0, len(changes)))
    assert run(once, changes[start:], limits) == once


def test_the_fence_skips_what_it_has_seen_and_counts_it() -> None:
    log = [change("clicks", n, T0 + n, f"e{n}") for n in range(5)]
    value = run(None, log[:3])
    _, applied, skipped = apply_changes(
        value, log, codebook=BOOK, levels=3, incarnations=LIVES, bounds=bounds()
    )  # fmt: skip
    assert (applied, skipped) == (2, 3)


def test_a_topic_made_anew_starts_its_offsets_again() -> None:
    value = run(None, [change("clicks", 100, T0, "old")])
    after_recreation, applied, _ = apply_changes(
        value, [change("clicks", 0, T0 + 1, "new")], codebook=BOOK, levels=3,
        incarnations={**LIVES, "clicks": 8}, bounds=bounds(),
    )  # fmt: skip
    assert applied == 1
    assert decode_history(after_recreation).fences["clicks"] == (8, 1)
    assert len(decode_history(after_recreation).entries) == 2


def test_a_history_under_another_codebook_takes_no_change_before_it_is_brought_over() -> None:
    value = run(None, [change("clicks", 3, T0, "a")])
    with pytest.raises(OtherCodebookError, match=BOOK[:8]):
        apply_changes(
            value, [change("purchases", 0, T0, "b")], codebook="f" * 16, levels=3, incarnations=LIVES,
            bounds=bounds(),
        )  # fmt: skip


def test_entries_that_wait_are_carried_along_and_come_back_as_they_were() -> None:
    value = run(None, [change("clicks", 2, T0, "a")])
    assert value is not None
    waiting = [
        ("ffffffff", pack_entry(T0 - 1, CLICK, "b", pack_sid((4, 5)))),
        ("eeeeeeee", pack_entry(T0, 3, "c", pack_sid((6,)))),
    ]
    with_waiting = join_parts(split_parts(value)._replace(waiting=waiting))
    assert split_parts(with_waiting).waiting == waiting
    later = run(with_waiting, [change("clicks", 3, T0 + 1, "d")])
    assert split_parts(later or b"").waiting == waiting
    decoded = decode_history(later)
    assert [(tag, e.ts, e.sid) for tag, e in decoded.waiting] == [
        ("ffffffff", T0 - 1, (4, 5)), ("eeeeeeee", T0, (6,)),
    ]  # fmt: skip
    assert [e.ts for e in decoded.entries] == [T0, T0 + 1]
    assert decoded.fences["clicks"] == (7, 4)


def test_no_history_is_an_empty_one() -> None:
    assert decode_history(None).entries == []


def test_another_layout_is_refused_with_the_remedy() -> None:
    with pytest.raises(SidstreamError, match=r"layout 9.*replay"):
        decode_history(b"\x09" + bytes(30))


def test_a_codebook_id_that_is_not_hex_is_refused() -> None:
    with pytest.raises(SidstreamError, match="hex"):
        history.header_of("not-hex-at-all", 3)
