"""The page of speeds: a line of JSON for each figure of a benchmark, and one table of them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.results import RESULTS, line, markdown_table, put_table, read_lines, write_lines

BEGIN, END = "<!-- speed -->\n", "<!-- end of speed -->\n"


def publish(claim: str, dataset: str, module: str, figures: Mapping[str, Any]) -> None:
    """Put the figures of `python -m module` in place of its earlier ones, and renew the page's table."""
    command = f"python -m {module} --publish"
    file = RESULTS / "speed.jsonl"
    lines = [row for row in read_lines(file) if row["command"] != command]
    lines += [line(claim, dataset, module, metric, value, None, command) for metric, value in figures.items()]
    write_lines(file, lines)
    put_table(RESULTS / "speed.md", BEGIN, END, table(lines))


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A row a figure."""
    if not lines:
        return []
    rows = [[row["claim"], row["metric"], str(row["value"]), row["machine"]] for row in lines]
    return markdown_table(["claim", "figure", "value", "machine"], rows)
