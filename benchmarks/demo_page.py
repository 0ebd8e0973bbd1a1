"""The page of the demo over seeds: a line a figure, and the tables that are made of those lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import exact_share, line, markdown_table, put_table, write_lines
from registry.arms import CHAMPION, DPO, SFT
from trainer.offline_checks.bootstrap import mean_over_seeds

BEGIN, END = "<!-- seeds -->\n", "<!-- end of seeds -->\n"
COMMAND = "python -m benchmarks.demo_seeds"
DATASET = "UCI Online Retail, simulated shoppers"
_COMPARISONS = ((DPO, SFT), (DPO, CHAMPION), (SFT, CHAMPION))
_SHARE_METRICS = (
    "demos that ended", "aligned challenger promoted", "promotions that are right",
    "null trials that promote",
)  # fmt: skip

Line = dict[str, Any]


def publish(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """One line a figure into demo.jsonl, and the tables into demo.md."""
    seeds = " ".join(str(row["seed"]) for row in rows)
    command = f"{COMMAND} --seeds {seeds} --out FILE --publish"
    lines = [figure for row in rows for figure in _lines_of_seed(row, command)]
    lines += _lines_over_seeds(rows, command)
    write_lines(folder / "demo.jsonl", lines)
    put_table(folder / "demo.md", BEGIN, END, tables(lines))


def _lines_of_seed(row: dict[str, Any], command: str) -> list[Line]:
    claim = "the demo promotes what is better in truth"
    if row["failed"]:
        figures: list[tuple[str, Any]] = [("failed", row["failed"])]
    else:
        null = row["null"]["figures"]["cvr"] or {}
        figures = [
            ("seconds", row["seconds"]), ("verdict", row["verdict"]), ("winner", row["winner"]),
            ("the promoted arm is better in truth", row["right"]), ("best arm in truth", row["best"]),
            *((f"true CTR, {arm}", rates[0]) for arm, rates in row["truth"].items()),
            *((f"true CVR, {arm}", rates[1]) for arm, rates in row["truth"].items()),
            *((f"CVR, p of {compared['target']} above {compared['control']}",
               (compared["cvr"] or {}).get("p_above"))
              for compared in row["gate"]),
            ("null trial, verdict", row["null"]["compared"]), ("null trial, CVR, p", null.get("p_above")),
        ]  # fmt: skip
    return [line(claim, DATASET, "sidstream demo", metric, value, row["seed"], command)
            for metric, value in figures]  # fmt: skip


def _true_changes(truth: Mapping[str, Sequence[float]], arm: str) -> dict[str, float]:
    """What an arm's model truly changes over the champion's: CTR, CVR and orders a page.

    `truth`: CTR and CVR of each arm. All pages have as many items, so that orders a page change as CTR times
    CVR does.
    """
    ctr, cvr = (truth[arm][n] / truth[CHAMPION][n] for n in range(2))
    changes = {"CTR": ctr - 1, "CVR": cvr - 1, "orders a page": ctr * cvr - 1}
    return {name: round(change, 4) for name, change in changes.items()}


def _lines_over_seeds(rows: Sequence[dict[str, Any]], command: str) -> list[Line]:
    """The shares of all seeds with their exact intervals, and the means of what was promoted."""
    ended = [row for row in rows if not row["failed"]]
    promoted = [row for row in ended if row["winner"] != CHAMPION]
    counted = [
        ("the demo ends", _SHARE_METRICS[0], len(ended), len(rows)),
        ("the aligned challenger typically wins", _SHARE_METRICS[1],
         sum(row["winner"] == DPO for row in ended), len(ended)),
        ("the demo promotes what is better in truth", _SHARE_METRICS[2],
         sum(bool(row["right"]) for row in promoted), len(promoted)),
        ("a null challenger is promoted once in twenty times at most", _SHARE_METRICS[3],
         sum(row["null"]["compared"] == "promote" for row in ended), len(ended)),
    ]  # fmt: skip
    lines = [
        line(claim, DATASET, "sidstream demo", metric, share["value"], None, command) | share
        for claim, metric, count, of in counted if of
        for share in (exact_share(count, of),)
    ]  # fmt: skip
    if ended:
        seconds = float(np.mean([row["seconds"] for row in ended]))
        lines.append(
            line(
                "the demo ends", DATASET, "sidstream demo", "seconds, mean", round(seconds, 1), None, command
            )
        )
    if len(promoted) > 1:
        changes = [_true_changes(row["truth"], row["winner"]) for row in promoted]
        means = mean_over_seeds(np.array([list(change.values()) for change in changes]))
        lines += [
            line(
                "the demo promotes what is better in truth", DATASET, "sidstream demo",
                f"true change of {name}, promoted model, mean", round(mean.value, 4), None, command,
                round(mean.low, 4), round(mean.high, 4),
            )
            for name, mean in zip(changes[0], means, strict=True)
        ]  # fmt: skip
    return lines


def tables(lines: Sequence[Line]) -> list[str]:
    """Lines of Markdown: one seed a row, then what was promoted, then the shares."""
    headings = [
        "seed", "seconds", "verdict", "true CVR over the champion's, aligned", "true CTR",
        "true orders a page", "true CVR, fine-tuned", "right", "p of CVR, by comparison", "null trial",
    ]  # fmt: skip
    by_seed: dict[int | None, dict[str, Line]] = {}
    for figure in lines:
        by_seed.setdefault(figure["seed"], {})[figure["metric"]] = figure
    over_seeds = by_seed.pop(None, {})
    rows = [_row_of_seed(seed, {name: figure["value"] for name, figure in figures.items()}, len(headings))
            for seed, figures in by_seed.items()]  # fmt: skip
    if "seconds, mean" in over_seeds:
        rows.append(["mean", f"{over_seeds['seconds, mean']['value']:.0f}", *[""] * (len(headings) - 2)])
    page = markdown_table(headings, rows)
    means = [figure for name, figure in over_seeds.items() if name.startswith("true change of")]
    if means:
        page += ["", *markdown_table(
            ["what a promotion truly brought", "mean over seeds", "95 % interval over seeds"],
            [[figure["metric"].removeprefix("true change of ").partition(",")[0], f"{figure['value']:+.1%}",
              f"{figure['low']:+.1%} to {figure['high']:+.1%}"] for figure in means],
        )]  # fmt: skip
    shares = [over_seeds[metric] for metric in _SHARE_METRICS if metric in over_seeds]
    page += ["", *markdown_table(
        ["", "share", "95 % interval"],
        [[share["metric"], f"{share['value']:.2f}", f"{share['low']:.2f} to {share['high']:.2f}"]
         for share in shares],
    )]  # fmt: skip
    return page


def _row_of_seed(seed: int | None, values: dict[str, Any], width: int) -> list[str]:
    if "failed" in values:
        return [str(seed), "", f"failed: {values['failed']}", *[""] * (width - 3)]
    winner = values["winner"]
    p_values = [
        _p(values[name])
        for target, control in _COMPARISONS
        if (name := f"CVR, p of {target} above {control}") in values
    ]
    truth = {
        arm: (values[f"true CTR, {arm}"], values[f"true CVR, {arm}"])
        for arm in (CHAMPION, SFT, DPO)
        if f"true CTR, {arm}" in values
    }
    changes = [(DPO, name) for name in ("CVR", "CTR", "orders a page")] + [(SFT, "CVR")]
    return [
        str(seed), f"{values['seconds']:.0f}",
        values["verdict"] + (f" {winner}" if winner != CHAMPION else ""),
        *(f"{_true_changes(truth, arm)[name]:+.1%}" if arm in truth else "" for arm, name in changes),
        {True: "yes", False: "no", None: ""}[values["the promoted arm is better in truth"]],
        ", ".join(p_values), f"{values['null trial, verdict']}, p {_p(values['null trial, CVR, p'])}",
    ]  # fmt: skip


def _p(p_value: float | None) -> str:
    return "none" if p_value is None else f"{p_value:.2g}"
