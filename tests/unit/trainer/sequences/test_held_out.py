"""A log in two parts: whom a model learns from, and what the validation users did."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from registry.bundles.prompt import Prompt
from registry.hold_out import HoldOut
from tests.tiny_shop import sid_of
from trainer.sequences.held_out import TrainingSplit, split_log, without_validation_users
from trainer.sequences.interactions import Interactions, training_catalogue, user_sequences
from trainer.settings import TrainerSettings

HALF = HoldOut(share=0.5)
CATALOGUE = training_catalogue({f"i{n}": sid_of(n) for n in range(8)}, {}, Prompt((4, 3, 5), 8))
# (user, item, time, whether it is of the new window)
Events = list[tuple[int, int, int, bool]]
events = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 7), st.integers(0, 9), st.booleans()), max_size=80
)


def logged(rows: Events) -> Interactions:
    users, items, ts, fresh = zip(*rows, strict=True) if rows else ((), (), (), ())
    return user_sequences(
        [f"u{user}" for user in users], ts, [f"i{item}" for item in items], CATALOGUE, fresh
    )


def split(log: Interactions, **settings: Any) -> TrainingSplit:
    chosen = {"max_items": 4, "min_history": 1} | settings
    return split_log(log, HALF, TrainerSettings.model_validate(chosen))


def sequences(log: Interactions) -> dict[str, list[int]]:
    return {
        user: log.items[log.starts[at] : log.starts[at + 1]].tolist() for at, user in enumerate(log.users)
    }


@given(events)
def test_what_is_learned_from_is_all_that_the_other_users_did_and_nothing_of_validation_users(
    rows: Events,
) -> None:
    log = logged(rows)
    training = split(log).log
    learned = {user: items for user, items in sequences(log).items() if not HALF.has(user)}
    assert sequences(training) == learned
    assert len(training) == sum(map(len, learned.values()))


@given(events, events)
def test_a_user_stays_where_it_is_when_the_log_grows_and_others_come(rows: Events, more: Events) -> None:
    before, after = split(logged(rows)), split(logged(rows + more))
    users = {f"u{user}" for user, *_ in rows}
    assert users & {*after.log.users} == {*before.log.users}


@given(events)
def test_a_target_is_the_newest_event_of_the_new_window_that_is_no_repeat(rows: Events) -> None:
    log = logged(rows)
    expected = []
    for at, user in enumerate(log.users):
        low, high = int(log.starts[at]), int(log.starts[at + 1])
        usable = [row for row in range(low + 1, high) if log.items[row] != log.items[row - 1]]
        if HALF.has(user) and usable:
            row = max(usable, key=lambda row: (log.fresh[row], row))
            expected.append((int(log.items[row]), bool(log.fresh[row]), log.items[low:row][-4:].tolist()))
    held_out = split(log).held_out
    assert held_out.target_fresh is not None
    actual = zip(
        held_out.targets.tolist(), held_out.target_fresh.tolist(),
        [history.tolist() for history in held_out.histories], strict=True,
    )  # fmt: skip
    assert sorted(actual) == sorted(expected)


@given(events, st.integers(0, 8))
def test_where_not_all_are_scored_half_are_new_and_half_old(rows: Events, most: int) -> None:
    everybody, scored = split(logged(rows)).held_out, split(logged(rows), validation_users=most).held_out
    assert everybody.target_fresh is not None
    assert scored.target_fresh is not None
    new, old = int(everybody.target_fresh.sum()), int((~everybody.target_fresh).sum())
    scored_new, scored_old = int(scored.target_fresh.sum()), int((~scored.target_fresh).sum())
    assert scored_new + scored_old == min(most, new + old)
    assert scored_new >= min(new, most // 2)
    assert scored_old >= min(old, most // 2)


def test_the_same_users_are_scored_when_their_log_has_grown() -> None:
    rows = [(user, at % 8, at, True) for user in range(31) for at in range(3)]
    more = [(user, 3 + user % 5, 5, True) for user in range(31)]
    before, after = (split(logged(log), validation_users=5).held_out.histories for log in (rows, rows + more))
    # The histories of the same five users, one event longer.
    assert [len(history) for history in after] == [len(history) + 1 for history in before]
    np.testing.assert_array_equal(np.stack(after)[:, :2], np.stack(before))


@given(st.lists(st.tuples(st.text(), st.integers())))
def test_records_are_dealt_as_their_users_are_in_the_order_given(records: list[tuple[str, int]]) -> None:
    learned, judging = without_validation_users(records, lambda record: record[0], HALF)
    assert learned == [record for record in records if not HALF.has(record[0])]
    assert judging == [record for record in records if HALF.has(record[0])]
