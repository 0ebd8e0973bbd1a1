"""Claim: what `make demo` promotes is better in truth, and a copy of a champion is not promoted.

    python -m benchmarks.demo_seeds --seeds 1 2 3 4 5 6 7 8 9 10 --out demo-seeds.jsonl --publish

For each seed, of shoppers and of training, the whole `sidstream demo` on a stack of its own in a temporary
folder: how long it took, what the gate decided and on which figures. What is true is known in two ways. The
demo's own tally has the chances of clicks and purchases of what each arm showed to its users: no noise of
clicks, but one arm's users may love what sells better than another's. So the models of all arms are also
judged by what they show to the same 2,000 shoppers (`benchmarks.align`), and a promotion is right where by
those rates the winner's CVR is above the champion's and its CTR above the margin.

On the same stack then a null trial: `sidstream gate aa` holds the champion against itself, with as many
sessions as the demo's trial and under the demo's rule, `sidstream gate --mode fixed` once, at the end. The
comparison's own verdict counts, which is wrongly `promote` once in twenty times by the rule's alpha.

One line of JSON a seed, appended to --out as it ends; a seed that is in --out already is not run again, a
seed that fails is a line with its reason, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.demo_page import publish
from benchmarks.results import RESULTS
from harness.servers import wait_until
from registry.arms import CHAMPION, DPO, SFT

# The demo takes six minutes at most on a quiet machine of two cores.
_DEMO_S, _COMMAND_S = 1800, 600
# A machine that is shared answers late; the applying of the last events takes seconds.
_WAIT_S = 300
_JURY = 2000
_HOUR_MS = 3_600_000


def main() -> None:
    """Run the demo and a null trial with every seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 11)))
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines: read first, appended to")
    parser.add_argument("--sessions", type=int, help="as of `sidstream demo`; default: its own")
    parser.add_argument("--publish", action="store_true", help="put figures and table into docs/results")
    options = parser.parse_args()
    if options.publish and options.sessions:
        parser.error("the page is of the demo as it is: leave out --sessions, or --publish")
    rows = {row["seed"]: row for row in _read(options.out)}
    for seed in options.seeds:
        if seed in rows:
            print(f"seed {seed}: there already", file=sys.stderr)
            continue
        rows[seed] = seeded(seed, options.sessions)
        with options.out.open("a") as out:
            out.write(json.dumps(rows[seed]) + "\n")
        print(json.dumps(rows[seed]), flush=True)
    if options.publish:
        publish([rows[seed] for seed in options.seeds], RESULTS)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def seeded(seed: int, sessions: int | None) -> dict[str, Any]:
    """The line of one seed; whatever goes wrong is its `failed`."""
    began = time.monotonic()
    row: dict[str, Any] = {"seed": seed, "failed": None}
    with tempfile.TemporaryDirectory(prefix="sidstream-demo-", ignore_cleanup_errors=True) as folder:
        stack = Stack(Path(folder), f"seed {seed}")
        try:
            more = ["--sessions", str(sessions)] if sessions else []
            demo = stack.run("demo", "--seed", str(seed), *more, seconds=_DEMO_S)
            row |= described(demo)
            row |= truths(stack.panel(demo["gate"], seed), demo["winner"], demo["gate"]["settings"]["margin"])
            row["null"] = stack.null(demo)
        except Exception as error:  # the other seeds are to be run all the same
            row["failed"] = f"{type(error).__name__}: {error}"
            stack.tell(row["failed"])
        finally:
            stack.end()
    return row | {"total_s": round(time.monotonic() - began, 1)}


class Stack:
    """A stack of its own below `folder`, through the commands that a person types."""

    def __init__(self, folder: Path, name: str) -> None:
        from sidstream.demo import SETTINGS

        self.name = name
        self.own = {
            "SIDSTREAM_STACK__HOME": str(folder / "stack"),
            "SIDSTREAM_REGISTRY__CACHE": str(folder / "cache"),
        }
        self.environment = {**os.environ, **SETTINGS, **self.own}

    def tell(self, text: str) -> None:
        """Progress, for who waits."""
        print(f"{time.strftime('%H:%M:%S')} {self.name}: {text}", file=sys.stderr, flush=True)

    def run(self, *arguments: str, seconds: float = _COMMAND_S) -> dict[str, Any]:
        """What `sidstream ARGUMENTS --json` printed; RuntimeError with its last lines where it fails."""
        self.tell(f"sidstream {' '.join(arguments)}")
        with tempfile.TemporaryFile("w+") as errors:
            made = subprocess.run(
                [sys.executable, "-m", "sidstream", *arguments, "--json"], env=self.environment, text=True,
                stdout=subprocess.PIPE, stderr=errors, timeout=seconds, check=False,
            )  # fmt: skip
            errors.seek(0)
            last = " | ".join(errors.read().strip().splitlines()[-2:])
        if made.returncode:
            raise RuntimeError(f"sidstream {arguments[0]} ended with {made.returncode}: {last}")
        answer: dict[str, Any] = json.loads(made.stdout.strip().splitlines()[-1])
        return answer

    def panel(self, decision: dict[str, Any], seed: int) -> dict[str, list[float]]:
        """True [CTR, CVR] by arm, of what its model shows to the same shoppers: in a process of its own."""
        self.tell(f"{_JURY} shoppers judge every arm")
        code = (
            "import json, sys; from benchmarks.demo_seeds import judged;"
            "print(json.dumps(judged(json.loads(sys.argv[1]))))"
        )
        versions = {arm: decision["arms"][arm]["version"] for arm in (CHAMPION, SFT, DPO)
                    if arm in decision["arms"]}  # fmt: skip
        environment = self.environment | {"SIDSTREAM_SHOPPERS__SEED": str(seed)}
        made = subprocess.run(
            [sys.executable, "-c", code, json.dumps(versions)], env=environment, text=True,
            capture_output=True, timeout=_COMMAND_S, check=False,
        )  # fmt: skip
        if made.returncode:
            raise RuntimeError(f"the shoppers could not judge: {made.stderr.strip().splitlines()[-1:]}")
        rates: dict[str, list[float]] = json.loads(made.stdout.strip().splitlines()[-1])
        return rates

    def null(self, demo: dict[str, Any]) -> dict[str, Any]:
        """A trial of the champion against itself, with the demo's sessions, seed and rule."""
        began = time.monotonic()
        trial = self.run("gate", "aa")["trial"]
        wait_until(
            lambda: self._trial_of_an_answer(demo["page"]) == trial,
            _WAIT_S,
            "the null trial in service",
            pause=1,
        )
        sessions = sum(arm["sessions"] for arm in demo["sessions"]["trial"]["arms"].values())
        shopped = self.run(
            "shoppers", "--sessions", str(sessions), "--seed", str(demo["seed"]),
            "--start", str(demo["sessions"]["trial"]["end_ts"] + 24 * _HOUR_MS),
        )  # fmt: skip
        wait_until(lambda: self._behind() == 0, _WAIT_S, "every event applied", pause=1)
        decision = self.run("gate", "--mode", "fixed", "--conclude", "--end")
        compared = decision["comparisons"][-1]
        return {
            "verdict": decision["verdict"], "compared": compared["verdict"], "figures": figures(compared),
            "shown": shown_truth(shopped), "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip

    def end(self) -> None:
        """Stop the stack and remove it; what fails here is told, not raised."""
        try:
            self.run("down", "--purge")
        except Exception as error:  # the seed's line is worth more than its folder
            self.tell(f"down: {error}")

    def _trial_of_an_answer(self, page: dict[str, Any]) -> str | None:
        answer = self.run("recommend", "--user", page["user"], "--item", page["item"])
        trial: str | None = answer.get("trial")
        return trial

    def _behind(self) -> int:
        code = (
            "from sidstream.settings import load; from streams.wire.admin import consumer_group_lag;"
            "settings = load(); print(consumer_group_lag(settings.kafka, settings.agents.group))"
        )
        made = subprocess.run(
            [sys.executable, "-c", code], env=self.environment, stdout=subprocess.PIPE, text=True,
            timeout=_COMMAND_S, check=True,
        )  # fmt: skip
        return int(made.stdout)


def judged(versions: dict[str, str]) -> dict[str, list[float]]:
    """True [CTR, CVR] by arm, of what the registry's versions show to 2,000 shoppers on the running stack."""
    from benchmarks.align import draw_judge
    from registry.bundles.store import Registry
    from sidstream.commands.train import set_thread_environment
    from sidstream.settings import load
    from trainer.generator.build import load_model

    set_thread_environment()
    settings = load()
    registry = Registry(settings.registry)
    bundles = {arm: registry.fetch(version) for arm, version in versions.items()}
    judge = draw_judge(settings, bundles[CHAMPION], _JURY)
    return {
        arm: [round(rate, 5) for rate in judge.true_rates(load_model(bundle.model)[0], bundle)]
        for arm, bundle in bundles.items()
    }


def figures(comparison: dict[str, Any]) -> dict[str, Any]:
    """A comparison's rates, ratio and p-value by metric; None where it could not be computed."""
    kept = ("target", "control", "difference", "difference_interval", "p_above")
    return {
        rate: comparison[rate] and {name: comparison[rate].get(name) for name in kept}
        for rate in ("cvr", "ctr")
    }


def shown_truth(shopped: dict[str, Any]) -> dict[str, list[float]]:
    """[true CTR, true CVR, sessions] of what each arm showed to its own users."""
    return {
        name.split()[0]: [arm["true_ctr"], arm["true_cvr"], arm["sessions"]]
        for name, arm in shopped["arms"].items()
    }


def counted(demo: dict[str, Any]) -> dict[str, float]:
    """Clicks an item shown and orders a click, of all arms: what the gate counted over what shoppers did.

    Near 1 where the agents applied every event in time; the last cohorts are not mature, so not exactly 1.
    """
    inputs, arms = demo["gate"]["inputs"].values(), demo["sessions"]["trial"]["arms"].values()
    gate = {name: sum(seen[name] for seen in inputs) for name in ("impressions", "clicks", "orders")}
    shop = {name: sum(arm[name] for arm in arms) for name in ("shown", "clicks", "purchases")}
    return {
        "ctr": round(gate["clicks"] * shop["shown"] / (gate["impressions"] * shop["clicks"]), 4),
        "cvr": round(gate["orders"] * shop["clicks"] / (gate["clicks"] * shop["purchases"]), 4),
    }


def described(demo: dict[str, Any]) -> dict[str, Any]:
    """What a demo's JSON says of the demo."""
    second, page, planned = demo["training"]["second"], demo["page"], demo["sessions"]["trial"]["plan"]
    return {
        "seconds": demo["seconds"],
        "stages": {stage["name"]: round(stage["seconds"], 1) for stage in demo["stages"]},
        "verdict": demo["verdict"], "winner": demo["winner"], "sentence": demo["gate"]["sentence"],
        "plan": {name: planned[name] for name in ("users", "users_needed", "power")},
        "users": {name: seen["users"] for name, seen in demo["gate"]["inputs"].items()},
        "counted": counted(demo),
        "pairs": second["pairs"],
        "gate": [
            {name: compared[name] for name in ("target", "control", "verdict")} | figures(compared)
            for compared in demo["gate"]["comparisons"]
        ],
        "shown": shown_truth(demo["sessions"]["trial"]),
        "unanswered": demo["sessions"]["trial"]["unanswered"],
        "answer_changed": page["now"] != page["in_trial"],
    }  # fmt: skip


def truths(rates: dict[str, list[float]], winner: str, margin: float) -> dict[str, Any]:
    """The judged rates, which arm is best in truth, and whether what was decided is right.

    `right`: None where nothing was promoted; `better`: arms that a gate which knows the truth may promote.
    """
    ctr, cvr = rates[CHAMPION]
    better = [arm for arm, (clicks, orders) in rates.items() if orders > cvr and clicks > (1 - margin) * ctr]
    return {
        "truth": rates,
        "better": better,
        "best": max(better, key=lambda arm: rates[arm][1], default=CHAMPION),
        "right": winner in better if winner != CHAMPION else None,
    }


if __name__ == "__main__":
    # Whoever ends the benchmark ends the stack that it runs, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
