"""What may be learned from and what is predicted: nothing of the future gets into the past."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.errors import SidstreamError
from tests.tiny_sequences import sequences
from trainer.evaluation import splits
from trainer.evaluation.sequences import group_events


@st.composite
def logs(draw):
    """Data sets of up to six users, with rising times; some users have no event."""
    rows, ts = [], []
    for _ in range(draw(st.integers(1, 6))):
        times = sorted(draw(st.lists(st.integers(0, 30), max_size=8)))
        ts.append(times)
        rows.append([draw(st.integers(0, 5)) for _ in times])
    if not any(rows):
        rows[0], ts[0] = [0], [0]
    return sequences(*rows, ts=ts, items=6)


def lists(arrays):
    return [row.tolist() for row in arrays]


def test_leave_one_out_by_hand():
    split = splits.leave_one_out(sequences([1, 2, 3, 4], [5, 6], [0, 1, 2]))
    assert lists(split.train) == [[1, 2], [5, 6], [0]]
    assert (lists(split.valid.histories), split.valid.targets.tolist()) == ([[1, 2], [0]], [3, 1])
    # The validation item is history at test.
    assert (lists(split.test.histories), split.test.targets.tolist()) == ([[1, 2, 3], [0, 1]], [4, 2])
    assert split.test.users.tolist() == [0, 2]
    assert split.train_counts().tolist() == [1, 1, 1, 0, 0, 1, 1]


def test_a_cut_in_time_by_hand():
    data = sequences([1, 2, 3, 4], [5, 6], [7, 8], ts=[[1, 10, 20, 30], [2, 20], [25, 30]])
    split = splits.by_time(data, 10, 20)
    assert lists(split.train) == [[1], [5], []]
    assert (split.valid.users.tolist(), split.valid.targets.tolist()) == ([0], [2])
    # User 2 came after the cut: the first event has no history, the second one has.
    assert split.test.users.tolist() == [0, 0, 1, 2]
    assert split.test.targets.tolist() == [3, 4, 6, 8]
    assert lists(split.test.histories) == [[1, 2], [1, 2, 3], [5], [7]]


@given(logs(), st.integers(0, 31), st.integers(0, 31))
def test_every_event_is_in_one_part_and_is_predicted_from_what_came_before(data, one, other):
    t1, t2 = sorted((one, other))
    split = splits.by_time(data, t1, t2)
    for user, (items, ts) in enumerate(zip(data.items, data.ts, strict=True)):
        assert split.train[user].tolist() == items[ts < t1].tolist()
        followers = np.arange(1, len(items))
        for queries, inside in ((split.valid, (ts >= t1) & (ts < t2)), (split.test, ts >= t2)):
            mine = np.flatnonzero(queries.users == user)
            expected = [at for at in followers if inside[at]]
            assert queries.targets[mine].tolist() == [items[at] for at in expected]
            assert [queries.histories[n].tolist() for n in mine] == [items[:at].tolist() for at in expected]


@given(logs(), st.integers(0, 31), st.integers(1, 5))
def test_shards_together_are_the_time_from_their_start(data, start, count):
    made = list(splits.shards(data, start, count))
    assert len(made) <= count
    whole = splits.stretch(data, start, None)
    assert sorted(item for shard in made for row in shard.fresh for item in row) == sorted(
        item for row in whole.fresh for item in row
    )
    assert sum(len(shard.queries) for shard in made) == len(whole.queries)
    for shard in made:
        known = {tuple(row) for row in lists(shard.histories)}
        # What a shard's first prediction knows is what was there before the shard.
        assert all(
            any(tuple(history[: len(row)].tolist()) == row for row in known)
            for history in shard.queries.histories
        )


def test_a_set_without_times_is_not_cut_in_time():
    with pytest.raises(SidstreamError, match="tiny has no times: give --split leave-one-out"):
        splits.by_time(sequences([1, 2, 3]))
    with pytest.raises(SidstreamError, match="t1 is 5 and t2 is 3"):
        splits.by_time(sequences([1, 2], ts=[[1, 2]]), 5, 3)


def test_events_are_grouped_in_time_order_and_an_item_after_itself_counts_once():
    users = ["a", "b", "a", "a", "a"]
    items = ["x", "y", "z", "z", "x"]
    names, rows, times, item_names = group_events(users, items, np.array([5, 1, 3, 4, 5]))
    assert (names, item_names) == (["b", "a"], ["y", "z", "x"])
    assert lists(rows) == [[0], [1, 2]]  # of equal times the first given is first, and x follows x
    assert lists(times) == [[1], [3, 5]]
