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

from benchmarks.lineage_shop import LineageShop
from benchmarks.results import RESULTS, line, markdown_table, put_table, read_lines, write_lines
from sidstream.commands.train import set_thread_environment
from trainer.settings import TrainerSettings

BEGIN, END = "<!-- lineages -->\n", "<!-- end of lineages -->\n"


def main() -> None:
    """Run both lineages with every seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--first-seconds", type=float, default=60.0, help="training of the first model")
    parser.add_argument("--seconds", type=float, default=20.0, help="fine-tuning in later cycles")
    parser.add_argument("--set", action="append", default=[], help="of trainer.dpo, for example lr=0.0002")
    parser.add_argument("--lineage", choices=("aligned", "sft"), help="only this one")
    parser.add_argument(
        "--out",
        type=Path,
        help="append a line of JSON a cycle to this file; lineages that it has are not run",
    )
    parser.add_argument("--publish", action="store_true", help="put the table into docs/results")
    options = parser.parse_args()
    if options.publish and options.set:
        parser.error("the table is of the default settings: leave out --set, or --publish")
    set_thread_environment()
    dpo = {
        name: json.loads(value)
        for name, _, value in (assignment.partition("=") for assignment in options.set)
    }
    settings = TrainerSettings.model_validate({"dpo": dpo, "beat_popularity": False})
    earlier_rows = read_lines(options.out) if options.out else []
    rows = []
    for seed in options.seeds:
        for lineage in ("aligned", "sft"):
            if options.lineage in (None, lineage):
                finished_rows = [
                    row for row in earlier_rows if (row["seed"], row["lineage"]) == (seed, lineage)
                ]
                done = len(finished_rows) == options.cycles + 1
                rows += finished_rows if done else run_lineage(seed, lineage, settings, options)
    if options.publish:
        command = "python -m benchmarks.lineages --seeds " + " ".join(map(str, options.seeds))
        publish(rows, command, RESULTS)


def run_lineage(
    seed: int, lineage: str, settings: TrainerSettings, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One lineage's cycles."""
    began = time.monotonic()
    shop = LineageShop(seed, lineage == "aligned", settings, lambda text: print(f"  {text}", file=sys.stderr))
    rows = []
    for number in range(options.cycles + 1):
        seconds = options.seconds if number else options.first_seconds
        row = {"seed": seed, "lineage": lineage, "cycle": number} | shop.cycle(seconds)
        row["seconds"] = round(time.monotonic() - began)
        print(json.dumps(row), flush=True)
        if options.out:
            with options.out.open("a") as out:
                out.write(json.dumps(row) + "\n")
        rows.append(row)
    return rows


def publish(rows: list[dict[str, Any]], command: str, folder: Path) -> None:
    """The last cycle's rates of both lineages, seed by seed, and what the first gained."""
    last: dict[tuple[int, str], dict[str, Any]] = {(row["seed"], row["lineage"]): row for row in rows}
    promotions: dict[tuple[int, str], int] = defaultdict(int)
    for row in rows:
        promotions[row["seed"], row["lineage"]] += row["did"] == "promote"
    gains = []
    lines = []
    changes: dict[str, list[float]] = defaultdict(list)
    for seed in sorted({row["seed"] for row in rows}):
        aligned, sft_only = last[seed, "aligned"], last[seed, "sft"]
        cells = [f"{promotions[seed, 'aligned']}, {promotions[seed, 'sft']}"]
        for rate in ("cvr", "ctr"):
            change = aligned[rate] / sft_only[rate] - 1
            changes[rate].append(change)
            cells += [f"{aligned[rate]:.4f} against {sft_only[rate]:.4f}", f"{change:+.1%}"]
            lines.append(line(
                "an aligned lineage gains conversion and keeps clicks",
                "UCI Online Retail, simulated shoppers",
                "aligned lineage over SFT alone",
                f"true {rate.upper()}, relative change after the last cycle",
                round(change, 4), seed, command,
            ) | {"aligned": aligned[rate], "sft": sft_only[rate]})  # fmt: skip
        gains.append([str(seed), *cells])
    mean = {rate: f"{np.mean(values):+.1%}" for rate, values in changes.items()}
    gains.append(["mean", "", "", mean["cvr"], "", mean["ctr"]])
    table = markdown_table(
        ["seed", "promotions, aligned and SFT alone", "true CVR", "change", "true CTR", "change"], gains
    )
    cycles = max(row["cycle"] for row in rows) + 1
    table += ["", "CTR and CVR of the champions, aligned and SFT alone, cycle by cycle:", ""]
    seeds = sorted({row["seed"] for row in rows})
    row_of_cycle = {(row["seed"], row["lineage"], row["cycle"]): row for row in rows}
    headings = [f"seed {seed}, {name}" for seed in seeds for name in ("aligned", "SFT alone")]
    by_cycle = [
        [
            str(cycle),
            *(_cell(row_of_cycle[seed, name, cycle]) for seed in seeds for name in ("aligned", "sft")),
        ]
        for cycle in range(cycles)
    ]
    table += markdown_table(["cycle", *headings], by_cycle)
    write_lines(folder / "lineages.jsonl", lines)
    put_table(folder / "lineages.md", BEGIN, END, table)


def _cell(row: dict[str, Any]) -> str:
    promoted = " (promoted)" if row["did"] == "promote" else ""
    return f"{row['ctr']:.4f}, {row['cvr']:.4f}{promoted}"


if __name__ == "__main__":
    main()
