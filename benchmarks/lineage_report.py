"""The lines and tables of `benchmarks.lineages`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.results import line, markdown_table, put_table, write_lines
from trainer.offline_checks.bootstrap import Interval, mean_over_seeds

BEGIN, END = "<!-- lineages -->\n", "<!-- end of lineages -->\n"
CLAIM = "a closed loop that aligns sells more than one that fine-tunes alone, or counts"
METRICS = {"cvr": "true CVR", "orders": "true orders a page", "ctr": "true CTR"}
# What is compared with what: every variant with SFT alone, and alignment with what counts.
ALONE, ALIGNED, COUNTED = "sft", "softmax_dpo", "rates"
SHOPS = {
    "title": "What is bought is a function of the title",
    "taste": "What is bought is each shopper's own taste",
}
Rows = Iterable[dict[str, Any]]


class Lineage(NamedTuple):
    """One shop: what items are worth to its buyers, what it tries, and its seed."""

    value: str
    variant: str
    seed: int


def relative_change(ours: dict[int, float], theirs: dict[int, float]) -> Interval:
    """The mean relative change over the seeds that both have, by t over the seeds' log ratios.

    The mean is the geometric one of the ratios, less 1. NaN bounds where there is one seed alone.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    logs = np.log([[ours[seed] / theirs[seed]] for seed in seeds])
    if len(seeds) < 2:
        return Interval(float(np.expm1(logs.mean())), float("nan"), float("nan"))
    return Interval(*(float(np.expm1(bound)) for bound in mean_over_seeds(logs)[0]))


def lines_of(rows: Rows, command: str) -> list[dict[str, Any]]:
    """The last cycle's true rates of each lineage, its promotions, and the changes over the seeds."""
    last: dict[Lineage, dict[str, Any]] = {}
    promotions: Counter[Lineage] = Counter()
    for row in rows:
        lineage = Lineage(row["value"], row["variant"], row["seed"])
        promotions[lineage] += row["did"] == "promote"
        if lineage not in last or row["cycle"] > last[lineage]["cycle"]:
            last[lineage] = row
    rates = [
        line(CLAIM, _dataset(lineage.value), lineage.variant, name, row[metric], lineage.seed, command)
        | {"cycles": row["cycle"], "promotions": promotions[lineage]}
        for lineage, row in sorted(last.items())
        for metric, name in METRICS.items()
    ]
    return rates + _changes(last, command)


def _changes(last: Mapping[Lineage, dict[str, Any]], command: str) -> list[dict[str, Any]]:
    """Of each metric, in each kind of shop: every variant over SFT alone, and alignment over counting."""
    variants = dict.fromkeys(lineage.variant for lineage in last)
    pairs = [(name, ALONE) for name in variants if name != ALONE] + [(ALIGNED, COUNTED)]
    result = []
    for value, (ours, theirs), (metric, name) in product(SHOPS, pairs, METRICS.items()):
        after, before = (
            {of.seed: row[metric] for of, row in last.items() if (of.value, of.variant) == (value, model)}
            for model in (ours, theirs)
        )
        if not after.keys() & before.keys():
            continue
        change = relative_change(after, before)
        low, high = (None if np.isnan(bound) else round(bound, 4) for bound in change[1:])
        figure = line(
            CLAIM, _dataset(value), ours, f"{name}, change over {theirs}", round(change.value, 4), None,
            command, low, high,
        )  # fmt: skip
        result.append(figure | {"seeds": len(after.keys() & before.keys())})
    return result


def tables_of(lines: Rows) -> list[str]:
    """For each kind of shop the changes of every variant over SFT alone, and of alignment over counting."""
    lines = list(lines)
    text: list[str] = []
    for value, heading in SHOPS.items():
        own = [figure for figure in lines if figure["dataset"] == _dataset(value)]
        models = list(dict.fromkeys(figure["model"] for figure in own))
        if not models:
            continue
        table = []
        for model in sorted(models, key=lambda model: (model != ALONE, model)):
            cells = [_mean(own, model, "promotions")]
            for name in METRICS.values():
                mean = _mean(own, model, name)
                cells.append(f"{mean} {_change(own, model, f'{name}, change over {ALONE}')}".strip())
            seeds = len({figure["seed"] for figure in own if figure["model"] == model} - {None})
            table.append([model, str(seeds), *cells])
        text += [
            f"## {heading}",
            "",
            *markdown_table(["variant", "seeds", "promotions", *METRICS.values()], table),
        ]
        against = [_change(own, ALIGNED, f"{name}, change over {COUNTED}") for name in METRICS.values()]
        if all(against):
            named = ", ".join(
                f"{name} {change}" for name, change in zip(METRICS.values(), against, strict=True)
            )
            text += ["", f"`{ALIGNED}` over `{COUNTED}`: {named}.", ""]
    return text


def publish(rows: Rows, command: str, folder: Path) -> None:
    """Write the lines, and the tables into the page."""
    lines = lines_of(rows, command)
    write_lines(folder / "lineages.jsonl", lines)
    put_table(folder / "lineages.md", BEGIN, END, tables_of(lines))


def _dataset(value: str) -> str:
    return f"UCI Online Retail, simulated shoppers, value by {value}"


def _mean(lines: Rows, model: str, name: str) -> str:
    """The mean of a metric over the seeds, or of the lineages' promotions."""
    own = [figure for figure in lines if figure["model"] == model and figure["seed"] is not None]
    if name == "promotions":
        return f"{np.mean([figure['promotions'] for figure in own]):.1f}"
    return f"{np.mean([figure['value'] for figure in own if figure['metric'] == name]):.4f}"


def _change(lines: Rows, model: str, metric: str) -> str:
    """A change with its interval; empty where there is none."""
    for figure in lines:
        if figure["model"] == model and figure["metric"] == metric:
            if figure["low"] is None:
                return f"({figure['value']:+.1%})"
            return f"({figure['value']:+.1%}, {figure['low']:+.1%} to {figure['high']:+.1%})"
    return ""
