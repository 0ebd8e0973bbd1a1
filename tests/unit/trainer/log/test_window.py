"""Explorations of a window: each counts once, when its clicks can no longer come, with what came in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from registry.hold_out import HoldOut
from streams.events import Exploration
from tests.tiny_explorations import T0, exploration
from tests.tiny_log import Logged
from trainer.log.interaction_log import INTERACTIONS
from trainer.log.window import Window

HORIZON = 1000


def judged(window: Window) -> dict[str, bool]:
    actual = window.explorations(HORIZON, HoldOut(share=0.5))
    explorations = {event.request_id: clicked for event, clicked in actual}
    assert len(explorations) == len(actual)
    return explorations


@pytest.fixture
def logged(tmp_path: Path) -> Logged:
    return Logged(tmp_path)


def at(number: int, ts: int, **fields: Any) -> Exploration:
    return exploration(number, ts=T0 + ts, **fields)


def test_only_a_click_on_the_drawn_item_under_its_request_in_time_is_a_reward(logged: Logged) -> None:
    logged.explorations(*(at(number, 0) for number in range(7)))
    logged.clicks(
        ("r0", "u", "i00", 5),
        ("r1", "u", "i01", 5),  # another item of the answer
        ("r2", "u", "i00", HORIZON + 1),  # too late
        ("r3", "someone else", "i00", 5),
        (None, "u", "i00", 5),
        ("r5", "u", "i00", HORIZON),
        ("r5", "u", "i00", 7),
        ("unknown", "u", "i00", 5),
    )
    expected = dict.fromkeys([f"r{number}" for number in range(7)], False) | {"r0": True, "r5": True}
    assert judged(logged.window()) == expected


def test_an_exploration_waits_until_its_clicks_can_no_longer_come_and_counts_in_one_window(
    logged: Logged,
) -> None:
    assert judged(logged.window()) == {}
    logged.explorations(at(0, 0), at(1, 500), at(2, 501))
    assert judged(logged.window()) == {}  # nobody has clicked: time stands still
    logged.clicks((None, "v", "i05", HORIZON + 500))
    assert judged(logged.window()) == {"r0": False, "r1": False}
    assert judged(logged.window()) == {}
    logged.clicks(("r2", "u", "i00", 700), ("r0", "u", "i00", 800), (None, "v", "i05", HORIZON + 501))
    assert judged(logged.window()) == {"r2": True}
    # One that arrives when its time is over still counts once.
    logged.explorations(at(3, 100))
    assert judged(logged.window()) == {"r3": False}
    assert judged(logged.window()) == {}


def test_answers_to_validation_users_are_of_every_window(logged: Logged) -> None:
    judging = next(f"v{n}" for n in range(100) if HoldOut(share=0.5).has(f"v{n}"))
    logged.explorations(at(0, 0), at(1, 0, user_id=judging), at(2, 5 * HORIZON, user_id=judging))
    logged.clicks(("r1", judging, "i00", 5), (None, "v", "i05", 5 * HORIZON))
    assert judged(logged.window()) == {"r0": False, "r1": True}
    logged.clicks((None, "v", "i05", 7 * HORIZON))
    assert judged(logged.window()) == {"r1": True, "r2": False}


def test_an_answer_that_was_sent_twice_counts_once(logged: Logged) -> None:
    logged.explorations(at(0, 0), at(0, 30, event_id="again"), at(1, 0))
    logged.clicks(("r0", "u", "i00", 5), (None, "v", "i05", 5 * HORIZON))
    assert judged(logged.window()) == {"r0": True, "r1": False}


def test_a_log_from_before_clicks_had_request_ids_is_read_as_without(logged: Logged) -> None:
    old = pa.schema([column for column in INTERACTIONS if column.name not in ("request_id", "scene")])
    row = [[0], [0], ["c"], ["u"], ["i00"], [T0 + 5], ["click"]]
    arrays = [pa.array(column, kind.type) for column, kind in zip(row, old, strict=True)]
    logged.log.append("clicks", 1, {0: (0, 1)}, pa.table(arrays, schema=old), 0)
    logged.ends["clicks"] = 1
    logged.explorations(at(0, 0))
    logged.clicks((None, "v", "i05", 5 * HORIZON))
    window = logged.window()
    assert judged(window) == {"r0": False}
    assert window.count_new() == 2
