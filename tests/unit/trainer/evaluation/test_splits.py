"""What may be learned from and what is predicted: nothing of the future gets into the past."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.errors import SidstreamError
from tests.tiny_sequences import sequences
from trainer.evaluation import splits
from trainer.evaluation.sequences import group_events_by_user


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
    split = splits.split_by_time(data, 10, 20)
    assert lists(split.train) == [[1], [5], []]
    assert (split.valid.users.tolist(), split.valid.targets.tolist()) == ([0], [2])
    # User 2 came after the cut: the first event has no history, the second one has.
    assert split.test.users.tolist() == [0, 0, 1, 2]
    assert split.test.targets.tolist() == [3, 4, 6, 8]
    assert lists(split.test.histories) == [[1, 2], [1, 2, 3], [5], [7]]


@given(logs(), st.integers(0, 31), st.integers(0, 31))
def test_every_event_is_in_one_part_and_is_predicted_from_what_came_before(data, one, other):
    t1, t2 = sorted((one, other))
    split = splits.split_by_time(data, t1, t2)
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
    result = list(splits.time_shards(data, start, count))
    assert len(result) <= count
    whole = splits.shard_between(data, start, None)
    assert sorted(item for shard in result for row in shard.new_items for item in row) == sorted(
        item for row in whole.new_items for item in row
    )
    assert sum(len(shard.queries) for shard in result) == len(whole.queries)
    for shard in result:
        known_histories = {tuple(row) for row in lists(shard.histories)}
        # What a shard's first prediction knows is what was there before the shard.
        assert all(
            any(tuple(history[: len(row)].tolist()) == row for row in known_histories)
            for history in shard.queries.histories
        )


def test_a_set_without_times_is_not_cut_in_time():
    with pytest.raises(SidstreamError, match="tiny has no times: give --split leave-one-out"):
        splits.split_by_time(sequences([1, 2, 3]))
    with pytest.raises(SidstreamError, match="t1 is 5 and t2 is 3"):
        splits.split_by_time(sequences([1, 2], ts=[[1, 2]]), 5, 3)


def test_events_are_grouped_in_time_order_and_an_item_after_itself_counts_once():
    users = ["a", "b", "a", "a", "a"]
    items = ["x", "y", "z", "z", "x"]
    result = group_events_by_user(users, items, np.array([5, 1, 3, 4, 5]))
    assert (result.users, result.item_names) == (["b", "a"], ["y", "z", "x"])
    assert lists(result.items) == [[0], [1, 2]]  # of equal times the first given is first, and x follows x
    assert lists(result.ts) == [[1], [3, 5]]
    assert result.bought is None
    assert result.bought_ts is None


def test_a_purchase_survives_the_merge_and_marks_the_clicks_of_the_day_before_it():
    day = 86_400_000
    events = [
        ("a", "x", 0, False), ("a", "y", 1, False), ("a", "x", 5, False), ("a", "x", 6, True),  # merged
        ("a", "y", 7, False), ("b", "y", 8, True), ("a", "x", 9, False),
        ("a", "z", 10, False), ("a", "w", 11, False), ("a", "z", 11 + day, True),  # a day and 1 ms later
        ("a", "v", 12 + day, False), ("a", "v", 13 + 3 * day, True),  # merged, whenever it was
    ]  # fmt: skip
    users, items, ts, purchase = zip(*events, strict=True)
    result = group_events_by_user(users, items, np.array(ts), purchase)
    assert lists(result.items) == [[0, 1, 0, 1, 0, 2, 3, 2, 4], [1]]
    # y is b's purchase, not a's; the click of x that comes after the purchase is none.
    assert lists(result.bought) == [[True, False, True, False, False, False, False, True, True], [True]]
    assert lists(result.bought_ts) == [[6, -1, 6, -1, -1, -1, -1, 11 + day, 13 + 3 * day], [8]]
    assert lists(result.ts) == lists(group_events_by_user(users, items, np.array(ts)).ts)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 8), st.booleans()), max_size=30)
)
def test_a_step_is_bought_exactly_where_one_of_its_events_is_or_the_same_is_bought_within_a_day(events):
    quarter = 86_400_000 // 4
    events = sorted(((f"u{u}", f"i{i}", t * quarter, paid) for u, i, t, paid in events), key=lambda e: e[2])
    users, items, ts, purchase = map(list, zip(*events, strict=True)) if events else ([], [], [], [])
    result = group_events_by_user(users, items, np.array(ts, np.int64), purchase)
    for user, rows, flags, when in zip(
        result.users, result.items, result.bought, result.bought_ts, strict=True
    ):
        mine = [event for event in events if event[0] == user]
        expected = []
        for at, (_, item, begin, _) in enumerate(mine):
            later = [t for _, i, t, paid in mine[at:] if paid and i == item and t - begin <= 4 * quarter]
            if at and mine[at - 1][1] == item:
                expected[-1] += later
            else:
                expected.append(later)
        assert len(rows) == len(expected)
        assert when.tolist() == [min(later, default=-1) for later in expected]
        assert flags.tolist() == [bool(later) for later in expected]


def test_queries_say_which_targets_were_bought_and_training_only_what_was_bought_before_the_cut():
    data = sequences(
        [1, 2, 3, 4], [5, 6, 5], ts=[[1, 10, 20, 30], [2, 20, 31]],
        bought_ts=[[1, 12, 25, -1], [31, -1, 31]],
    )  # fmt: skip
    split = splits.split_by_time(data, 15, 25)
    assert lists(split.train) == [[1, 2], [5]]
    assert lists(split.bought) == [[True, True], [False]]  # user 1 buys the 5 later on
    assert split.valid.targets.tolist() == [3, 6]
    assert split.valid.bought.tolist() == [True, False]
    assert split.test.targets.tolist() == [4, 5]
    assert split.test.bought.tolist() == [False, True]
    subset = split.test.take(np.array([1]))
    assert (subset.targets.tolist(), subset.bought.tolist(), lists(subset.histories)) == (
        [5],
        [True],
        [[5, 6]],
    )
    last = splits.leave_one_out(data)
    assert lists(last.bought) == [[True, True], [True]]
    assert (last.valid.bought.tolist(), last.test.bought.tolist()) == ([True, False], [False, True])
    plain = splits.split_by_time(sequences([1, 2], ts=[[1, 2]]), 2, 2)
    assert [plain.bought, plain.test.bought, plain.test.take(np.array([0])).bought] == [None] * 3
