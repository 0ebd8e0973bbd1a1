"""What benchmarks write: the lines and tables of every measurement, and the interval of a share."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from trainer.evaluation.results import RESULTS, commit, line, put_table

__all__ = ["COMMIT", "RESULTS", "asks_for_data", "line", "publish_shares", "put_table", "share"]

COMMIT = commit()


def asks_for_data(asked: argparse.ArgumentParser) -> None:
    """Add --data, the folder of the data sets that do not ship; the environment's where it is not given."""
    asked.add_argument(
        "--data", type=Path, default=os.environ.get("SIDSTREAM_DATA"),
        help="folder of the data sets; default: SIDSTREAM_DATA",
    )  # fmt: skip


def share(count: int, of: int) -> dict[str, Any]:
    """A share and its exact 95 % interval (Clopper and Pearson 1934), as fields of a line."""
    interval = stats.binomtest(count, of).proportion_ci(0.95, "exact")
    return {
        "value": round(count / of, 4),
        "low": round(float(interval.low), 4),
        "high": round(float(interval.high), 4),
    }


def publish_shares(
    name: str, rows: Sequence[dict[str, Any]], columns: Sequence[str],
    cells: Callable[[dict[str, Any]], Sequence[str]],
) -> None:  # fmt: skip
    """Write the lines of shares to `name`.jsonl, and their table into `name`.md for people.

    `columns` and `cells(row)` come before the share, its interval and the claim.
    """
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = [_cells([*columns, "share", "95 % interval", "claim"]), "|" + "---|" * (len(columns) + 3)]
    for row in rows:
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        table.append(_cells([*cells(row), f"{row['value']:.3f}", interval, row["claim"]]))
    put_table(RESULTS / f"{name}.md", "<!-- table -->\n", "<!-- end -->\n", table)


def _cells(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"
