"""A history under another codebook is brought over without loss; doing it twice is doing it once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.errors import SidstreamError
from streams.settings import HistorySettings
from streams.state.history import (
    CLICK,
    PURCHASE,
    HistoryChange,
    apply_changes,
    decode_history,
    event_hash,
    pack_entry,
    pack_sid,
    split_parts,
    unpack_entry,
)
from streams.state.translation import entries_under, needs_recoding, recode_history

OLD, NEW, NEWER = "00000000aaaaaaaa", "11111111bbbbbbbb", "22222222cccccccc"
LEVELS = {OLD: 2, NEW: 3, NEWER: 1}
LIVES = {"clicks": 7, "purchases": 9}
T0 = 1_600_000_000_000
ITEMS = range(8)

# What an item's SID is under each codebook: other codes, another length, another order.
SIDS = {
    OLD: {item: (item // 2, item % 2) for item in ITEMS},
    NEW: {item: (9, 7 - item, item) for item in ITEMS},
    NEWER: {item: ((item * 5) % 8,) for item in ITEMS},
}


def bounds(length=50, days=400):
    return HistorySettings(max_length=length, max_age_days=days)


def translator(codebook, known_items=ITEMS):
    """Into `codebook`, under which only `known` items have a SID."""
    item_by_sid = {
        (book[:8], pack_sid(sid)): item for book, sids in SIDS.items() for item, sid in sids.items()
    }  # fmt: skip

    def translate(tag, packed):
        item = item_by_sid.get((tag, packed))
        return pack_sid(SIDS[codebook][item]) if item in known_items else None

    return translate


def packed(minute, kind, item, codebook):
    return pack_entry(
        T0 + minute * 60_000, kind, f"e{minute}-{kind}-{item}", pack_sid(SIDS[codebook][item])
    )  # fmt: skip


def history_under(events, codebook, limits=None, value=None):
    """The history of (minute, kind, item) events; offsets in the order in which they come."""
    changes = [
        HistoryChange("purchases" if kind == PURCHASE else "clicks", at, packed(minute, kind, item, codebook))
        for at, (minute, kind, item) in enumerate(events)
    ]
    return apply_changes(
        value, changes, codebook=codebook, levels=LEVELS[codebook], incarnations=LIVES,
        bounds=limits or bounds(),
    )[0]  # fmt: skip


def recoded(value, codebook, known_items=ITEMS, limits=None):
    return recode_history(
        value, translator(codebook, known_items), codebook=codebook, levels=LEVELS[codebook],
        bounds=limits or bounds(),
    )  # fmt: skip


def without_sids(history):
    return [(e.ts, e.kind, e.event_hash) for e in history]


events = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from([CLICK, PURCHASE]), st.sampled_from(ITEMS)),
    min_size=1, max_size=30,
)  # fmt: skip
some_items = st.sets(st.sampled_from(ITEMS))


@given(events, st.integers(1, 30))
def test_a_history_brought_over_is_the_one_that_the_new_codebook_would_have_made(log, length) -> None:
    limits = bounds(length)
    assert recoded(history_under(log, OLD, limits), NEW, limits=limits) == history_under(log, NEW, limits)


@given(events, some_items)
def test_bringing_over_twice_is_bringing_over_once(log, known_items) -> None:
    recoded_once = recoded(history_under(log, OLD), NEW, known_items)
    assert recoded(recoded_once, NEW, known_items) == recoded_once


@given(events, some_items)
def test_order_kinds_times_and_events_are_kept_and_only_what_has_no_sid_waits(log, known_items) -> None:
    before = decode_history(history_under(log, OLD))
    after = decode_history(recoded(history_under(log, OLD), NEW, known_items))
    assert sorted(without_sids([*after.entries, *(entry for _, entry in after.waiting)])) == without_sids(
        before.entries
    )
    assert without_sids(after.entries) == sorted(without_sids(after.entries))
    assert {entry.sid for entry in after.entries} <= {SIDS[NEW][item] for item in known_items}
    assert {entry.sid for _, entry in after.waiting} <= {SIDS[OLD][item] for item in set(ITEMS) - known_items}
    assert {tag for tag, _ in after.waiting} <= {OLD[:8]}
    assert (after.codebook_tag, after.fences) == (NEW[:8], before.fences)


@given(events, some_items, events, some_items)
def test_what_waited_takes_its_place_when_its_sids_come_whatever_happened_meanwhile(
    log, known_items, later, by_then
) -> None:
    # An event whose item has no SID under the new codebook is not in the history, but parked.
    translated = [event for event in later if event[2] in known_items]
    value = recoded(history_under(log, OLD), NEW, known_items)
    if translated:
        value = history_under(
            [(minute + 50, *rest) for minute, *rest in translated], NEW, value=_fenceless(value)
        )
    value = recoded(recoded(value, NEW, known_items | by_then), NEW)
    assert decode_history(value).waiting == []
    everything = [*log, *((minute + 50, *rest) for minute, *rest in translated)]
    assert decode_history(value).entries == decode_history(history_under(everything, NEW)).entries


def _fenceless(value):
    """The same history with nothing seen of any topic, so that offsets may start again."""
    return value[:6] + bytes(20) + value[26:]


@given(events, some_items, some_items)
def test_there_and_back_gives_the_same_history(log, known_items, known_newer) -> None:
    value = history_under(log, OLD)
    assert recoded(recoded(value, NEW, known_items), OLD) == value
    assert recoded(recoded(recoded(value, NEW, known_items), NEWER, known_newer), OLD) == value


@given(events, some_items)
def test_a_reader_of_either_codebook_sees_the_same_events_without_a_change(log, known_items) -> None:
    value = recoded(history_under(log, OLD), NEW, known_items)
    assert entries_under(value, OLD, translator(OLD)) == decode_history(history_under(log, OLD)).entries
    translated = entries_under(value, NEW, translator(NEW, known_items))
    assert [entry.sid for entry in translated] == [
        SIDS[NEW][item]
        for item in map(_item_of, decode_history(history_under(log, OLD)).entries)
        if item in known_items
    ]


def _item_of(entry):
    (item,) = [item for item, sid in SIDS[OLD].items() if sid == entry.sid]
    return item


def test_what_waits_is_bounded_apart_so_that_it_pushes_nothing_out() -> None:
    log = [(minute, CLICK, minute % 8) for minute in range(40)]
    limits = bounds(5)
    both = recoded(history_under(log, OLD, bounds(40)), NEW, {0, 1}, limits)
    assert [e.ts for e in decode_history(both).entries] == [T0 + m * 60_000 for m in range(40) if m % 8 < 2][
        -5:
    ]
    assert [e.ts for _, e in decode_history(both).waiting] == [
        T0 + m * 60_000 for m in range(40) if m % 8 > 1
    ][-5:]


def test_the_same_event_told_under_two_codebooks_is_one() -> None:
    value = recoded(history_under([(1, CLICK, 3)], OLD), NEW, set())
    with_both = history_under([(1, CLICK, 3)], NEW, value=_fenceless(value))
    assert len(decode_history(with_both).entries) == len(decode_history(with_both).waiting) == 1
    assert len(entries_under(with_both, NEW, translator(NEW))) == 1
    assert (
        recoded(with_both, NEW)
        == with_both[:6].replace(b"\x02", b"\x01", 1) + with_both[6:26] + split_parts(with_both).entries[0]
    )


def test_the_sids_of_a_codebook_that_nobody_knows_any_more_are_kept() -> None:
    value = history_under([(1, CLICK, 3), (2, PURCHASE, 4)], OLD)
    without_translation = recode_history(
        value, lambda _tag, _sid: None, codebook=NEW, levels=3, bounds=bounds()
    )
    assert decode_history(without_translation).entries == []
    assert [entry for _, entry in decode_history(without_translation).waiting] == decode_history(
        value
    ).entries
    assert entries_under(without_translation, NEW, lambda _tag, _sid: None) == []


def test_only_histories_with_something_to_bring_over_are_foreign() -> None:
    old = history_under([(1, CLICK, 3)], OLD)
    assert not needs_recoding(old[:6], OLD)
    assert needs_recoding(old[:6], NEW)
    assert needs_recoding(recoded(old, NEW, set())[:6], NEW)
    assert not needs_recoding(recoded(old, NEW)[:6], NEW)
    assert not needs_recoding(b"", NEW)
    assert not needs_recoding(b"\x09" + old[1:6], NEW)


def test_no_history_has_no_entries_and_another_layout_is_refused() -> None:
    assert entries_under(None, NEW, translator(NEW)) == []
    with pytest.raises(SidstreamError, match=r"layout 9.*replay"):
        entries_under(b"\x09" + bytes(30), NEW, translator(NEW))


def test_an_entry_unpacks_to_what_it_was_packed_from() -> None:
    entry = unpack_entry(pack_entry(T0, PURCHASE, "e", pack_sid((1, 65535))))
    assert entry == (T0, PURCHASE, int.from_bytes(event_hash("e"), "big"), (1, 65535))
