"""Watermarks: the slowest topic that is not idle holds event time back, and one wrong clock moves nothing."""

from __future__ import annotations

from agents.attribution.event_time import AHEAD_USERS, PartitionClock

WALL = 2_000_000_000_000
T0 = 1_600_000_000_000


def clock(floor: int | None = None) -> PartitionClock:
    return PartitionClock(("clicks", "purchases"), idle_s=5.0, now=0.0, floor=floor)


def test_nothing_is_known_before_every_topic_spoke_or_is_idle() -> None:
    partition_clock = clock()
    partition_clock.observe("clicks", "u", T0, 1.0, WALL)
    assert partition_clock.watermark(1.0) is None
    partition_clock.observe("purchases", "u", T0 - 500, 1.0, WALL)
    assert partition_clock.watermark(1.0) == T0 - 500


def test_a_topic_with_records_still_to_read_is_not_idle_however_silent() -> None:
    partition_clock = clock()
    partition_clock.observe_lag("purchases", 1000)
    partition_clock.observe("clicks", "u", T0, 1.0, WALL)
    assert partition_clock.watermark(100.0) is None


def test_answers_that_are_still_to_be_read_keep_the_windows_of_their_requests_open() -> None:
    partition_clock = PartitionClock(("clicks", "purchases"), idle_s=5.0, now=0.0, answer_topics=("answers",))
    partition_clock.observe_lag("answers", 1000)
    for topic in ("clicks", "purchases"):
        partition_clock.observe(topic, "u", T0 + 86_400_000, 1.0, WALL)
    assert partition_clock.watermark(2.0) is None
    partition_clock.observe("answers", "u", T0, 3.0, WALL)
    assert partition_clock.watermark(4.0) == T0
    partition_clock.observe_lag("answers", 0)
    assert partition_clock.watermark(5.0) == T0 + 86_400_000


def test_answers_that_are_still_to_be_read_hold_time_back_also_when_all_else_is_silent() -> None:
    partition_clock = PartitionClock(("clicks",), idle_s=5.0, now=0.0, answer_topics=("answers",))
    partition_clock.observe("clicks", "u", T0 + 86_400_000, 1.0, WALL)
    partition_clock.observe("answers", "u", T0, 1.0, WALL)
    partition_clock.observe_lag("clicks", 0)
    partition_clock.observe_lag("answers", 10)
    assert partition_clock.watermark(100.0) == T0
    partition_clock.observe("answers", "u", T0 + 90_000_000, 101.0, WALL)
    assert partition_clock.watermark(102.0) == T0 + 86_400_000


def test_an_answer_made_today_on_a_replayed_year_does_not_close_the_years_windows() -> None:
    partition_clock = PartitionClock(("clicks", "purchases"), idle_s=5.0, now=0.0, answer_topics=("answers",))
    for topic in ("clicks", "purchases"):
        partition_clock.observe(topic, "u", T0, 1.0, WALL)
        partition_clock.observe_lag(topic, 0)
    partition_clock.observe("answers", "u", WALL, 2.0, WALL)
    partition_clock.observe_lag("answers", 0)
    assert partition_clock.watermark(3.0) == T0
    assert partition_clock.watermark(11.0) == T0 + 10_000


def test_a_topic_that_is_read_to_its_end_and_silent_holds_nothing_back() -> None:
    partition_clock = clock()
    partition_clock.observe_lag("purchases", 0)
    partition_clock.observe("clicks", "u", T0, 4.0, WALL)
    assert partition_clock.watermark(4.9) is None
    assert partition_clock.watermark(5.0) == T0


def test_when_all_are_silent_event_time_goes_on_with_the_wall_clock() -> None:
    partition_clock = clock()
    partition_clock.observe("clicks", "u", T0, 10.0, WALL)
    partition_clock.observe("purchases", "u", T0 - 900, 11.0, WALL)
    partition_clock.observe_lag("clicks", 0)
    partition_clock.observe_lag("purchases", 0)
    assert partition_clock.watermark(11.5) == T0 - 900
    assert partition_clock.watermark(17.0) == T0 + 6000


def test_event_time_never_goes_back() -> None:
    partition_clock = clock(floor=T0)
    for topic in ("clicks", "purchases"):
        partition_clock.observe(topic, "u", T0 - 10_000, 1.0, WALL)
    assert partition_clock.watermark(1.0) == T0


def test_a_new_worker_resumes_where_the_last_one_was() -> None:
    partition_clock = clock(floor=T0)
    assert partition_clock.watermark(1.0) == T0
    partition_clock.observe_lag("clicks", 0)
    partition_clock.observe_lag("purchases", 0)
    assert partition_clock.watermark(8.0) == T0 + 8000
    assert partition_clock.watermark(9.0) == T0 + 9000


def test_one_device_with_a_wrong_clock_does_not_close_everybodys_windows() -> None:
    partition_clock = clock()
    partition_clock.observe("purchases", "a", WALL, 1.0, WALL)
    partition_clock.observe("clicks", "a", T0, 1.0, WALL)
    for n in range(100):
        partition_clock.observe("clicks", "broken", WALL + 3_600_000 + n, 1.0, WALL)
    assert partition_clock.watermark(1.0) == T0


def test_a_simulated_clock_ahead_of_the_wall_counts_once_several_users_reach_it() -> None:
    partition_clock = PartitionClock(("clicks",), idle_s=5.0, now=0.0)
    for n in range(AHEAD_USERS):
        partition_clock.observe("clicks", f"u{n}", WALL + 1000 * (n + 1), 1.0, WALL)
    assert partition_clock.watermark(1.0) == WALL + 1000
    for n in range(500):
        partition_clock.observe("clicks", f"v{n}", WALL + 10_000 + n, 1.0, WALL)
    assert partition_clock.watermark(1.0) == WALL + 10_000 + 499 - (AHEAD_USERS - 1)
