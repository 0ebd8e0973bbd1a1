"""Claim: one champion, and record = alias = traffic, after 200 races of two promoters and 50 kills (-9).

Promoters are processes that take release steps under the lease, on a real MLflow (SQLite), Redis and Kafka:

- races: two processes begin two different steps at the same time, 200 times;
- kills: SIGKILL at a random moment of a random step, 50 times; then another promoter waits for the lease and
  finishes, or takes a next step. And for each step: SIGKILL before every single write, in turn;
- stops: for each step and every single write, SIGSTOP after the check of the lease and before the write,
  until the lease has ended and another promoter took a step; then SIGCONT, and a third promoter finishes.

After each, record, aliases, tags and traffic are compared (harness.promoter_worker.agree). Prints
one line of JSON a figure, with the 95 % binomial interval (Clopper and Pearson), and writes
docs/results/promoters.jsonl and the table of docs/results/promoters.md.

    python -m benchmarks.promoters
    python -m benchmarks.promoters --quick     # a twentieth; writes nothing
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.results import exact_share, line, publish_shares
from harness.promoter_worker import Promoters, agree, decided, killed_before, stopped_before
from harness.registry_support import bundle
from harness.servers import kafka_settings, local_kafka, local_mlflow, local_redis
from registry.bundles.store import Registry
from registry.settings import RegistrySettings
from streams.errors import SidstreamError
from streams.events import Rollout
from streams.wire.admin import create_topics

SEED = 4
VERSIONS = ("1", "2", "3", "4")
RACES, KILLS = 200, 50
ACTIONS = ("trial", "advance", "conclude", "promote", "rollback")
_PATIENCE_S = 60.0


class Drill:
    """Draws steps, and counts what came of them."""

    def __init__(self, promoters: Promoters, seed: int) -> None:
        self.promoters, self.random = promoters, random.Random(seed)
        self.counts: Counter[str] = Counter()

    def non_champions(self) -> list[str]:
        """Every version but the champion, in random order."""
        champion = self.promoters.champion()
        return self.random.sample([version for version in VERSIONS if version != champion], len(VERSIONS) - 1)

    def trial(self, step: float) -> Rollout:
        """Begin a trial of two random versions."""
        first, second, _ = self.non_champions()
        return self.promoters.trial(first, second, step)

    def step(self, action: str, rollout: Rollout, verdict: str | None = None) -> dict[str, Any]:
        """A step that could come next in the trial `rollout`, which is at step .1."""
        first, second, _ = self.non_champions()
        verdict = verdict or self.random.choice(("promote", "reject", "inconclusive"))
        steps: dict[str, dict[str, Any]] = {
            "trial": {"action": "trial", "sft": first, "dpo": second, "step": 1.0},
            "advance": {"action": "advance", "step": 1.0},
            "conclude": {"action": "conclude", "record": decided(rollout, verdict)},
            "promote": {"action": "promote", "version": first},
            "rollback": {"action": "rollback"},
        }
        return steps[action]

    def count_agreement(self, what: str, assert_agreement: Callable[[], object]) -> None:
        """Count whether a check holds."""
        self.counts[f"{what} in all"] += 1
        try:
            assert_agreement()
        except AssertionError:
            print(f"{what}: they do not agree\n{traceback.format_exc()}", file=sys.stderr)
            return
        self.counts[what] += 1

    def race(self) -> None:
        """Two steps at once."""
        rollout = self.trial(0.1)
        steps = [self.step(action, rollout) for action in self.random.choices(ACTIONS, k=2)]
        patience = self.random.choice((0.0, _PATIENCE_S))
        results = self.promoters.race(*steps, patience=patience)
        self.counts["both steps held"] += sum("done" in row for row in results) == 2
        self.counts["refused by the lease"] += any(
            "another process" in row.get("refused", "") for row in results
        )

        def assert_agreement() -> None:
            # None was killed, and none lost its lease; a step may be refused by the rules.
            assert len(results) == 2, results
            assert not any("was lost" in row.get("refused", "") for row in results), results
            agree(self.promoters)

        self.count_agreement("races", assert_agreement)

    def kill(self, after: float) -> bool:
        """A random step, killed after so many seconds; False where it was done before."""
        rollout = self.trial(0.1)
        step = self.step(self.random.choice(ACTIONS), rollout)
        champion_before = self.promoters.champion()
        results = self.promoters.end(self.promoters.begin(step, after=self.random.uniform(0, after)))
        if results is not None:
            return False
        between = self.promoters.champion()
        finishing = self.random.random() < 0.5
        following = {"action": "finish"} if finishing else self.step(self.random.choice(ACTIONS), rollout)

        def assert_agreement() -> None:
            try:
                self.promoters.take(following)
            except SidstreamError:
                # Refused by the rules, as a conclusion of a trial that has ended; what was noted is finished.
                self.counts["next steps refused"] += 1
            champion_after = agree(self.promoters)
            if finishing:
                assert between in (champion_before, champion_after)
                self.counts["cut short before the note"] += champion_after == champion_before
            assert between in VERSIONS

        self.count_agreement("random kills", assert_agreement)
        return True

    def every_write(self, action: str) -> int:
        """Kill a step before each of its writes; how many they are."""
        n = 0
        while True:
            step = self.step(action, self.trial(0.1), "promote")
            writes = None

            def assert_agreement(step: dict[str, Any] = step, n: int = n) -> None:
                nonlocal writes
                writes = killed_before(self.promoters, step, n)

            self.count_agreement(f"kills {action}", assert_agreement)
            if writes is not None:
                return writes
            n += 1

    def every_stop(self, action: str, writes: int) -> None:
        """Stop a step before each of its writes, and let another promoter go ahead."""
        for n in range(writes):
            step = self.step(action, self.trial(0.1), "promote")
            # A version that the stopped step does not name: who has won can be told.
            other = self.non_champions()[2]

            def assert_agreement(step: dict[str, Any] = step, n: int = n, other: str = other) -> None:
                results = stopped_before(self.promoters, step, n, {"action": "promote", "version": other})
                assert results is not None
                assert "lease" in results["refused"], results
                self.counts["later step kept"] += self.promoters.champion() == other

            self.count_agreement("stops", assert_agreement)


@contextmanager
def recommender() -> Iterator[Promoters]:
    """A recommender with four versions, the first in service, on a stack of its own."""
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
        kafka = kafka_settings(running.enter_context(local_kafka(folder / "kafka")).bootstrap)
        create_topics(kafka)
        redis_url = running.enter_context(local_redis(folder / "redis"))
        mlflow = running.enter_context(local_mlflow(folder / "mlflow"))
        registry = Registry(RegistrySettings(tracking_uri=mlflow, name="drill", cache=folder / "cache"))
        for version in VERSIONS:
            assert registry.register(bundle(folder, int(version))) == version
        promoters = Promoters(kafka, redis_url, registry, folder)
        running.callback(promoters.close)
        promoters.take({"action": "start", "version": "1"})
        # So that there is a predecessor to go back to.
        promoters.take({"action": "promote", "version": "2"})
        yield promoters


def figures(drill: Drill, races: int, kills: int, actions: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Every figure of the benchmark."""
    counts = drill.counts
    for n in range(races):
        drill.race()
        _progress(f"{n + 1} of {races} races")
    yield share_line("two promoters at once: they agree afterwards", "always", counts["races"], races)
    yield share_line(
        "two promoters at once: both steps held, one after the other",
        "none",
        counts["both steps held"],
        races,
    )
    yield share_line(
        "two promoters at once: one refused by the lease", "none", counts["refused by the lease"], races
    )
    step_seconds = []
    for action in ACTIONS:
        results = drill.promoters.race(drill.step(action, drill.trial(0.1)), patience=0.0)
        step_seconds.append(results[0].get("seconds", 0.0))
    while counts["random kills in all"] < kills:
        drill.kill(max(step_seconds))
        _progress(f"{counts['random kills in all']} of {kills} kills")
    yield share_line(
        "kill -9 at a random moment: they agree after the next promoter",
        "always",
        counts["random kills"],
        kills,
    )
    for action in actions:
        writes = drill.every_write(action)
        _progress(f"{action} killed before each of {writes} writes")
        agreements, attempts = counts[f"kills {action}"], counts[f"kills {action} in all"]
        yield share_line(
            f"kill -9 before each write of `{action}`: they agree after the next promoter",
            "always",
            agreements,
            attempts,
        )
        drill.every_stop(action, writes)
        _progress(f"{action} stopped before each of {writes} writes")
    stops = counts["stops in all"]
    yield share_line(
        "stopped past the lease before a write: they agree after the next promoter",
        "always",
        counts["stops"],
        stops,
    )
    yield share_line(
        "stopped past the lease before a write: the later step is kept",
        "always",
        counts["later step kept"],
        stops,
    )


def share_line(metric: str, claim: str, count: int, attempts: int) -> dict[str, Any]:
    """One line of the results: a share, and its 95 % interval."""
    return line(
        claim, "four versions on MLflow (SQLite), Redis and Kafka", "release steps",
        f"{metric}; {count} of {attempts}", seed=SEED, command="python -m benchmarks.promoters",
        **exact_share(count, attempts),
    )  # fmt: skip


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


COLUMNS = ("what was done", "what was seen", "times")


def cells(row: dict[str, Any]) -> list[str]:
    """A line's first cells in the table for people."""
    what, _, times = row["metric"].partition("; ")
    done, _, seen = what.partition(": ")
    return [done, seen, times]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a twentieth; writes nothing")
    options = parser.parse_args()
    rows = []
    with recommender() as promoters:
        quick = (RACES // 20, KILLS // 10, ("advance",))
        for row in figures(Drill(promoters, SEED), *(quick if options.quick else (RACES, KILLS, ACTIONS))):
            print(json.dumps(row), flush=True)
            rows.append(row)
    if not options.quick:
        publish_shares("promoters", rows, COLUMNS, cells)


if __name__ == "__main__":
    main()
