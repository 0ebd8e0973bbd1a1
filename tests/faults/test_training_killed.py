"""A training that is killed in every stage, while the shop goes on, ends in an unbroken one's bundles."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.servers import wait_until
from registry.bundles.store import Registry
from registry.releases import release
from streams.events import CatalogItem, Click, Purchase, SidAssignment
from streams.wire.client import Client
from tests.conftest import FreshStack, MlflowServer
from tests.integration.trainer.test_cycle import T0, World
from tests.tiny_shop import ITEMS, sid_of

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]

# What is there, below a run's folder, from a stage's first step on; the last one before the export ends.
STAGES = {
    "SFT": "checkpoint/newest.json", "online rewards": "rewards/round-1/checkpoint/newest.json",
    "alignment": "dpo/checkpoint/newest.json", "export": "sft/model",
}  # fmt: skip
TRAINER: dict[str, Any] = {
    "width": 32, "heads": 2, "max_items": 8, "epochs": 6, "batch_positions": 32, "lr": 5e-3, "threads": 1,
    "max_seconds": None, "checkpoint_seconds": 0, "validation_users": 10, "min_validity": 0.0,
    "max_fall": 0.9, "beat_popularity": False,
    "rewards": {
        "min_count": 20, "online": {"rounds": 1, "requests": 100, "steps": 15, "max_fall": 1.0},
    },
    "dpo": {
        "min_pairs": 20, "batch": 4, "schemes": ["purchased_over_clicked"], "max_seconds": None,
        "max_drop": 50.0, "max_recall_fall": 1.0, "max_invalid_rise": 1.0,
    },
}  # fmt: skip


@pytest.fixture
def world(
    fresh_stack: FreshStack, mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> World:
    """A shop on the wire, with the settings of this file in the environment of every process."""
    kafka, redis_url = fresh_stack()
    shop = World(kafka, mlflow_server.address, tmp_path)
    sections = {
        "KAFKA": kafka.model_dump(mode="json"), "REDIS": {"url": redis_url},
        "REGISTRY": {
            "tracking_uri": mlflow_server.address, "name": tmp_path.name, "cache": str(tmp_path / "cache")
        },
        "TRAINER": TRAINER | {"home": str(shop.settings.home)},
    }  # fmt: skip
    for name, values in sections.items():
        monkeypatch.setenv(f"SIDSTREAM_{name}", json.dumps(values))
    shop.registry.publish_codebook(shop.codebook)
    for item in range(ITEMS):
        name, sid = f"i{item:02}", list(sid_of(item))
        shop.publish([
            CatalogItem.new(item_id=name, title=f"red item number {item % 4}", price=1.0 + item, ts=T0),
            SidAssignment.new(item_id=name, sid=sid, codebook=shop.codebook.id, ts=T0),
        ])  # fmt: skip
    return shop


def kill_in(world: World, stage: str, number: int) -> None:
    """Start a training, go on clicking, and kill the process when the stage has begun."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sidstream", "train", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    runs = world.settings.home / "runs"

    def begun() -> bool:
        assert process.poll() is None, process.communicate()[1].decode()
        return any(runs.glob(f"*/{STAGES[stage]}"))

    try:
        wait_until(begun, 120, stage)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    world.walk(range(5), 2, Click, 9000 + 10 * number)


def unbroken(world: World, folder: Path) -> dict[str, str]:
    """The bundles of the killed run's window, trained in one go in a home and a registry of their own."""
    from sidstream.commands.train import one_cycle
    from sidstream.settings import load

    settings = load()
    settings.trainer.home = folder
    shutil.copytree(world.settings.home / "log", folder / "log")
    (window,) = (world.settings.home / "runs").glob("*/window.json")
    run = folder / "runs" / window.parent.name
    run.mkdir(parents=True)
    shutil.copy(window, run)
    champion = world.registry.fetch("champion")
    settings.registry.name += "-unbroken"
    registry = Registry(settings.registry)
    registry.publish_codebook(world.codebook)
    with Client(world.kafka) as client:
        release.start(registry, client, registry.register(champion))
    return one_cycle(settings, settings.trainer, lambda stage, text, last: None).bundles


def test_killed_in_every_stage_it_ends_in_the_bundles_of_an_unbroken_run(
    world: World, tmp_path: Path
) -> None:
    from sidstream.commands.train import one_cycle
    from sidstream.settings import load

    world.walk(range(40), 10, Purchase, 0)
    settings = load()
    first = one_cycle(settings, settings.trainer, lambda stage, text, last: None)
    assert first.action == "start"
    world.walk(range(40), 6, Click, 1000)
    world.prefer(120)
    expected: dict[str, str] = {}
    for number, stage in enumerate(STAGES):
        kill_in(world, stage, number)
        if not expected:
            expected = unbroken(world, tmp_path / "unbroken")
            assert set(expected) == {"sft", "dpo"}
    done = subprocess.run(
        [sys.executable, "-m", "sidstream", "train", "--json"], capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    result = json.loads(done.stdout.splitlines()[-1])
    assert b"goes on with the window that it began with" in done.stderr
    assert result["bundles"] == expected
    assert (result["events"], result["action"]) == (240, "trial")
    assert not list((world.settings.home / "runs").iterdir())
