"""A shop's whole year through Kafka and the agents: what is in Redis is what the file alone gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis

from harness.agents_worker import worker, write_codebook
from harness.pure_histories import pure_histories
from harness.servers import PARTITIONS, wait_until
from streams.replay import OnlineRetail
from streams.replay.engine import replay
from streams.state import history, keys
from streams.wire.admin import end_offsets, incarnations
from tests.conftest import FreshStack

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def test_the_years_histories_equal_a_pure_replay_of_the_file_byte_for_byte(
    fresh_stack: FreshStack, tmp_path: Path
) -> None:
    kafka, url = fresh_stack()
    shop = OnlineRetail()
    codebook = write_codebook(tmp_path / "codebook", sizes=(32, 32, 256))
    with redis.Redis.from_url(url) as store:
        items = replay(kafka, shop, events=False).topics["catalog"]
        with worker(kafka, url, tmp_path / "codebook", tmp_path / "log", codebook_check_s=0.5):
            wait_until(lambda: store.hlen(keys.sids(codebook.id)) == items, 300, "a SID for every item")
            # As on a first start: events after SIDs. (An event that overtakes its item's SID is parked, and
            # applied without moving the fence: the same entries under other offsets.)
            assert replay(kafka, shop, catalog=False).record_count == 396_337
            sids = {item.decode(): packed for item, packed in store.hgetall(keys.sids(codebook.id)).items()}
            lives = {source: incarnations(kafka)[source] for source in history.SOURCE_TOPICS}
            expected = pure_histories(shop, sids, codebook.id, len(codebook.sizes), lives, PARTITIONS)
            assert len(expected) == 4_334

            def stored() -> dict[str, bytes]:
                names = sorted(expected)
                values = store.mget([keys.history(user) for user in names])
                return {user: value for user, value in zip(names, values, strict=True) if value is not None}

            wait_until(lambda: stored() == expected, 240, "every history as the file gives it")
        assert store.dbsize() >= 4_334
        assert sum(1 for _ in store.scan_iter(match="h:*", count=1000)) == 4_334
    assert sum(end_offsets(kafka, "dead-letters").values()) == 0
