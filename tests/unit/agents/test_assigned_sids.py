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
def sids(clock):
    table = AssignedSids(KafkaSettings(), redis.asyncio.Redis(), clock)
    stamps = itertools.count(T0)

    def assign(item, sid, codebook, ts=None):
        event = SidAssignment.new(
            item_id=item, sid=list(sid), codebook=codebook, ts=next(stamps) if ts is None else ts
        )
        table.add_record(event.key.decode(), event)

    table.assign = assign
    return table


def test_the_first_codebook_is_in_use_at_once_and_the_next_once_its_sids_have_come(sids, clock) -> None:
    sids.assign("a", (1, 1), OLD)
    assert (sids.codebook, sids.levels, sids.get("a")) == (OLD, 2, pack_sid((1, 1)))
    clock.now += 5
    sids.assign("a", (2, 2, 2), NEW)
    sids.switch_to_newest()
    assert (sids.codebook, sids.newest) == (OLD, NEW)
    clock.now += 0.9
    sids.assign("b", (2, 2, 3), NEW)
    clock.now += 0.9
    sids.switch_to_newest()
    assert sids.codebook == OLD
    clock.now += 0.2
    assert sids.get("a") == pack_sid((1, 1)), "it changes only where it is asked to"
    sids.switch_to_newest()
    assert (sids.codebook, sids.levels, sids.get("b")) == (NEW, 3, pack_sid((2, 2, 3)))
    assert sids.complete_since_ms() is not None


def test_a_stream_of_new_items_holds_a_codebook_back_for_a_minute_at_most(sids, clock) -> None:
    sids.assign("a", (1, 1), OLD)
    sids.assign("a", (2, 2), NEW)
    for n in range(61):
        sids.switch_to_newest()
        assert sids.codebook == OLD
        clock.now += 1 if n < 60 else 0
        sids.assign(f"i{n}", (3, n), NEW)
        if n == 59:
            break
    sids.switch_to_newest()
    assert sids.codebook == NEW


def test_an_item_that_is_late_under_the_old_codebook_does_not_bring_it_back(sids, clock) -> None:
    sids.assign("a", (1, 1), OLD)
    sids.assign("a", (2, 2), NEW)
    clock.now += 2
    sids.switch_to_newest()
    sids.assign("late", (1, 2), OLD)
    clock.now += 2
    sids.switch_to_newest()
    assert sids.codebook == NEW
    assert sids.get("late") is None
    assert sids.item_with_sid(OLD[:8], pack_sid((1, 2))) == "late"


def test_an_sid_is_translated_by_its_item_also_where_that_came_after_the_first_question(sids, clock) -> None:
    sids.assign("a", (1, 1), OLD)
    sids.assign("b", (1, 2), OLD)
    sids.assign("a", (2, 2, 2), NEW)
    clock.now += 2
    sids.switch_to_newest()
    old = OLD[:8]
    assert sids.has_several_codebooks
    assert sids.translate(old, pack_sid((1, 1))) == pack_sid((2, 2, 2))
    assert sids.translate(old, pack_sid((1, 2))) is None
    assert sids.translate(old, pack_sid((1, 3))) is None
    assert sids.translate("ffffffff", pack_sid((1, 1))) is None
    sids.assign("b", (2, 2, 3), NEW)
    sids.assign("c", (1, 3), OLD)
    sids.assign("c", (2, 2, 4), NEW)
    assert sids.translate(old, pack_sid((1, 2))) == pack_sid((2, 2, 3))
    assert sids.translate(old, pack_sid((1, 3))) == pack_sid((2, 2, 4))


def test_an_sid_is_never_moved_and_a_deletion_takes_none_away(sids) -> None:
    sids.assign("a", (1, 1), OLD)
    sids.assign("a", (1, 2), OLD)
    sids.add_record(f"{OLD}/a", None)
    assert sids.get("a") == pack_sid((1, 1))
    assert not sids.has_several_codebooks
