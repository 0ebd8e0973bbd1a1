"""REES46's real clicks, carts and purchases: none is lost, and the pairs are those of a plain computation."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import redis

from harness.agents_worker import worker, write_codebook
from harness.servers import wait_until
from streams.errors import SidstreamError
from streams.replay import DATA_VARIABLE, Rees46
from streams.replay.engine import replay
from streams.replay.rees46 import find_rees46_file
from streams.settings import KafkaSettings
from streams.state import history
from streams.wire.admin import end_offsets
from tests.conftest import FreshStack
from tests.integration.agents.test_agents import read
from tests.reference_pairs import reference

pytestmark = [pytest.mark.integration, pytest.mark.timeout(500)]

EVENTS = 17_434
WINDOW_S = 1800
MOST = 8
WAIT_S = 240.0


@pytest.fixture(scope="module")
def rees46() -> Rees46:
    named = os.environ.get(DATA_VARIABLE)
    folder = Path(named) if named else Path(__file__).parents[4] / "shared" / "data"
    try:
        return Rees46(find_rees46_file(folder))
    except SidstreamError as error:
        pytest.skip(str(error))


def test_every_event_is_accounted_for_and_every_pair_is_the_references(
    rees46: Rees46, fresh_stack: FreshStack, tmp_path: Path
) -> None:
    kafka, url = fresh_stack()
    write_codebook(tmp_path / "codebook", sizes=(32, 32, 256))
    replay(kafka, rees46)
    events = list(rees46.events())
    expected_counts = Counter(pair[1] for pair in reference(events, WINDOW_S * 1000, MOST))
    assert len(events) == EVENTS
    assert expected_counts["purchased_over_clicked"] > 50
    # The last pairs wait for a window and the lateness after the last event; idle topics let time go on with
    # the wall clock, so event time is pushed on instead: one event a partition, far after the log.
    with (
        redis.Redis.from_url(url) as store,
        worker(
            kafka, url, tmp_path / "codebook", tmp_path / "log", attribution_window_s=WINDOW_S,
            max_rejected=MOST, idle_s=3, codebook_check_s=0.5, park_seconds=120,
        ),
    ):  # fmt: skip

        def entries() -> int:
            names = list(store.scan_iter(match="h:*", count=1000))
            if not names:
                return 0
            return sum(len(history.decode_history(value).entries) for value in store.mget(names) if value)

        def accounted() -> int:
            return entries() + dropped + sum(end_offsets(kafka, "dead-letters").values())

        # A history keeps a user's 50 newest; what is beyond was applied and has aged out.
        per_user = Counter(event.user_id for event in events)
        dropped = sum(max(0, count - 50) for count in per_user.values())
        wait_until(lambda: accounted() == EVENTS, WAIT_S, "every event in a history or in dead letters")
        assert not list(store.scan_iter(match="parked*"))
        _push_event_time_on(kafka, events[-1].ts + 4 * WINDOW_S * 1000)
        total = sum(expected_counts.values())
        wait_until(lambda: sum(end_offsets(kafka, "preferences").values()) >= total, WAIT_S, "the pairs")
    pairs = read(kafka, "preferences")
    unique = {pair["event_id"]: pair for pair in pairs}
    assert Counter(pair["scheme"] for pair in unique.values()) == expected_counts
    decided = {
        (p["user_id"], p["scheme"], p["request_id"] or p["ts"], p["chosen_item"], tuple(p["rejected_items"]))
        for p in unique.values()
    }
    assert decided == reference(events, WINDOW_S * 1000, MOST)


def _push_event_time_on(kafka: KafkaSettings, ts: int) -> None:
    """One impression without a request in every partition."""
    from streams.events import Impression
    from streams.wire.bulk_writer import publish_all
    from streams.wire.records import partition_of

    users: dict[int, str] = {}
    number = 0
    while len(users) < kafka.partitions:
        user = f"later-{number}"
        users.setdefault(partition_of(user.encode(), kafka.partitions), user)
        number += 1
    publish_all(kafka, [Impression.new(user_id=user, item_ids=["x"], ts=ts) for user in users.values()])
