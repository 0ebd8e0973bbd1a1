"""The live catalogue ends at the same index whichever way its events came."""

from __future__ import annotations

import asyncio

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.decoding.sid_index import SidIndex
from serving.catalogue import ServingCatalogue
from streams.events import CatalogItem, SidAssignment
from streams.state.history import pack_sid

T0 = 1_700_000_000_000


def sid_event(item, sid, codebook="book", ts=T0):
    return SidAssignment.new(item_id=item, sid=list(sid), codebook=codebook, ts=ts)


def item_event(item, active=True):
    return CatalogItem.new(item_id=item, title=item, active=active)


def feed(catalogue, event):
    handler = catalogue.on_sid if isinstance(event, SidAssignment) else catalogue.on_item
    handler(event.item_id, event)


def same(left: SidIndex, right: SidIndex) -> bool:
    arrays = ("codes", "children", "leaves", "allowed")
    return (
        all(
            [a.tolist() for a in getattr(left, name)] == [a.tolist() for a in getattr(right, name)]
            for name in arrays
        )
        and left.active.tolist() == right.active.tolist()
        and [left.item(leaf) for leaf in range(len(left))] == [right.item(leaf) for leaf in range(len(right))]
    )


@st.composite
def streams(draw):
    sids = draw(
        st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=20, unique=True)
    )  # fmt: skip
    events = [sid_event(f"i{row}", sid) for row, sid in enumerate(sids)]
    flags = draw(st.lists(st.tuples(st.integers(0, len(sids) - 1), st.booleans()), max_size=30))
    # An item's own records keep their order, as they do in one partition of one topic.
    order = draw(st.permutations(range(len(events) + len(flags))))
    pending = iter([item_event(f"i{row}", on) for row, on in flags])
    mixed = [events[at] if at < len(events) else next(pending) for at in order]
    return sids, flags, mixed, draw(st.sets(st.integers(0, len(mixed))))


@settings(max_examples=60, deadline=None)
@given(streams())
def test_an_index_grown_event_by_event_equals_one_built_at_once(case):
    sids, flags, mixed, refreshes = case

    async def grow():
        catalogue = ServingCatalogue(delay_s=0)
        for at, event in enumerate(mixed):
            feed(catalogue, event)
            if at in refreshes:
                await catalogue.refresh()
        await catalogue.refresh()
        return catalogue.index("book")

    active = np.zeros(len(sids), dtype=bool)
    for row, on in flags:
        active[row] = on
    rebuilt = SidIndex.build(np.array(sids), [f"i{row}" for row in range(len(sids))], active)
    assert same(asyncio.run(grow()), rebuilt)


def test_a_change_is_in_the_index_without_anyone_asking_for_it():
    async def watch():
        built = asyncio.Event()
        catalogue = ServingCatalogue(delay_s=0, on_build=lambda *_: built.set())
        running = asyncio.create_task(catalogue.run())
        sizes = []
        for row in range(3):
            built.clear()
            feed(catalogue, item_event(f"i{row}"))
            feed(catalogue, sid_event(f"i{row}", (0, row)))
            await asyncio.wait_for(built.wait(), 10)
            sizes.append(int(catalogue.index().allowed[0].sum()))
        running.cancel()
        return sizes

    assert asyncio.run(watch()) == [1, 2, 3]


def test_an_item_without_a_catalogue_record_or_deleted_from_it_is_not_active():
    async def go():
        catalogue = ServingCatalogue(delay_s=0)
        feed(catalogue, sid_event("known", (1, 1)))
        feed(catalogue, sid_event("unlisted", (1, 2)))
        feed(catalogue, item_event("known"))
        await catalogue.refresh()
        before = catalogue.index().active.tolist()
        catalogue.on_item("known", None)
        await catalogue.refresh()
        return before, catalogue.index().active.tolist()

    assert asyncio.run(go()) == ([True, False], [False, False])


def test_an_sid_is_never_moved_shared_or_of_another_length():
    async def go():
        catalogue = ServingCatalogue(delay_s=0)
        for item, sid in (("a", (1, 1)), ("a", (1, 2)), ("b", (1, 1)), ("c", (1, 1, 1)), ("d", (0, 5))):
            feed(catalogue, sid_event(item, sid))
        await catalogue.refresh()
        index = catalogue.index("book")
        return [(index.item(leaf), index.sid(leaf)) for leaf in range(len(index))]

    assert asyncio.run(go()) == [("d", [0, 5]), ("a", [1, 1])]


def test_each_codebook_has_its_own_index_and_the_newest_stands_in_for_none():
    async def go():
        catalogue = ServingCatalogue(delay_s=0)
        # In the order of partitions, not of time; and an item that was late under the old one.
        feed(catalogue, sid_event("a", (2, 0, 3), "new", T0 + 5))
        feed(catalogue, sid_event("a", (1, 1), "old", T0))
        feed(catalogue, sid_event("b", (1, 2), "old", T0 + 9))
        await catalogue.refresh()
        return [catalogue.index(book).sid(0) for book in ("old", "new", None)], catalogue.index("other")

    assert asyncio.run(go()) == ([[1, 1], [2, 0, 3], [2, 0, 3]], None)


def test_an_sid_of_another_codebook_is_translated_by_its_item():
    catalogue = ServingCatalogue(delay_s=0)
    old, new = "00000000aaaaaaaa", "11111111bbbbbbbb"
    for row in range(3000):  # more than a table starts with
        feed(catalogue, sid_event(f"i{row}", (row // 60, row % 60), old))
    early = catalogue.translator(new)
    feed(catalogue, sid_event("i7", (7, 7, 7), new))
    translate = catalogue.translator(new)
    assert translate(old[:8], pack_sid((0, 7))) == pack_sid((7, 7, 7))
    assert translate(old[:8], pack_sid((0, 8))) is None, "the item has no SID there"
    assert translate(old[:8], pack_sid((60, 0))) is None, "nobody has that SID"
    assert translate("ffffffff", pack_sid((0, 7))) is None, "a codebook that is not on the topic"
    assert early(old[:8], pack_sid((0, 7))) is None
    assert catalogue.translator(old)(new[:8], pack_sid((7, 7, 7))) == pack_sid((0, 7))
    feed(catalogue, sid_event("i2999", (9, 9, 9), new))
    assert translate(old[:8], pack_sid((49, 59))) == pack_sid((9, 9, 9))
