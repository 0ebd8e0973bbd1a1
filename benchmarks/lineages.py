"""Claim: ten cycles of an aligned lineage end with more conversion than ten of SFT alone, and as many clicks.

    python -m benchmarks.lineages --seeds 1 2 3 --publish

Two shops with the same shoppers, whose true chances are known and whose tastes turn by about 12 degrees a
cycle. In each, ten times: train from the champion on what was clicked and bought, put the candidates on
trial, let the gate judge, promote or not. One shop's cycles make a fine-tuned and an aligned candidate, the
other's a fine-tuned one alone. Training, pairs, ranking and the gate are the product's own functions; Kafka,
Redis, MLflow and the serving process are left out, so that three seeds take an hour and not two days
(`benchmarks.cycles` runs the whole stack). After each cycle the champion is judged by the true chances of
what it shows to 2,000 shoppers, without the noise of clicks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lineage_shop import Shop
from benchmarks.results import RESULTS, line, put_table
from sidstream.commands.train import set_thread_environment
from trainer.settings import TrainerSettings

BEGIN, END = "<!-- lineages -->\n", "<!-- end of lineages -->\n"


def main() -> None:
    """Run both lineages with every seed."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    asked.add_argument("--cycles", type=int, default=10)
    asked.add_argument("--first-seconds", type=float, default=60.0, help="training of the first model")
    asked.add_argument("--seconds", type=float, default=20.0, help="fine-tuning in later cycles")
    asked.add_argument("--set", action="append", default=[], help="of trainer.dpo, for example lr=0.0002")
    asked.add_argument("--lineage", choices=("aligned", "sft"), help="only this one")
    asked.add_argument(
        "--out",
        type=Path,
        help="append a line of JSON a cycle to this file; lineages that it has are not run",
    )
    asked.add_argument("--publish", action="store_true", help="put the table into docs/results")
    given = asked.parse_args()
    if given.publish and given.set:
        asked.error("the table is of the default settings: leave out --set, or --publish")
    set_thread_environment()
    dpo = {name: json.loads(value) for name, _, value in (one.partition("=") for one in given.set)}
    settings = TrainerSettings.model_validate({"dpo": dpo, "beat_popularity": False})
    before = _read(given.out) if given.out else []
    rows = []
    for seed in given.seeds:
        for lineage in ("aligned", "sft"):
            if given.lineage in (None, lineage):
                there = [row for row in before if (row["seed"], row["lineage"]) == (seed, lineage)]
                done = len(there) == given.cycles + 1
                rows += there if done else run(seed, lineage, settings, given)
    if given.publish:
        command = "python -m benchmarks.lineages --seeds " + " ".join(map(str, given.seeds))
        publish(rows, command, RESULTS)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def run(
    seed: int, lineage: str, settings: TrainerSettings, given: argparse.Namespace
) -> list[dict[str, Any]]:
    """One lineage's cycles."""
    began = time.monotonic()
    shop = Shop(seed, lineage == "aligned", settings, lambda text: print(f"  {text}", file=sys.stderr))
    rows = []
    for number in range(given.cycles + 1):
        seconds = given.seconds if number else given.first_seconds
        row = {"seed": seed, "lineage": lineage, "cycle": number} | shop.cycle(seconds)
        row["seconds"] = round(time.monotonic() - began)
        print(json.dumps(row), flush=True)
        if given.out:
            with given.out.open("a") as out:
                out.write(json.dumps(row) + "\n")
        rows.append(row)
    return rows


def publish(rows: list[dict[str, Any]], command: str, folder: Path) -> None:
    """The last cycle's rates of both lineages, seed by seed, and what the first gained."""
    last: dict[tuple[int, str], dict[str, Any]] = {(row["seed"], row["lineage"]): row for row in rows}
    promotions: dict[tuple[int, str], int] = defaultdict(int)
    for row in rows:
        promotions[row["seed"], row["lineage"]] += row["did"] == "promote"
    table = [
        "| seed | promotions, aligned and SFT alone | true CVR | change | true CTR | change |",
        "|---|---|---|---|---|---|",
    ]
    lines = []
    changes: dict[str, list[float]] = defaultdict(list)
    for seed in sorted({row["seed"] for row in rows}):
        ours, theirs = last[seed, "aligned"], last[seed, "sft"]
        cells = [f"{promotions[seed, 'aligned']}, {promotions[seed, 'sft']}"]
        for rate in ("cvr", "ctr"):
            change = ours[rate] / theirs[rate] - 1
            changes[rate].append(change)
            cells += [f"{ours[rate]:.4f} against {theirs[rate]:.4f}", f"{change:+.1%}"]
            lines.append(line(
                "an aligned lineage gains conversion and keeps clicks",
                "UCI Online Retail, simulated shoppers",
                "aligned lineage over SFT alone",
                f"true {rate.upper()}, relative change after the last cycle",
                round(change, 4), seed, command,
            ) | {"aligned": ours[rate], "sft": theirs[rate]})  # fmt: skip
        table.append(f"| {seed} | {' | '.join(cells)} |")
    mean = {rate: f"{np.mean(some):+.1%}" for rate, some in changes.items()}
    table.append(f"| mean | | | {mean['cvr']} | | {mean['ctr']} |")
    cycles = max(row["cycle"] for row in rows) + 1
    table += ["", "CTR and CVR of the champions, aligned and SFT alone, cycle by cycle:", ""]
    seeds = sorted({row["seed"] for row in rows})
    table += ["| cycle |" + "".join(f" seed {seed}, aligned | seed {seed}, SFT alone |" for seed in seeds)]
    table += ["|---|" + "---|---|" * len(seeds)]
    of = {(row["seed"], row["lineage"], row["cycle"]): row for row in rows}
    for cycle in range(cycles):
        found = [of[seed, lineage, cycle] for seed in seeds for lineage in ("aligned", "sft")]
        table.append(f"| {cycle} | {' | '.join(map(_cell, found))} |")
    (folder / "lineages.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    put_table(folder / "lineages.md", BEGIN, END, table)


def _cell(row: dict[str, Any]) -> str:
    promoted = " (promoted)" if row["did"] == "promote" else ""
    return f"{row['ctr']:.4f}, {row['cvr']:.4f}{promoted}"


if __name__ == "__main__":
    main()
