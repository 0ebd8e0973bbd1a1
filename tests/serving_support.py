"""A serving agent inside a test: in a thread of its own, on bundles from a dictionary."""

from __future__ import annotations

import asyncio
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from harness.servers import wait_until
from serving.agent import ServingAgent
from serving.settings import ServingSettings
from streams.errors import SidstreamError
from streams.settings import KafkaSettings, RedisSettings

# Below the timeout of a test, above what a busy machine needs for a first answer.
PATIENCE_S = 60


class BundlesByVersion:
    """Bundles by version, as the registry would fetch them."""

    def __init__(self, **bundles):
        self.bundles = bundles

    def fetch(self, version):
        if version not in self.bundles:
            raise SidstreamError(f"version {version} is away")
        return self.bundles[version]


class RunningAgent:
    """An agent in a thread of its own, with its own event loop."""

    def __init__(self, kafka: KafkaSettings, redis_url: str, source, **settings) -> None:
        self.failure: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        serving_options: dict = {"metrics_port": 0, "index_delay_s": 0.05, "retry_max_s": 1, **settings}
        self._created = threading.Event()
        redis_settings = RedisSettings.model_validate({"url": redis_url})

        async def main() -> None:
            self.agent = ServingAgent(
                kafka, redis_settings, ServingSettings(**serving_options), source, "sidstream"
            )  # fmt: skip
            self._created.set()
            await self.agent.run(self._stop)

        def run() -> None:
            try:
                self._loop.run_until_complete(main())
            except BaseException as error:
                self.failure = error

        self.thread = threading.Thread(target=run, name="agent")
        self.thread.start()
        assert self._created.wait(PATIENCE_S)

    def wait_ready(self) -> None:
        wait_until(lambda: self.agent.waiting_for is None or self.failure, PATIENCE_S, "the agent")
        assert self.failure is None

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.agent.health_port}{path}", timeout=10) as answer:
            return answer.read().decode()

    def metric(self, sample: str) -> float:
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(sample + " ")]
        return float(lines[0].rpartition(" ")[2]) if lines else 0.0

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        assert self.failure is None


@contextmanager
def running(kafka, redis_url, source, **settings) -> Iterator[RunningAgent]:
    agent = RunningAgent(kafka, redis_url, source, **settings)
    try:
        yield agent
    finally:
        agent.stop()
