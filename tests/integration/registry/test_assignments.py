"""Serving, the agents' sums and `sidstream arm` deal the same users to the same arms."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from harness.agents_worker import worker, write_codebook
from harness.servers import wait_until
from sidstream.commands import registry as commands
from streams.events import Arm, CatalogItem, Impression, Rollout, SidAssignment, Trigger
from streams.settings import KafkaSettings
from streams.state import keys
from streams.wire.client import Client
from tests.conftest import FreshStack
from tests.serving_support import PATIENCE_S, BundlesByVersion, running
from tests.tiny_bundle import tiny_codebook, write_tiny_bundle

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SIZES = (4, 4, 4)
USERS = [f"u{n}" for n in range(30)]
WEIGHTS = {"champion": 0.3, "challenger-sft": 0.25, "challenger-dpo": 0.25, "anchor": 0.2}


@pytest.fixture
def stack(
    fresh_stack: FreshStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[KafkaSettings, str, BundlesByVersion, Client]]:
    """Fresh Kafka and Redis, also as the commands' settings, a catalogue, and a bundle for every arm."""
    kafka, url = fresh_stack()
    monkeypatch.setenv("SIDSTREAM_KAFKA__BOOTSTRAP", str(kafka.bootstrap))
    monkeypatch.setenv("SIDSTREAM_REDIS__URL", url)
    monkeypatch.chdir(tmp_path)
    source = BundlesByVersion(
        **{name: write_tiny_bundle(tmp_path / name, SIZES, seed) for seed, name in enumerate(WEIGHTS)}
    )
    book = tiny_codebook(SIZES).id
    with Client(kafka) as client:
        for n, sid in enumerate(itertools.product(range(4), repeat=3)):
            client.publish(CatalogItem.new(item_id=f"i{n}", title=f"Item {n}"))
            client.publish(SidAssignment.new(item_id=f"i{n}", sid=list(sid), codebook=book))
        yield kafka, url, source, client


def test_thirty_users_have_the_same_arm_in_serving_in_the_sums_and_by_the_command(
    stack: tuple[KafkaSettings, str, BundlesByVersion, Client],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kafka, url, source, client = stack
    write_codebook(tmp_path / "codebook")
    arms = [Arm(name, source.bundles[name].id, weight, version=name) for name, weight in WEIGHTS.items()]
    dealt: dict[str, dict[str, str | None]] = {}
    with (
        redis.Redis.from_url(url) as store,
        running(kafka, url, source) as serving,
        worker(kafka, url, tmp_path / "codebook", tmp_path / "log"),
    ):
        for trial, salt in (("t1", "salt-1"), ("t2", "salt-2"), ("t3", "salt-1")):
            step = Rollout.new(name="sidstream", action="trial", trial=trial, salt=salt, step=1.0, arms=arms)
            client.publish(step)
            serving.wait_ready()

            def ask(user: str, trial: str = trial) -> str | None:
                answer = client.ask(
                    Trigger.new(request_id=f"{trial}-{user}", user_id=user, item_id="i0"), PATIENCE_S
                )
                if answer.trial != trial:
                    return None
                shown = [ranked.item_id for ranked in answer.items[:2]]
                client.publish(Impression.new(user_id=user, item_ids=shown, request_id=answer.request_id))
                assert answer.bundle == source.bundles[str(answer.arm)].id
                return answer.arm

            wait_until(lambda: ask("nobody"), PATIENCE_S, "the trial in serving")
            served = {user: ask(user) for user in USERS}

            def summed(trial: str = trial) -> dict[str, str]:
                rows = {user: store.hget(keys.sums(trial, user), "arm") for user in USERS}
                return {user: arm.decode() for user, arm in rows.items() if arm}

            wait_until(lambda: len(summed()) == len(USERS), PATIENCE_S, "sums of every user")
            assert summed() == served
            told = {}
            for user in USERS:
                commands.arm(user, as_json=True)
                row = json.loads(capsys.readouterr().out)
                assert (row["trial"], row["bundle"]) == (trial, source.bundles[row["arm"]].id)
                told[user] = row["arm"]
            assert told == served
            dealt[trial] = served
    first, second = dealt["t1"], dealt["t2"]
    # The next step of a ramp has another trial, and the same salt.
    assert dealt["t3"] == first
    assert set(first.values()) == set(second.values()) == set(WEIGHTS)
    assert first != second
    held_out = {user for user, arm in first.items() if arm == "anchor"}
    assert held_out == {user for user, arm in second.items() if arm == "anchor"}
