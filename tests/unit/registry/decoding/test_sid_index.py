"""The SID index finds exactly the items that it was built from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.decoding.sid_index import SidIndex

tables = st.integers(1, 4).flatmap(
    lambda levels: st.lists(
        st.lists(st.sampled_from([0, 1, 2, 9, 65535]), min_size=levels, max_size=levels).map(tuple),
        min_size=1, max_size=40, unique=True,
    )
)  # fmt: skip


def build(sids, active=None):
    return SidIndex.build(np.array(sids), [f"i{row}" for row in range(len(sids))], active)


@settings(max_examples=100, deadline=None)
@given(tables)
def test_every_item_is_found_by_its_id_and_by_its_sid(sids):
    index = build(sids)
    for row, sid in enumerate(sids):
        leaf = index.leaf_of(f"i{row}")
        assert leaf == index.leaf_of_sid(sid)
        assert (index.item(leaf), tuple(index.sid(leaf))) == (f"i{row}", sid)
    assert [tuple(index.sid(leaf)) for leaf in range(len(index))] == sorted(sids)


@settings(max_examples=100, deadline=None)
@given(tables, st.data())
def test_sids_and_items_outside_the_table_are_not_found(sids, data):
    index = build(sids)
    other = data.draw(st.tuples(*(st.sampled_from([0, 1, 3, 9, 65535]) for _ in sids[0])))
    assert (index.leaf_of_sid(other) is None) == (other not in sids)
    assert index.leaf_of_sid(sids[0][:-1]) is None
    assert index.leaf_of("another") is None


@settings(max_examples=100, deadline=None)
@given(tables, st.data())
def test_allowed_counts_are_the_active_leaves_below_each_node(sids, data):
    active = np.array(data.draw(st.lists(st.booleans(), min_size=len(sids), max_size=len(sids))))
    index = build(sids, active)
    for level in range(len(sids[0])):
        prefixes = sorted({sid[: level + 1] for sid in sids})
        want = [
            sum(bool(on) and sid[: level + 1] == prefix for sid, on in zip(sids, active, strict=True))
            for prefix in prefixes
        ]
        assert index.allowed[level].tolist() == want


@settings(max_examples=50, deadline=None)
@given(tables, st.data())
def test_another_set_of_active_items_gives_what_a_new_build_gives(sids, data):
    active = np.array(data.draw(st.lists(st.booleans(), min_size=len(sids), max_size=len(sids))))
    changed, rebuilt = build(sids).with_active(active), build(sids, active)
    assert changed.active.tolist() == rebuilt.active.tolist()
    assert [counts.tolist() for counts in changed.allowed] == [counts.tolist() for counts in rebuilt.allowed]


def test_an_sid_that_two_items_share_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'i0' and 'i2' share the SID \[1, 2\]"):
        build([(1, 2), (1, 3), (1, 2)])


def test_an_empty_table_has_no_items():
    index = SidIndex.build(np.zeros((0, 3)), [])
    assert (len(index), index.leaf_of_sid((0, 0, 0)), index.leaf_of("x")) == (0, None, None)


def test_rows_beyond_the_snapshot_are_unknown_to_it():
    items, rows = ["a", "b"], {"a": 0, "b": 1}
    index = SidIndex.build(np.array([[4]]), items, rows=rows)
    assert (index.leaf_of("a"), index.leaf_of("b")) == (0, None)
