"""kill -9 of an agents worker in mid-replay: the next one gives the histories of a pure replay, all bytes."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import pytest
import redis

from harness.agents_worker import start_worker, worker, write_codebook
from harness.pure_histories import replayed_histories
from harness.servers import free_port, wait_until
from streams.replay import OnlineRetail
from streams.replay.engine import parse_time, replay
from streams.state import history, keys
from streams.wire.admin import end_offsets
from tests.conftest import FreshStack

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]

WAIT_S = 180.0
# Workers killed at most. One is enough where the kill falls between a write to Redis and its commit, which is
# most of a batch's time.
KILLS = 5


def metric(port: int, outcome: str) -> int:
    """How many purchases this worker counted so."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            sample = re.search(
                rf'^sidstream_events_total{{outcome="{outcome}",topic="purchases"}} (\S+)',
                answer.read().decode(), re.M,
            )  # fmt: skip
    except OSError:
        return 0
    return int(float(sample.group(1))) if sample else 0


def test_histories_after_kills_equal_a_pure_replay(fresh_stack: FreshStack, tmp_path: Path) -> None:
    kafka, url = fresh_stack()
    codebook = write_codebook(tmp_path / "codebook", sizes=(32, 32, 256))
    shop = OnlineRetail()
    items = len(list(shop.catalogue()))
    replay(kafka, shop, events=False)
    log = tmp_path / "log"
    options = {"session_timeout_s": 6, "batch_size": 1000, "group": "killed"}
    with redis.Redis.from_url(url) as store:
        with worker(kafka, url, tmp_path / "codebook", log, codebook_check_s=0.5, **options):
            wait_until(lambda: store.hlen(keys.sids(codebook.id)) == items, WAIT_S, "SIDs")
        begin, end = parse_time("2011-10-01"), parse_time("2011-12-01")
        total = replay(kafka, shop, begin, end, catalog=False).record_count

        def in_histories() -> int:
            names = list(store.scan_iter(match="h:*", count=1000))
            return sum(len(history.decode_history(store.get(name)).entries) for name in names)

        repeated = kills = 0
        while not repeated and kills < KILLS:
            port = free_port()
            process = start_worker(kafka, url, tmp_path / "codebook", log, metrics_port=port, **options)
            try:
                # In mid-replay: this worker has done something, and much is left.
                wait_until(lambda: metric(port, "in_history") > 2000, WAIT_S, "progress")  # noqa: B023
                repeated += metric(port, "repeated")
                assert process.poll() is None, log.read_text()[-3000:]
            finally:
                process.kill()
                process.wait()
            kills += 1
        assert in_histories() > 0
        port = free_port()
        with worker(kafka, url, tmp_path / "codebook", log, metrics_port=port, **options):
            expected = replayed_histories(
                kafka,
                {item.decode(): sid for item, sid in store.hgetall(keys.sids(codebook.id)).items()},
                codebook.id,
                len(codebook.sizes),
            )
            assert sum(map(len, expected.values())) > 0
            wait_until(
                lambda: all(store.get(keys.history(user)) == value for user, value in expected.items()),
                WAIT_S, "histories equal to the pure replay",
            )  # fmt: skip
            repeated += metric(port, "repeated")
        assert repeated > 0, f"{kills} kills, and no record was seen twice: the test did not bite"
        assert {name.decode() for name in store.scan_iter(match="h:*")} == {keys.history(u) for u in expected}
        assert total > 80_000
        assert not sum(end_offsets(kafka, "dead-letters").values())
