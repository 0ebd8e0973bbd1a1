"""Claim: one agents worker turns a shop's year of purchases into histories at 8,000 events a second or more.

The whole Online Retail year lies in Apache Kafka before one worker starts with all its stages (histories,
preferences, outcomes). Counted is the time from the first event applied to the last. Prints one line of JSON:
events, users, seconds, events a second (also by the worker's own CPU time, which other work on the machine
does not change), bytes of Redis a user (`h:{user}` by MEMORY USAGE), dead letters, and whether every history
equals the pure function's, byte for byte.

    python -m benchmarks.ingest
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
import urllib.request
from pathlib import Path

import redis

from benchmarks.speed_page import publish
from harness.agents_worker import worker, write_codebook
from harness.pure_histories import pure_histories
from harness.servers import PARTITIONS, free_port, kafka_settings, local_kafka, local_redis, wait_until
from streams.replay import OnlineRetail
from streams.replay.engine import replay
from streams.state import history, keys
from streams.wire.admin import create_topics, end_offsets, incarnations

_APPLIED = re.compile(r'^sidstream_events_total{outcome="in_history",topic="purchases"} (\S+)', re.M)


_CPU = re.compile(r"^process_cpu_seconds_total (\S+)", re.M)


def read_metric(port: int, pattern: re.Pattern[str]) -> float:
    """One of the worker's metrics; 0 while it is not there."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            match = pattern.search(answer.read().decode())
    except OSError:
        return 0.0
    return float(match.group(1)) if match else 0.0


def applied_purchases(port: int) -> int:
    """Purchases in histories, as the worker counts them."""
    return int(read_metric(port, _APPLIED))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--publish", action="store_true", help="put the figures into docs/results/speed.md")
    options = parser.parse_args()
    shop = OnlineRetail()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "redis").mkdir()
        with local_kafka(home / "kafka") as cluster, local_redis(home / "redis") as url:
            kafka, port = kafka_settings(cluster.bootstrap), free_port()
            create_topics(kafka)
            codebook = write_codebook(home / "codebook", sizes=(32, 32, 256))
            with redis.Redis.from_url(url) as store:
                replay(kafka, shop, events=False)
                began = time.perf_counter()
                items = len(list(shop.catalogue()))
                with worker(kafka, url, home / "codebook", home / "log", codebook_check_s=0.5):
                    wait_until(lambda: store.hlen(keys.sids(codebook.id)) == items, 300, "SIDs")
                    catalogue_s = time.perf_counter() - began
                total = replay(kafka, shop, catalog=False).record_count
                with worker(kafka, url, home / "codebook", home / "log", metrics_port=port):
                    wait_until(lambda: applied_purchases(port) > 0, 300, "the first event")
                    first, start, cpu = applied_purchases(port), time.perf_counter(), read_metric(port, _CPU)
                    wait_until(lambda: applied_purchases(port) >= total, 600, "the last event")
                    seconds, cpu = time.perf_counter() - start, read_metric(port, _CPU) - cpu
                users = [name.decode() for name in store.scan_iter(match="h:{*}", count=1000)]
                redis_bytes = sum(store.memory_usage(name, samples=0) for name in users)
                sids = {
                    item.decode(): packed for item, packed in store.hgetall(keys.sids(codebook.id)).items()
                }
                topic_incarnations = {source: incarnations(kafka)[source] for source in history.SOURCE_TOPICS}
                expected = pure_histories(
                    shop, sids, codebook.id, len(codebook.sizes), topic_incarnations, PARTITIONS
                )
                equal = len(users) == len(expected) and all(
                    store.get(keys.history(user)) == value for user, value in expected.items()
                )
                result = {
                    "events": total, "users": len(users), "seconds": round(seconds, 2),
                    "events_per_s": round((total - first) / seconds),
                    "events_per_cpu_s": round((total - first) / cpu),
                    "redis_bytes_per_user": round(redis_bytes / len(users)),
                    "other_redis_keys": store.dbsize() - len(users),
                    "catalogue_items": items, "catalogue_s_with_start": round(catalogue_s, 1),
                    "dead_letters": sum(end_offsets(kafka, "dead-letters").values()),
                    "equal_to_pure_replay": equal,
                }  # fmt: skip
    print(json.dumps(result))
    if options.publish:
        publish("one worker applies a year of events", "UCI Online Retail", "benchmarks.ingest", result)


if __name__ == "__main__":
    main()
