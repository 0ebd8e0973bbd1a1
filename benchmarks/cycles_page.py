"""The figures of cycles that run alone, a line each, and the table that is made of those lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.results import line, markdown_table
from registry.arms import ANCHOR, CHAMPION, DPO, SFT

MARK = "cycles"
DATASET = "UCI Online Retail, simulated shoppers with drift"
_ARMS = (CHAMPION, SFT, DPO, ANCHOR)
_OF_CYCLE = ("verdict", "sentence", "poisoned", "champion's version", "sessions", "seconds")

Line = dict[str, Any]


def figures(rows: Sequence[dict[str, Any]], poison: int | None, command: str, seed: int) -> Iterator[Line]:
    """The lines of a run: what each cycle did, the true rates of its arms, and counts over all cycles."""
    for row in rows:
        values = (
            row["did"], row["sentence"], row["poisoned"], row["champion"], row["sessions"], row["seconds"],
        )  # fmt: skip
        cycle = f"cycle {row['cycle']}"
        for metric, value in zip(_OF_CYCLE, values, strict=True):
            yield line("cycles run unattended", DATASET, cycle, metric, value, seed, command)
        for arm, (ctr, cvr, sessions) in row["true_ctr_cvr_sessions"].items():
            for metric, value in (("true CTR", ctr), ("true CVR", cvr), ("sessions", sessions)):
                yield line("cycles run unattended", DATASET, f"{cycle}, {arm}", metric, value, seed, command)
    counts: list[tuple[str, str, int]] = [
        ("cycles run unattended", "cycles ended by a verdict or a stated refusal", len(rows)),
        ("none", "promotions", sum(row["did"] == "promote" for row in rows)),
    ]
    if poison is not None:
        (poisoned_row,) = (row for row in rows if row["poisoned"])
        stayed = poisoned_row["did"] == "promote" and "rolled_back" not in poisoned_row
        counts.append(
            (
                "a poisoned model is refused or rolled back",
                "poisoned models that stayed in service",
                int(stayed),
            )
        )
    for claim, metric, count in counts:
        yield line(claim, DATASET, "closed loop on the local stack", metric, count, seed, command)


def table(lines: Sequence[Line]) -> list[str]:
    """A row a cycle, with the true CTR and CVR of each arm; then the counts over all cycles."""
    cycles: dict[str, dict[str, Any]] = {}
    counts = []
    for figure in lines:
        cycle, _, arm = figure["model"].partition(", ")
        if cycle.startswith("cycle "):
            cycles.setdefault(cycle, {})[f"{arm} {figure['metric']}".strip()] = figure["value"]
        elif figure["dataset"] == DATASET:
            counts.append([figure["metric"], str(figure["value"])])
    headings = [
        "cycle", "verdict", "champion", *(f"{arm}, true CTR, CVR" for arm in _ARMS), "sessions", "seconds",
    ]  # fmt: skip
    rows = []
    for cycle, values in cycles.items():
        rates = [
            f"{values[f'{arm} true CTR']:.3f}, {values[f'{arm} true CVR']:.3f}"
            if f"{arm} true CTR" in values
            else "-"
            for arm in _ARMS
        ]
        poisoned = ", poisoned" if values["poisoned"] else ""
        rows.append([
            cycle.removeprefix("cycle ") + poisoned, f"{values['verdict']}: {values['sentence']}",
            f"version {values[_OF_CYCLE[3]]}", *rates, f"{values['sessions']:,}", str(values["seconds"]),
        ])  # fmt: skip
    if not rows:
        return []
    return [*markdown_table(headings, rows), "", *markdown_table(["over all cycles", ""], counts)]
