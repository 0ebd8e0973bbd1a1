"""A rollout takes effect as a whole, or not at all."""

from __future__ import annotations

import asyncio

import pytest

from registry.bundles import context, rewards
from registry.bundles.context import Context
from serving.bundle_loader import BundleLoader, open_bundle
from streams.errors import SidstreamError
from streams.events import Arm, Rollout
from tests.tiny_bundle import write_tiny_bundle

SIZES = (3, 4)


class Store:
    """Versions by name; those in `away` cannot be fetched."""

    def __init__(self, **bundles):
        self.bundles = bundles
        self.away = set()
        self.fetched = []

    def fetch(self, version):
        self.fetched.append(version)
        if version in self.away:
            raise SidstreamError(f"version {version} is away")
        return self.bundles[version]


def rollout(*versions, store, name="sidstream", trial="t", weight=0.5):
    names = ("champion", "challenger-sft", "challenger-dpo")
    arms = [
        Arm(name=arm, bundle=store.bundles[version].id, weight=weight, version=version)
        for arm, version in zip(names, versions, strict=False)
    ]
    return Rollout.new(name=name, action="trial", trial=trial, arms=arms)


@pytest.fixture
def store(tmp_path):
    return Store(
        **{f"v{seed}": write_tiny_bundle(tmp_path / str(seed), SIZES, seed, ["a"]) for seed in (1, 2, 3)}
    )


class Watch:
    """The loader under test, with queues of what it loaded and failed to load."""

    def __init__(self, store, indexed=lambda _: True):
        self.loaded = asyncio.Queue()
        self.failed = asyncio.Queue()
        self.bundles = BundleLoader(
            store, "sidstream", 1, retry_max_s=0.01, indexed=indexed,
            on_loaded=self.loaded.put_nowait, on_failure=lambda: self.failed.put_nowait(None),
        )  # fmt: skip

    async def __aenter__(self):
        self.running = asyncio.create_task(self.bundles.run())
        return self

    async def __aexit__(self, *_):
        self.running.cancel()
        await asyncio.wait({self.running})

    def publish(self, event):
        self.bundles.on_rollout(event.name, event)


def run(story):
    return asyncio.run(asyncio.wait_for(story, 30))


def test_all_arms_of_the_newest_rollout_are_loaded_and_the_rest_let_go(store):
    async def story():
        async with Watch(store) as watch:
            assert watch.bundles.ready
            watch.publish(rollout("v1", store=store))
            assert not watch.bundles.ready
            await watch.loaded.get()
            watch.publish(rollout("v1", "v2", store=store))
            await watch.loaded.get()
            watch.publish(rollout("v2", store=store))
            return await watch.loaded.get()

    loaded_rollout = run(story())
    assert set(loaded_rollout.bundles) == {store.bundles["v2"].id}
    assert loaded_rollout.bundles[store.bundles["v2"].id].popular == ("a",)
    assert store.fetched == ["v1", "v2"]


def test_a_bundle_that_does_not_load_leaves_the_old_service_until_it_does(store):
    async def story():
        async with Watch(store) as watch:
            watch.publish(rollout("v1", store=store))
            first = await watch.loaded.get()
            store.away.add("v3")
            watch.publish(rollout("v2", "v3", store=store, trial="next"))
            await watch.failed.get()
            assert watch.bundles.loaded_rollout is first
            store.away.clear()
            loaded_rollout = await watch.loaded.get()
            assert watch.bundles.loaded_rollout is loaded_rollout
            return loaded_rollout.rollout.trial, store.fetched.count("v2")

    assert run(story()) == ("next", 1)


def test_a_newer_rollout_replaces_one_that_does_not_load(store):
    async def story():
        store.away.add("v3")
        async with Watch(store) as watch:
            watch.publish(rollout("v3", store=store, trial="broken"))
            await watch.failed.get()
            watch.publish(rollout("v1", store=store, trial="good"))
            return (await watch.loaded.get()).rollout.trial

    assert run(story()) == "good"


@pytest.mark.parametrize("fault", ["other bundle", "no weight", "no index"])
def test_a_rollout_that_cannot_be_served_is_not(store, fault):
    async def story():
        async with Watch(store, indexed=lambda _: fault != "no index") as watch:
            event = rollout("v1", store=store, weight=0.0 if fault == "no weight" else 1.0)
            if fault == "other bundle":
                store.bundles["v1"] = store.bundles["v2"]
            watch.publish(event)
            await watch.failed.get()
            return watch.bundles.loaded_rollout, watch.bundles.ready

    assert run(story()) == (None, False)


def test_the_rollout_of_another_recommender_changes_nothing(store):
    async def story():
        async with Watch(store) as watch:
            watch.publish(rollout("v1", store=store, name="somebody-else"))
            return watch.bundles.ready, watch.bundles.loaded_rollout

    assert run(story()) == (True, None)


def test_an_arm_without_users_is_loaded_as_well(store):
    async def story():
        async with Watch(store) as watch:
            event = rollout("v1", "v2", store=store, weight=1.0)
            shadow = Arm(name="challenger-sft", bundle=event.arms[1].bundle, weight=0, version="v2")
            arms = [event.arms[0], shadow]
            watch.publish(Rollout.new(name="sidstream", action="trial", trial="t", step=0.0, arms=arms))
            return set((await watch.loaded.get()).bundles)

    assert run(story()) == {store.bundles["v1"].id, store.bundles["v2"].id}


def test_a_bundle_whose_graph_knows_nothing_of_its_context_is_not_loaded(tmp_path):
    bundle = write_tiny_bundle(tmp_path, SIZES)
    assert open_bundle(bundle, 1).context == Context()
    context.write(Context(9, {"scene": ["home"]}), tmp_path)
    with pytest.raises(
        SidstreamError, match=r"context\.json and encode\.onnx differ.*export the bundle again"
    ):
        open_bundle(bundle, 1)


def test_a_bundle_whose_context_and_bins_disagree_about_rewards_is_not_loaded(tmp_path):
    bundle = write_tiny_bundle(tmp_path, SIZES)
    rewards.write(rewards.Rewards({}, {"click": {"0": 0.5, "1": 0.5}}), tmp_path)
    with pytest.raises(SidstreamError, match=r"context\.json and rewards\.json differ"):
        open_bundle(bundle, 1)
