"""Reports of an evaluation: a line of JSON a figure, a table for the screen, and the page of results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.evaluation.results import line, markdown_table, put_table, read_lines, write_lines
from trainer.evaluation.run import BY_SID, NEW_ITEMS, MeasuredRun
from trainer.evaluation.sequences import Float64
from trainer.offline_checks.bootstrap import Interval, differences, intervals, intervals_over_seeds
from trainer.settings import Arithmetic

Line = dict[str, Any]
BEGIN, END = "<!-- table -->\n", "<!-- end -->\n"
# What a table shows beside the model: heading, metric, and how it is written.
_COLUMNS = (
    ("HR@10", "HR@10", ".4f"), ("NDCG@10", "NDCG@10", ".4f"), ("HR@10 by SID", f"HR@10{BY_SID}", ".4f"),
    ("HR@10 new items", f"HR@10{NEW_ITEMS}", ".4f"), ("coverage@10", "coverage@10", ".3f"),
    ("invalid", "invalid rate", ".3f"), ("parameters", "parameters", ",.0f"),
    ("ms/answer", "ms per answer", ".2f"),
)  # fmt: skip
_WITH_INTERVAL = ("HR@10", "NDCG@10", f"HR@10{NEW_ITEMS}")
_HEADINGS = ("model", "ordered by", "mask", "seed", *(column[0] for column in _COLUMNS))


def lines(
    measured: Sequence[MeasuredRun], dataset: str, protocol: str, command: str,
    arithmetic: Arithmetic = "auto",
) -> list[Line]:  # fmt: skip
    """Every figure of the runs; `protocol`: the split, and the shards where there are any.

    `arithmetic`: the setting that the models were trained under.
    """
    return [
        _line(run, dataset, protocol, command, metric, value, arithmetic)
        for run in measured
        for metric, value in _figures(run)
    ]


def compared(
    measured: Sequence[MeasuredRun], against: str, dataset: str, protocol: str, command: str,
    arithmetic: Arithmetic = "auto",
) -> list[Line]:  # fmt: skip
    """The differences of every model's accuracy to that of `against`, over the same users.

    The mean over seeds where there are several, seed by seed; else the one run.
    """
    last = {(run.model, run.mask): run for run in measured}  # the mean comes after the seeds it is of
    change_lines = []
    for (model, mask), run in last.items():
        base = last[against, mask]
        if model == against:
            continue
        shared = [
            metric
            for metric in run.target_metrics
            if metric in base.target_metrics and not np.isnan(run.target_metrics[metric]).any()
        ]
        changes = _changes(_of_seeds(run, shared), _of_seeds(base, shared), run)
        change_lines += [
            _line(run, dataset, protocol, command, f"{metric} minus {against}", value, arithmetic)
            for metric, value in zip(shared, changes, strict=True)
        ]
    return change_lines


def _of_seeds(run: MeasuredRun, metrics: Sequence[str]) -> list[Float64]:
    """The values (B, M) of metrics in each seed of a mean; in the run itself where it is of one."""
    runs = run.seed_runs or (run,)
    return [np.stack([one_run.target_metrics[metric] for metric in metrics], axis=1) for one_run in runs]


def _changes(ours: list[Float64], theirs: list[Float64], run: MeasuredRun) -> list[Interval]:
    """The mean difference of each metric; a model that no seed changes is the same beside every seed."""
    seeds = max(len(ours), len(theirs))
    if seeds == 1:
        return differences(ours[0], theirs[0], run.users)
    ours, theirs = (values * seeds if len(values) == 1 else values for values in (ours, theirs))
    pairs = [after - before for after, before in zip(ours, theirs, strict=True)]
    return intervals_over_seeds(pairs, run.users)


def _line(
    run: MeasuredRun, dataset: str, protocol: str, command: str, metric: str, value: Interval | float,
    arithmetic: Arithmetic,
) -> Line:  # fmt: skip
    low = high = None
    if isinstance(value, Interval):
        value, low, high = value
    fields = {"value": value, "low": low, "high": high}
    rounded = {name: None if part is None else float(f"{part:.5g}") for name, part in fields.items()}
    made = line(f"accuracy, {protocol}", dataset, run.model, metric, seed=run.seed, command=command,
                mask=run.mask, arithmetic=arithmetic, **rounded)  # fmt: skip
    return made | {"head": run.head}


def _figures(run: MeasuredRun) -> Iterator[tuple[str, Interval | float]]:
    """Every figure of a run: those of targets with intervals, by the rows that they are of."""
    groups: dict[bytes, list[str]] = {}
    for metric, values in run.target_metrics.items():
        groups.setdefault(np.isnan(values).tobytes(), []).append(metric)
    for metrics in groups.values():
        has_value = ~np.isnan(run.target_metrics[metrics[0]])
        figures = [values[has_value] for values in _of_seeds(run, metrics)]
        if len(figures) == 1:
            accuracies = intervals(figures[0], run.users[has_value])
        else:
            # The metrics are shares, gains and entropies: none is below 0, whatever so few seeds leave open.
            accuracies = [
                figure._replace(low=max(figure.low, 0.0))
                for figure in intervals_over_seeds(figures, run.users[has_value])
            ]
        yield from zip(metrics, accuracies, strict=True)
        rest = metrics[0].partition(",")[2].strip()
        yield f"targets, {rest}" if rest else "targets", float(has_value.sum())
    yield from run.run_metrics.items()


def table(rows: Sequence[Line]) -> list[list[str]]:
    """Lines -> cells: the headings, then a row for each model and mask; the mean stands for its seeds."""
    runs: dict[tuple[str, str, str | None], dict[int | None, dict[str, Line]]] = {}
    for row in rows:
        by_seed = runs.setdefault((row["model"], row["head"], row["mask"]), {})
        by_seed.setdefault(row["seed"], {})[row["metric"]] = row
    cells = [list(_HEADINGS)]
    for (model, head, mask), by_seed in runs.items():
        seed = None if None in by_seed else next(iter(by_seed))
        seed_text = str(seed) if seed is not None else f"mean of {len(by_seed) - 1}"
        # What was measured with one seed only, such as a cost, stands beside the means of the others.
        shown_lines = next(iter(by_seed.values())) | by_seed[seed]
        cells.append(
            [
                model,
                head,
                mask or "",
                seed_text,
                *(_cell(shown_lines.get(metric), form) for _, metric, form in _COLUMNS),
            ]
        )
    filled = [n for n, heading in enumerate(_HEADINGS) if n < 4 or any(row[n] for row in cells[1:])]
    return [[row[n] for n in filled] for row in cells]


def _cell(row: Line | None, form: str) -> str:
    if row is None or row["value"] is None or math.isnan(row["value"]):
        return ""
    text = format(row["value"], form)
    if row["low"] is not None and row["metric"] in _WITH_INTERVAL:
        text += f" ({format(row['low'], form)} to {format(row['high'], form)})"
    return text


def as_text(cells: Sequence[Sequence[str]]) -> str:
    """Cells in columns of one width each."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def publish(rows: Sequence[Line], folder: Path) -> None:
    """Put the figures into `evaluation.jsonl` and the table of `evaluation.md` in `folder`.

    They take the place of what was there for the same data set, protocol, model and mask; the rest stays.
    """

    def run_of(row: Line) -> tuple[str, str, str, str]:
        return row["dataset"], row["claim"], row["model"], row["mask"]

    page, file = folder / "evaluation.md", folder / "evaluation.jsonl"
    replaced = {run_of(row) for row in rows}
    other_lines = [row for row in read_lines(file) if run_of(row) not in replaced]
    all_lines = sorted([*other_lines, *rows], key=lambda row: run_of(row)[:2])
    put_table(page, BEGIN, END, page_rows(all_lines))
    write_lines(file, all_lines)


def page_rows(lines: Sequence[Line]) -> list[str]:
    """What stands between the page's marks: a table for each data set and protocol."""
    chapters: dict[tuple[str, str], list[Line]] = {}
    for row in lines:
        chapters.setdefault((row["dataset"], row["claim"]), []).append(row)
    text: list[str] = []
    for (dataset, claim), of_chapter in chapters.items():
        about = f"**{dataset}**, {claim.partition(', ')[2]}"
        headings, *cells = table(of_chapter)
        text += [about, "", *markdown_table(headings, cells), ""]
    return text
