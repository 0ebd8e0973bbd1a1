"""Promoters as processes of their own, which tests kill or stop at any write, and the checks that follow.

MLflow takes seconds to import, so one warmed process forks a child for every release step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis

from harness.registry_support import arm_outcomes
from harness.servers import wait_until
from registry.arms import ANCHOR, CHAMPION, DPO, SFT
from registry.bundles.store import PREVIOUS_CHAMPION, STATE, Registry
from registry.bundles.tracking import Tracking
from registry.experiment.decision import decide, recompute
from registry.experiment.outcomes import ArmOutcomes
from registry.releases import release
from registry.releases.current_rollout import current_rollout
from registry.releases.lease import lease_key, promotion_lease
from registry.settings import GateSettings, RegistrySettings, RolloutSettings
from streams.errors import SidstreamError
from streams.events import Event, Rollout
from streams.settings import KafkaSettings
from streams.wire.client import Client

# Short, since tests wait for its end; whoever is slower than this loses it, and is refused.
LEASE_MS = 600
_LONG_MS = 60_000
# The same for all promoters: what a step does must not depend on who takes it.
ROLLOUT = RolloutSettings()
_ON_TRIAL = {"shadow", "canary", "trial"}
_WAIT_S = 60.0


# In the child


class _Writes:
    """Counts writes; before the one with number `at` it sends this process the signal."""

    def __init__(self, at: int | None, number: int) -> None:
        self.count = 0
        self._at, self._signal = at, number

    def next(self) -> None:
        if self.count == self._at:
            os.kill(os.getpid(), self._signal)
        self.count += 1


class _Registry(Registry):
    """A registry whose every write is counted."""

    writes: _Writes

    def set_alias(self, name: str, version: str) -> None:
        self.writes.next()
        super().set_alias(name, version)

    def drop_alias(self, name: str) -> None:
        self.writes.next()
        super().drop_alias(name)

    def tag(self, version: str, key: str, value: str) -> None:
        self.writes.next()
        super().tag(version, key, value)

    def store_decision(self, version: str, record: Any) -> None:
        self.writes.next()
        super().store_decision(version, record)

    def set_recommender_tag(self, key: str, value: str | None) -> None:
        self.writes.next()
        super().set_recommender_tag(key, value)


class _Publisher:
    """A client whose every event is counted as a write."""

    def __init__(self, client: Client, writes: _Writes) -> None:
        self._client, self._writes = client, writes

    def publish(self, event: Event) -> object:
        self._writes.next()
        return self._client.publish(event)


def take(registry: Registry, client: release.Publisher, step: dict[str, Any]) -> Rollout | None:
    """The release step that `step` describes."""
    match step["action"]:
        case "start":
            return release.start(registry, client, step["version"])
        case "trial":
            return release.start_trial(registry, client, step["sft"], step["dpo"], ROLLOUT, step["step"])
        case "advance":
            return release.advance(registry, client, step["step"], ROLLOUT)
        case "conclude":
            return release.conclude(registry, client, step["record"], ROLLOUT)
        case "promote":
            return release.promote(registry, client, step["version"], ROLLOUT)
        case "rollback":
            return release.rollback(registry, client, ROLLOUT)
        case "finish":
            return release.finish_step(registry, client)
    raise ValueError(step["action"])


def _run(job: dict[str, Any], stack: dict[str, Any]) -> dict[str, Any]:
    """Take one step, as `sidstream.commands.registry.promoting` does, and return its outcome."""
    writes = _Writes(job.get("at"), getattr(signal, job.get("signal", "SIGKILL")))
    registry = _Registry(RegistrySettings.model_validate(stack["registry"]))
    registry.writes = writes
    kafka = KafkaSettings.model_validate(stack["kafka"])
    with redis.Redis.from_url(stack["redis"]) as connection, Client(kafka) as client:
        registry.alias(CHAMPION)  # the connection to MLflow is made before the race begins
        if "gate" in job:
            connection.rpush(f"{job['gate']}:ready", 1)
            assert connection.blpop([f"{job['gate']}:go"], timeout=int(_WAIT_S))
        until = time.monotonic() + job.get("patience", 0.0)
        while True:
            begun = None
            try:
                with promotion_lease(connection, registry.name, job.get("lease_ms", LEASE_MS)):
                    begun = time.monotonic()
                    if "after" in job:
                        threading.Thread(target=_end, args=(job["after"],), daemon=True).start()
                    rollout = take(registry, _Publisher(client, writes), job["step"])
                return {
                    "done": None if rollout is None else rollout.trial, "writes": writes.count,
                    "seconds": time.monotonic() - begun,
                }  # fmt: skip
            except SidstreamError as error:
                if begun is not None or time.monotonic() > until:
                    return {"refused": str(error), "writes": writes.count}
                time.sleep(0.02)


def _end(after: float) -> None:
    time.sleep(after)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Fork a child for every job on stdin; {"wait": pid} waits for one."""
    Tracking(RegistrySettings(tracking_uri="http://127.0.0.1:9")).client  # noqa: B018, imports MLflow
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            _, status = os.waitpid(job["wait"], 0)
            answer = {"exit": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                outcome = _run(job, json.loads(sys.argv[1]))
                part = Path(job["out"] + ".part")
                part.write_text(json.dumps(outcome))
                part.replace(job["out"])
                os._exit(0)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


# In the test


class Promoter:
    """One child: a release step under way."""

    def __init__(self, pid: int, out: Path) -> None:
        self.pid, self.out = pid, out

    @property
    def stopped(self) -> bool:
        """Is it stopped by a signal?"""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)


class Promoters:
    """A recommender on a real stack, and processes that change what it serves."""

    def __init__(self, kafka: KafkaSettings, redis_url: str, registry: Registry, folder: Path) -> None:
        self.kafka, self.registry, self.folder = kafka, registry, folder
        self.redis = redis.Redis.from_url(redis_url)
        self.client = Client(kafka)
        self.decided = 0
        stack = {
            "kafka": kafka.model_dump(mode="json"), "redis": redis_url,
            "registry": {
                "tracking_uri": registry.tracking_uri, "name": registry.name, "cache": str(registry.cache)
            },
        }  # fmt: skip
        self._log = (folder / "promoters.log").open("ab")
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "harness.promoter_worker", json.dumps(stack)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        self._jobs = 0
        self._alive: set[int] = set()

    def close(self) -> None:
        """End every child, and their parent."""
        for pid in self._alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait(_WAIT_S)
        self._log.close()
        self.client.close()
        self.redis.close()

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(job) + "\n")
        self._parent.stdin.flush()
        line = self._parent.stdout.readline()
        assert line, (self.folder / "promoters.log").read_text()[-3000:]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def begin(self, step: dict[str, Any], **how: Any) -> Promoter:
        """Take a step in a process of its own. `at`: it is killed (or gets `signal`) before its write with
        this number, from 0; `after`: it is killed after these seconds; `gate`: it waits for `race`."""
        self._jobs += 1
        out = self.folder / f"job-{self._jobs}.json"
        pid = self._ask({"step": step, "out": str(out), **how})["pid"]
        self._alive.add(pid)
        return Promoter(pid, out)

    def end(self, child: Promoter) -> dict[str, Any] | None:
        """Wait until a child ends; what it says of its step, or None when it was killed."""
        code = self._ask({"wait": child.pid})["exit"]
        self._alive.discard(child.pid)
        assert code in (0, -signal.SIGKILL), (self.folder / "promoters.log").read_text()[-3000:]
        if code:
            return None
        outcome: dict[str, Any] = json.loads(child.out.read_text())
        return outcome

    def race(self, *steps: dict[str, Any], patience: float) -> list[dict[str, Any]]:
        """Take steps at the same time; what became of each. `patience`: how long each waits for the lease."""
        gate = f"gate-{self._jobs}"
        children = [self.begin(step, gate=gate, patience=patience, lease_ms=_LONG_MS) for step in steps]
        for _ in children:
            assert self.redis.blpop([f"{gate}:ready"], timeout=int(_WAIT_S))
        self.redis.rpush(f"{gate}:go", *[1] * len(children))
        outcomes = [self.end(child) for child in children]
        return [outcome for outcome in outcomes if outcome is not None]

    def take(self, step: dict[str, Any]) -> Rollout | None:
        """Take a step in this process, as soon as nobody holds the lease; others must not wait for it."""
        key = lease_key(self.registry.name)
        wait_until(lambda: not self.redis.exists(key), _WAIT_S, "the end of the lease")
        with promotion_lease(self.redis, self.registry.name, _LONG_MS):
            return take(self.registry, self.client, step)

    def serving(self) -> Rollout | None:
        """What the topic says now."""
        return current_rollout(self.kafka, self.registry.name)

    def champion(self) -> str:
        """The version that the alias names; a recommender in service has one."""
        return self.aliases()[CHAMPION]

    def trial(self, sft: str, dpo: str | None, step: float = 1.0) -> Rollout:
        """Start a trial in this process."""
        rollout = self.take({"action": "trial", "sft": sft, "dpo": dpo, "step": step})
        assert rollout is not None
        return rollout

    def aliases(self) -> dict[str, str]:
        """Every alias, by MLflow's own client."""
        from mlflow.tracking import MlflowClient

        model = MlflowClient(self.registry.tracking_uri).get_registered_model(self.registry.name)
        return {str(alias): str(version) for alias, version in model.aliases.items()}


_CVRS = {
    "promote": {CHAMPION: 0.2, SFT: 0.27, DPO: 0.35},
    "reject": {CHAMPION: 0.2, SFT: 0.12, DPO: 0.13},
    "inconclusive": {CHAMPION: 0.2, SFT: 0.2, DPO: 0.2},
}


def decided(rollout: Rollout, verdict: str = "promote") -> dict[str, Any]:
    """A decision about a trial, from users whose rates give the verdict."""
    outcomes: dict[str, ArmOutcomes] = {
        arm.name: arm_outcomes(_CVRS[verdict].get(arm.name, 0.2), n, round(7000 * arm.weight))
        for n, arm in enumerate(sorted(rollout.arms, key=lambda arm: arm.name))
    }
    return decide(rollout.trial, rollout.arms, outcomes, GateSettings())


def agree(promoters: Promoters) -> str:
    """Check that record, aliases, tags and traffic say the same, and that the product's check finds so too.

    Returns the champion's version.
    """
    registry, rollout, aliases = promoters.registry, promoters.serving(), promoters.aliases()
    assert rollout is not None
    arms: dict[str, str] = {arm.name: arm.version for arm in rollout.arms}
    champion = aliases[CHAMPION]
    assert arms[CHAMPION] == champion
    assert abs(sum(arm.weight for arm in rollout.arms) - 1) < 1e-9
    assert {name: aliases.get(name) for name in (SFT, DPO)} == {name: arms.get(name) for name in (SFT, DPO)}
    assert (rollout.action == "trial") == (SFT in arms)
    tags = {row.version: row.tags for row in registry.versions()}
    for arm in rollout.arms:
        assert tags[arm.version]["bundle"] == arm.bundle
    on_trial = {version for version, row in tags.items() if row[STATE] in _ON_TRIAL}
    assert on_trial == {arms[name] for name in (SFT, DPO) if name in arms}
    assert tags[champion][STATE] == "promoted"
    record = rollout.decision
    if record is not None:
        _check_record(registry, record, rollout, champion, tags)
    assert release.disagreement(registry, rollout) is None
    return champion


def _check_record(
    registry: Registry, record: dict[str, Any], rollout: Rollout, champion: str, tags: dict[str, Any]
) -> None:
    if record["mode"] == "manual":
        before, after, about = record["from"], record["to"], [record["to"]]
        if rollout.action == "rollback":
            about = [before]
            assert tags[before][PREVIOUS_CHAMPION] == after
    else:
        verdict, winner = recompute(record)
        assert verdict == rollout.action
        versions = {name: arm["version"] for name, arm in record["arms"].items() if name != ANCHOR}
        before, after, about = versions[CHAMPION], versions[winner], list(versions.values())
    assert after == champion
    if rollout.action == "promote" and before not in (None, after):
        assert tags[after][PREVIOUS_CHAMPION] == before
    for version in about:
        assert tags[version]["decision"] == record["decision"]
        assert registry.decision(version) == record


def killed_before(promoters: Promoters, step: dict[str, Any], n: int) -> int | None:
    """Kill a promoter before its write `n` (from 0), let another one finish, and check.

    Returns the writes of the step where it has not that many, and None where the promoter was killed.
    """
    while True:
        old = promoters.champion()
        outcome = promoters.end(promoters.begin(step, at=n))
        between = promoters.champion()
        promoters.take({"action": "finish"})
        assert between in (old, agree(promoters))
        if outcome is None:
            return None
        if "done" in outcome:
            return int(outcome["writes"])
        # Slower than its lease: nothing is shown.
        assert "lease" in outcome["refused"], outcome


def stopped_before(
    promoters: Promoters, step: dict[str, Any], n: int, *others: dict[str, Any]
) -> dict[str, Any] | None:
    """Stop a promoter before its write `n`, until its lease has ended and another one took other steps.

    It goes on, and a third one finishes what it has left. Returns what the stopped one says, or None where
    its step has not that many writes.
    """
    sleeper = promoters.begin(step, at=n, signal="SIGSTOP")
    wait_until(lambda: sleeper.stopped or sleeper.out.exists(), _WAIT_S, "a promoter that stops")
    if sleeper.out.exists():
        promoters.end(sleeper)
        return None
    key = lease_key(promoters.registry.name)
    wait_until(lambda: not promoters.redis.exists(key), _WAIT_S, "the end of its lease")
    for other in others:
        promoters.take(other)
        agree(promoters)
    sleeper.go_on()
    outcome = promoters.end(sleeper)
    promoters.take({"action": "finish"})
    agree(promoters)
    return outcome


if __name__ == "__main__":
    main()
