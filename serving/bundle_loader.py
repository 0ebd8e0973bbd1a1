"""Loads the bundles of the newest rollout beside the old ones, and replaces the old ones between requests.

A rollout takes effect as a whole: every arm's bundle is fetched, verified and warmed up, then one assignment
replaces the rollout that answers. Until then, and where a bundle does not load, the old one answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from registry.bundles import context, ranking, rewards
from registry.bundles.bundle import Bundle
from registry.bundles.context import Context
from registry.bundles.ranking import Ranking
from registry.bundles.rewards import Rewards
from registry.decoding.beam import Generator
from registry.decoding.item_vectors import ItemVectors
from registry.decoding.onnx_generator import OnnxGenerator
from registry.releases.rollout import arm_of
from streams.backoff import Backoff
from streams.errors import SidstreamError
from streams.events import Event, Rollout

log = logging.getLogger(__name__)

# The first pause after a failure; each further one is twice as long, up to the setting.
_FIRST_RETRY_S = 0.5


class BundleSource(Protocol):
    """Where bundles come from: registry.bundles.store.Registry."""

    def fetch(self, version_or_alias: str) -> Bundle:
        """A verified bundle. Raises SidstreamError."""


@dataclass(frozen=True)
class LoadedBundle:
    """A bundle whose model is in memory and has answered once."""

    id: str
    codebook: str
    max_items: int
    popular: tuple[str, ...]
    generator: Generator
    items: ItemVectors | None = None  # None: the bundle has no dense head
    ranking: Ranking = field(default_factory=Ranking)
    context: Context = field(default_factory=Context)  # without fields: the model reads histories alone
    rewards: Rewards | None = None  # None: preferences change nothing


@dataclass(frozen=True)
class LoadedRollout:
    """A rollout and the loaded bundle of each of its arms, by bundle id: what answers requests."""

    rollout: Rollout
    bundles: Mapping[str, LoadedBundle]


def open_bundle(bundle: Bundle, threads: int) -> LoadedBundle:
    """Open a bundle's graphs and run each once. Raises SidstreamError where its answers make no sense."""
    manifest = bundle.manifest
    bundle_context = context.read(bundle.path)
    generator = OnnxGenerator(bundle.path, manifest.sizes, manifest.max_items, threads)
    if generator.takes_context != bool(bundle_context.fields):
        raise SidstreamError(
            f"bundle {bundle.id}: {context.CONTEXT} and encode.onnx differ on whether it has a context; "
            "export the bundle again"
        )
    bins = rewards.read(bundle.path)
    if (bins is not None) != any(name.startswith(rewards.FIELD_PREFIX) for name in bundle_context.fields):
        raise SidstreamError(
            f"bundle {bundle.id}: {context.CONTEXT} and {rewards.REWARDS} differ on whether it has rewards; "
            "export the bundle again"
        )
    warm_up(generator, manifest.max_items, bundle.id)
    return LoadedBundle(
        bundle.id, manifest.codebook, manifest.max_items, tuple(bundle.popular()), generator,
        generator.items, ranking.read(bundle.path), bundle_context, bins,
    )  # fmt: skip


def warm_up(generator: Generator, max_items: int, name: str) -> None:
    """Run a generator on an empty and a full prompt. Raises SidstreamError where it breaks its interface."""
    levels = len(generator.sizes)
    state = generator.encode([[], [(0,) * levels] * max_items])
    for level, size in enumerate(generator.sizes):
        log_probs = generator.step(state, np.zeros((2, level), dtype=np.int64))
        if log_probs.shape != (2, size) or log_probs.dtype != np.float32:
            raise SidstreamError(
                f"bundle {name}: level {level} answers {log_probs.shape} {log_probs.dtype}, not (2, {size}) "
                "float32; export the bundle again"
            )
        mass = np.exp(log_probs.astype(np.float64)).sum(axis=1)
        # A level's codes are a part of the vocabulary: together at most 1, but for rounding.
        if not (mass <= 1 + 1e-3).all():
            raise SidstreamError(
                f"bundle {name}: level {level} gives its codes a probability of {mass.max():.3g}; "
                "export the bundle again"
            )


class BundleLoader:
    """Keeps the newest rollout of one recommender loaded.

    Pass `on_rollout` to a TopicTable as its callback; `run()` loads. `indexed(codebook)` is true where the
    SIDs of a codebook are there; `on_loaded(loaded_rollout)` and `on_failure()` are called after each try.
    """

    def __init__(
        self,
        source: BundleSource,
        name: str,
        threads: int,
        retry_max_s: float,
        indexed: Callable[[str], bool],
        on_loaded: Callable[[LoadedRollout], None] = lambda _: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._source = source
        self._name = name
        self._threads = threads
        self._retry_max_s = retry_max_s
        self._indexed = indexed
        self._on_loaded = on_loaded
        self._on_failure = on_failure
        self._newest_rollout: Rollout | None = None
        self._loaded: dict[str, LoadedBundle] = {}  # in service, or waiting for the rest of their rollout
        self._wake = asyncio.Event()
        self._rollout_replaced = asyncio.Event()
        # Read before every batch and replaced as a whole: a request sees the old rollout or the new one.
        self.loaded_rollout: LoadedRollout | None = None

    def on_rollout(self, _key: str, event: Event | None) -> None:
        """Take a rollout that arrived; those of other recommenders change nothing."""
        if isinstance(event, Rollout) and event.name == self._name:
            self._newest_rollout = event
            self._wake.set()

    @property
    def ready(self) -> bool:
        """True where no rollout arrived yet, or one is loaded."""
        return self._newest_rollout is None or self.loaded_rollout is not None

    async def wait_ready(self) -> None:
        """Return once `ready` holds."""
        while not self.ready:
            self._rollout_replaced.clear()
            await self._rollout_replaced.wait()

    async def run(self) -> None:
        """Load the newest rollout's bundles until cancelled; retry with growing pauses."""
        backoff = Backoff(_FIRST_RETRY_S, self._retry_max_s)
        while True:
            await self._wake.wait()
            self._wake.clear()
            rollout = self._newest_rollout
            if rollout is None:
                continue
            try:
                loaded_rollout = await self._load(rollout)
            except Exception as error:  # fetching reaches over the network and into files: anything may come
                self._on_failure()
                log.warning(
                    "rollout %s of trial %s is not in service yet: %s", rollout.action, rollout.trial, error
                )
                retry = asyncio.get_running_loop().call_later(backoff.next_wait(), self._wake.set)
                # A newer rollout does not wait for the pause of an older one.
                await self._wake.wait()
                retry.cancel()
                if self._newest_rollout is not rollout:
                    backoff.reset()
                continue
            backoff.reset()
            self.loaded_rollout = loaded_rollout
            self._rollout_replaced.set()
            self._on_loaded(loaded_rollout)

    async def _load(self, rollout: Rollout) -> LoadedRollout:
        arm_of(rollout, "")  # raises where no arm has weight
        for arm in rollout.arms:
            loaded_bundle = self._loaded.get(arm.bundle)
            if loaded_bundle is None:
                bundle = await asyncio.to_thread(self._source.fetch, arm.version)
                if bundle.id != arm.bundle:
                    raise SidstreamError(
                        f"version {arm.version} is bundle {bundle.id}, the rollout names {arm.bundle}; "
                        "publish the rollout again"
                    )
                loaded_bundle = await asyncio.to_thread(open_bundle, bundle, self._threads)
                self._loaded[arm.bundle] = loaded_bundle
            if not self._indexed(loaded_bundle.codebook):
                raise SidstreamError(
                    f"no SID of codebook {loaded_bundle.codebook} is on topic sids; bundle {arm.bundle} "
                    f"of arm {arm.name} waits for them: publish them, or release without it (an anchor: "
                    "rollout.anchor = 0)"
                )
        # Bundles that no arm names any more are dropped, once nothing can go wrong.
        self._loaded = {arm.bundle: self._loaded[arm.bundle] for arm in rollout.arms}
        return LoadedRollout(rollout, dict(self._loaded))
