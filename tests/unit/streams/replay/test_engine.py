"""What a person may write for a time and a speed."""

from __future__ import annotations

import pytest

from streams.errors import SidstreamError
from streams.replay.engine import parse_speed, parse_time


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("2011-12-01", 1_322_697_600_000),
        ("2011-12-01T08:30", 1_322_728_200_000),
        ("2011-12-01T09:30+01:00", 1_322_728_200_000),
        ("2011-12-01T08:30:00Z", 1_322_728_200_000),
        ("20111201", 1_322_697_600_000),
        ("1322697600000", 1_322_697_600_000),
    ],
)
def test_times_are_iso_dates_in_utc_or_milliseconds(text: str, ms: int) -> None:
    assert parse_time(text) == ms


@pytest.mark.parametrize("text", ["yesterday", "", "01.12.2011", "13226976"])
def test_other_times_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(SidstreamError, match="2011-12-01"):
        parse_time(text)


def test_a_speed_is_a_factor_or_max() -> None:
    assert parse_speed("max") is None
    assert parse_speed("3600") == 3600.0
    assert parse_speed("0.5") == 0.5


@pytest.mark.parametrize("text", ["0", "-1", "fast", "inf", "nan"])
def test_other_speeds_are_refused(text: str) -> None:
    with pytest.raises(SidstreamError, match="speed"):
        parse_speed(text)
