"""The Prometheus metrics of the serving agent. Times are in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from serving.bundle_loader import LoadedRollout
from streams.wire.dead_letters import DEAD_LETTER_COUNT

# From a tenth of a millisecond (a read of histories) to a broker that is away.
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_MASS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)


class ServingMetrics:
    """All metrics of one serving agent, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.seconds = Histogram(
            "sidstream_request_seconds",
            "Time of one batch of requests by stage; total: from the queue to the confirmed answer",
            ["stage"], buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.batch = Histogram(
            "sidstream_batch_requests", "Requests answered in one call of the model",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), registry=self.registry,
        )  # fmt: skip
        self.answers = Counter("sidstream_answers", "Requests answered", ["arm"], registry=self.registry)
        self.fallbacks = Counter(
            "sidstream_fallback", "Answers made by a fallback", ["reason"], registry=self.registry
        )
        self.degraded = Counter(
            "sidstream_degraded",
            "Requests that a failing part made poorer",
            ["cause"],
            registry=self.registry,
        )
        self.registry.register(DEAD_LETTER_COUNT)
        self.invalid_mass = Histogram(
            "sidstream_invalid_mass", "Probability that the model spends on codes without an allowed item",
            ["level"], buckets=_MASS, registry=self.registry,
        )  # fmt: skip
        self.model_info = Gauge(
            "sidstream_model_info", "The bundles in service",
            ["arm", "bundle", "trial", "version"], registry=self.registry,
        )  # fmt: skip
        self.bundle_failures = Counter(
            "sidstream_bundle_failures", "Tries to load a rollout that failed", registry=self.registry
        )
        self.index_items = Gauge(
            "sidstream_index_items", "Items with an SID in the index", ["codebook"], registry=self.registry
        )
        self.index_seconds = Histogram(
            "sidstream_index_build_seconds",
            "Time to build an index",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.ready = Gauge("sidstream_ready", "1 when the agent answers", registry=self.registry)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Observe how long the block takes."""
        begun = perf_counter()
        try:
            yield
        finally:
            self.seconds.labels(stage).observe(perf_counter() - begun)

    def set_model_info(self, loaded_rollout: LoadedRollout) -> None:
        """Show the bundles of this rollout, and no others, in `sidstream_model_info`."""
        self.model_info.clear()
        for arm in loaded_rollout.rollout.arms:
            self.model_info.labels(arm.name, arm.bundle, loaded_rollout.rollout.trial, arm.version).set(1)

    def observe_index_build(self, codebook: str, seconds: float, items: int) -> None:
        """Count an index of `items` items that took `seconds` to build."""
        self.index_items.labels(codebook).set(items)
        self.index_seconds.observe(seconds)
