"""Claim: ten cycles run unattended while tastes and catalogue drift; no poisoned model stays in service.

Everything is the product's, on a stack of its own: Kafka, Redis, MLflow, agents, serving, training, gate,
rollout, `sidstream.continuous_delivery.ContinuousDelivery`. Only the shoppers are simulated, and their true
chances are known. In the cycle `--poison`, bots with copied histories buy what shoppers would not, before the
model is trained.
Prints one line of JSON a turn and one a cycle; with `--out`, figures are appended there.

    python -m benchmarks.cycles --cycles 10 --poison 5 --out docs/results/cycles.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import line
from registry.bundles.store import Registry
from registry.releases.current_rollout import current_rollout
from sidstream.commands.registry import promoting
from sidstream.commands.train import one_cycle, set_thread_environment
from sidstream.continuous_delivery import ContinuousDelivery, Turn
from sidstream.settings import Settings, load
from streams.events import CatalogItem, Click, Event, Purchase, Rollout, Trigger
from streams.replay import source_of, user_item_sequences
from streams.simulation.shoppers import Shopper, Truth, population
from streams.simulation.shopping import ShoppingTrip, Tally
from streams.state.redisdb import redis_client as redis_client
from streams.wire.admin import consumer_group_lag
from streams.wire.client import Client

# What a machine of two cores does in about two minutes a cycle. The ramp is steeper than the default, and
# more answers are explored, for want of traffic.
ENVIRONMENT = {
    "SIDSTREAM_SERVING__EXPLORE": "0.1",
    "SIDSTREAM_SERVING__SHADOW": "0.2",
    "SIDSTREAM_ROLLOUT__STEPS": "[0.0, 0.25, 1.0]",
    "SIDSTREAM_ROLLOUT__STEP_REQUESTS": "100",
    "SIDSTREAM_ROLLOUT__WATCH_REQUESTS": "1000",
    "SIDSTREAM_ROLLOUT__ANCHOR": "0.05",
    "SIDSTREAM_ROLLOUT__MAX_HOURS": "40",
    "SIDSTREAM_TRAINER__SCHEDULE__EVERY_MINUTES": "0.000001",
}
FIRST_SESSIONS, SESSIONS_PER_TURN = 2500, 1200
# A taste turns by some 12 degrees a cycle; one item of a hundred goes and one comes.
TASTE_DRIFT, TURNOVER = 0.2, 0.01
BOTS, BOT_EVENTS = 3000, 12


class DriftingShop:
    """The shop: who visits, what they like, what is on sale; all of it drifts."""

    def __init__(self, settings: Settings, client: Client, seed: int, cycles: int, start_ts: int) -> None:
        self.settings, self.client = settings, client
        self.random = np.random.default_rng(seed)
        log = source_of("online-retail")
        self.items = list(log.catalogue())
        self.pasts = user_item_sequences(log)
        self.future_items = self._new_items(cycles)
        self.truth = Truth([*self.items, *self.future_items], settings.shoppers)
        self.shoppers = population(self.truth, self.pasts)
        self.prices = {item.item_id: item.price or 0.0 for item in (*self.items, *self.future_items)}
        self.now = start_ts
        self.tallies: dict[str, Tally] = defaultdict(Tally)
        self.sessions = 0

    def _new_items(self, cycles: int) -> list[CatalogItem]:
        """New items: the first half of one title and the second of another."""
        items = []
        for n in range(cycles * round(TURNOVER * len(self.items))):
            a, b = (self.items[int(i)] for i in self.random.choice(len(self.items), 2))
            words = (
                *a.title.split()[: len(a.title.split()) // 2 + 1],
                *b.title.split()[len(b.title.split()) // 2 :],
            )
            items.append(CatalogItem.new(item_id=f"new-{n}", title=" ".join(words), price=a.price))
        return items

    def visit_and_wait(self, sessions: int) -> None:
        """Let shoppers visit, and wait until the agents have applied all of it."""
        trip = ShoppingTrip(self.client, self.truth, self.shoppers, self.settings.shoppers, self.now)
        result = trip.run(sessions, self.prices)
        self.now = result.end_ts
        self.sessions += sessions
        for name, tally in result.arms.items():
            total = self.tallies[name.split()[0]]
            for field in dataclasses.fields(Tally):
                setattr(total, field.name, getattr(total, field.name) + getattr(tally, field.name))
        self.drain()

    def wait_until_served(self, trial: str) -> None:
        """Wait until answers come from the newest rollout; half a minute at most."""
        for _ in range(300):
            request = Trigger.new(request_id=uuid.uuid4().hex, user_id=self.shoppers[0].user_id, ts=self.now)
            if self.client.ask(request, timeout=30).trial == trial:
                return
            time.sleep(0.1)
        raise SystemExit(f"serving does not answer from trial {trial}")

    def drain(self) -> None:
        while consumer_group_lag(self.settings.kafka, self.settings.agents.group):
            time.sleep(0.2)

    def drift(self) -> None:
        """Tastes turn a little, some items go, others come."""
        for shopper in self.shoppers:
            moved = (
                shopper.taste
                + TASTE_DRIFT * self.random.standard_normal(len(shopper.taste)) / len(shopper.taste) ** 0.5
            )
            shopper.taste = moved / np.linalg.norm(moved)
        count = round(TURNOVER * len(self.items))
        removed = [self.items.pop(int(self.random.integers(len(self.items)))) for _ in range(count)]
        arriving, self.future_items = self.future_items[:count], self.future_items[count:]
        self.items += arriving
        leaving = [
            CatalogItem.new(item_id=item.item_id, title=item.title, price=item.price, active=False)
            for item in removed
        ]
        self.client.publish_all([*leaving, *arriving])
        self.drain()

    def poison(self) -> int:
        """Bots that look like shoppers buy what is worth least and fits them least. How many events."""
        worst_items = [self.truth.items[row] for row in np.argsort(self.truth.factors[:, 0])[:200]]
        on_sale = {item.item_id for item in self.items}
        worst_items = [item for item in worst_items if item in on_sale]
        chosen = self.random.choice(len(self.shoppers), BOTS)
        events = [
            event
            for n, at in enumerate(chosen)
            for event in self._bot(n, self.shoppers[int(at)], worst_items)
        ]
        events.sort(key=lambda event: event.ts)
        sent = self.client.publish_all(events)
        self.now = events[-1].ts + 1000
        self.drain()
        return sent

    def _bot(self, number: int, copied: Shopper, worst_items: list[str]) -> Iterator[Event]:
        user, ts = f"bot-{number}", self.now + number * 1000
        for n, item in enumerate(copied.past[-BOT_EVENTS:]):
            yield Click.new(event_id=f"{user}-{ts}-a{n}", user_id=user, item_id=item, ts=ts + n)
        for n in range(BOT_EVENTS):
            item = worst_items[int(self.random.integers(len(worst_items)))]
            at = ts + 1000 * (n + 1)
            yield Click.new(event_id=f"{user}-{ts}-c{n}", user_id=user, item_id=item, ts=at)
            yield Purchase.new(event_id=f"{user}-{ts}-p{n}", user_id=user, item_id=item, ts=at + 1, price=1.0)


@contextmanager
def stack(home: Path) -> Iterator[int]:
    """A stack of its own with the shop's year in it; the time of its last event (ms)."""
    os.environ |= ENVIRONMENT | {"SIDSTREAM_STACK__HOME": str(home)}

    def run(*arguments: str) -> dict[str, Any]:
        completed = subprocess.run(
            [sys.executable, "-m", "sidstream", *arguments, "--json"], stdout=subprocess.PIPE, check=True
        )
        answer: dict[str, Any] = json.loads(completed.stdout)
        return answer

    run("up")
    try:
        run("replay", "online-retail", "--only", "catalog")
        run("codebook", "fit")
        yield int(run("replay", "online-retail", "--only", "events")["last_ts"])
    finally:
        run("down", "--purge")


def rollout_in_service(settings: Settings) -> Rollout:
    """The newest rollout of a stack that has one."""
    rollout = current_rollout(settings.kafka, settings.registry.name)
    assert rollout is not None, "a model is in service"
    return rollout


def turn_line(turn: Turn) -> dict[str, Any]:
    return {"did": turn.did, "sentence": turn.sentence, "trial": turn.trial}


def run_cycles(
    settings: Settings, world: DriftingShop, cycles: int, poison: int | None, first_seconds: float
) -> list[dict[str, Any]]:
    """Run the cycles; one row each."""
    registry = Registry(settings.registry)
    rows: list[dict[str, Any]] = []
    trained = 0

    def train() -> Any:
        nonlocal trained
        if trained == poison:
            print(json.dumps({"poisoned": world.poison(), "cycle": trained}), flush=True)
        chosen = settings.trainer
        seconds = first_seconds if not trained else first_seconds / 3
        trained += 1
        return one_cycle(
            settings, chosen.model_copy(update={"max_seconds": seconds}),
            lambda stage, text, last: print(f"  {stage}: {text}", file=sys.stderr) if last else None,
            step=settings.rollout.steps[0],
        )  # fmt: skip

    with redis_client(settings.redis) as redis:
        cycle = ContinuousDelivery(
            settings, registry, redis, lambda: current_rollout(settings.kafka, settings.registry.name), train,
            lambda: promoting(settings),
        )  # fmt: skip
        begun, sessions = time.monotonic(), 0
        candidates: dict[str, str] = {}
        while len(rows) < cycles:
            turn = cycle.turn()
            if turn.did != "wait":
                print(json.dumps(turn_line(turn)), flush=True)
            if turn.acted:
                world.wait_until_served(rollout_in_service(settings).trial)
            if turn.did == "train":
                candidates = turn.details["versions"]
                world.visit_and_wait(FIRST_SESSIONS if "base" in candidates else SESSIONS_PER_TURN)
            elif turn.did in ("wait", "advance", "skip"):
                world.visit_and_wait(SESSIONS_PER_TURN)
            elif turn.did == "rollback":
                rows[-1] |= {"rolled_back": turn.sentence}
            else:
                arms = {name: [round(t.expected_clicks / max(t.shown, 1), 4),
                               round(t.expected_purchases / max(t.expected_clicks, 1e-9), 4), t.sessions]
                        for name, t in sorted(world.tallies.items())}  # fmt: skip
                rows.append({
                    "cycle": len(rows) + 1, "poisoned": trained - 1 == poison, "did": turn.did,
                    "sentence": turn.sentence, "candidates": candidates,
                    "champion": rollout_in_service(settings).arms[0].version,
                    "decision": turn.record and turn.record["decision"],
                    "true_ctr_cvr_sessions": arms, "sessions": world.sessions - sessions,
                    "seconds": round(time.monotonic() - begun),
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
                begun, sessions, candidates = time.monotonic(), world.sessions, {}
                world.tallies.clear()
                world.drift()
                if turn.did == "refuse":
                    world.visit_and_wait(SESSIONS_PER_TURN)
    return rows


def figures(rows: list[dict[str, Any]], poison: int | None, command: str, seed: int) -> list[dict[str, Any]]:
    """One line a figure."""
    figures_of_run = [
        ("10 cycles run unattended", "cycles ended by a verdict or a stated refusal", len(rows)),
        ("none", "promotions", sum(row["did"] == "promote" for row in rows)),
    ]
    if poison is not None:
        (poisoned_row,) = (row for row in rows if row["poisoned"])
        stayed = poisoned_row["did"] == "promote" and "rolled_back" not in poisoned_row
        figures_of_run.append(
            (
                "a poisoned model is refused or rolled back",
                "poisoned models that stayed in service",
                int(stayed),
            )
        )
    dataset = "UCI Online Retail, simulated shoppers with drift"
    return [
        line(claim, dataset, "closed loop on the local stack", metric, value, seed, command)
        for claim, metric, value in figures_of_run
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--poison", type=int, help="cycle whose training data is poisoned, from 1")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first-seconds", type=float, default=60.0, help="training of the first model")
    parser.add_argument("--out", type=Path, help="append the figures to this file")
    options = parser.parse_args()
    set_thread_environment()
    with tempfile.TemporaryDirectory(prefix="sidstream-") as folder, stack(Path(folder) / "stack") as last_ts:
        settings = load()
        with Client(settings.kafka) as client:
            world = DriftingShop(settings, client, options.seed, options.cycles, last_ts + 86_400_000)
            rows = run_cycles(settings, world, options.cycles, options.poison, options.first_seconds)
    command = f"python -m benchmarks.cycles {' '.join(sys.argv[1:])}".strip()
    lines = "".join(
        json.dumps(figure) + "\n" for figure in figures(rows, options.poison, command, options.seed)
    )
    if options.out:
        with options.out.open("a") as out:
            out.write(lines)
    print(lines, end="")


if __name__ == "__main__":
    main()
