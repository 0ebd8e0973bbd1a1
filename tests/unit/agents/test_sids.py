"""The agents' SIDs: every codebook stays known, and one is in use from when its SIDs have come."""

from __future__ import annotations

import itertools

import pytest
import redis.asyncio

from agents.assigned_sids import AssignedSids
from streams.events import SidAssignment
from streams.settings import KafkaSettings
from streams.state.history import pack_sid
from tests.clock import Clock

OLD, NEW = "00000000aaaaaaaa", "11111111bbbbbbbb"
T0 = 1_700_000_000_000


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def known(clock):
    made = AssignedSids(KafkaSettings(), redis.asyncio.Redis(), clock)
    stamps = itertools.count(T0)

    def tell(item, sid, codebook, ts=None):
        event = SidAssignment.new(
            item_id=item, sid=list(sid), codebook=codebook, ts=next(stamps) if ts is None else ts
        )
        made.see(event.key.decode(), event)

    made.tell = tell
    return made


def test_the_first_codebook_is_in_use_at_once_and_the_next_once_its_sids_have_come(known, clock) -> None:
    known.tell("a", (1, 1), OLD)
    assert (known.codebook, known.levels, known.get("a")) == (OLD, 2, pack_sid((1, 1)))
    clock.now += 5
    known.tell("a", (2, 2, 2), NEW)
    known.follow()
    assert (known.codebook, known.newest) == (OLD, NEW)
    clock.now += 0.9
    known.tell("b", (2, 2, 3), NEW)
    clock.now += 0.9
    known.follow()
    assert known.codebook == OLD
    clock.now += 0.2
    assert known.get("a") == pack_sid((1, 1)), "it changes only where it is asked to"
    known.follow()
    assert (known.codebook, known.levels, known.get("b")) == (NEW, 3, pack_sid((2, 2, 3)))
    assert known.whole_since_ms() is not None


def test_a_stream_of_new_items_holds_a_codebook_back_for_a_minute_at_most(known, clock) -> None:
    known.tell("a", (1, 1), OLD)
    known.tell("a", (2, 2), NEW)
    for n in range(61):
        known.follow()
        assert known.codebook == OLD
        clock.now += 1 if n < 60 else 0
        known.tell(f"i{n}", (3, n), NEW)
        if n == 59:
            break
    known.follow()
    assert known.codebook == NEW


def test_an_item_that_is_late_under_the_old_codebook_does_not_bring_it_back(known, clock) -> None:
    known.tell("a", (1, 1), OLD)
    known.tell("a", (2, 2), NEW)
    clock.now += 2
    known.follow()
    known.tell("late", (1, 2), OLD)
    clock.now += 2
    known.follow()
    assert known.codebook == NEW
    assert known.get("late") is None
    assert known.holder(OLD[:8], pack_sid((1, 2))) == "late"


def test_an_sid_is_translated_by_its_item_also_where_that_came_after_the_first_question(known, clock) -> None:
    known.tell("a", (1, 1), OLD)
    known.tell("b", (1, 2), OLD)
    known.tell("a", (2, 2, 2), NEW)
    clock.now += 2
    known.follow()
    old = OLD[:8]
    assert known.several
    assert known.translate(old, pack_sid((1, 1))) == pack_sid((2, 2, 2))
    assert known.translate(old, pack_sid((1, 2))) is None
    assert known.translate(old, pack_sid((1, 3))) is None
    assert known.translate("ffffffff", pack_sid((1, 1))) is None
    known.tell("b", (2, 2, 3), NEW)
    known.tell("c", (1, 3), OLD)
    known.tell("c", (2, 2, 4), NEW)
    assert known.translate(old, pack_sid((1, 2))) == pack_sid((2, 2, 3))
    assert known.translate(old, pack_sid((1, 3))) == pack_sid((2, 2, 4))


def test_an_sid_is_never_moved_and_a_deletion_takes_none_away(known) -> None:
    known.tell("a", (1, 1), OLD)
    known.tell("a", (1, 2), OLD)
    known.see(f"{OLD}/a", None)
    assert known.get("a") == pack_sid((1, 1))
    assert not known.several
