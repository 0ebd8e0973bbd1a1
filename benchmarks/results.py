"""What benchmarks write: the lines and tables of every measurement, and the interval of a share."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from registry.bundles.code_version import commit
from trainer.evaluation.results import (
    RESULTS,
    line,
    markdown_table,
    put_table,
    read_lines,
    write_lines,
)
from trainer.evaluation.sequences import Float64

__all__ = [
    "COMMIT", "RESULTS", "add_data_option", "exact_share", "line", "markdown_table", "mean_line",
    "publish_shares", "put_table", "read_lines", "report_progress", "write_lines",
]  # fmt: skip

COMMIT = commit()


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Add --data, the folder of the data sets that do not ship; the environment's where it is not given."""
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("SIDSTREAM_DATA"),
        help="folder of the data sets; default: SIDSTREAM_DATA",
    )  # fmt: skip


def exact_share(count: int, of: int) -> dict[str, Any]:
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
    write_lines(RESULTS / f"{name}.jsonl", rows)
    table = markdown_table(
        [*columns, "share", "95 % interval", "claim"],
        [
            [*cells(row), f"{row['value']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", row["claim"]]
            for row in rows
        ],
    )
    put_table(RESULTS / f"{name}.md", "<!-- table -->\n", "<!-- end -->\n", table)


def report_progress(text: str) -> None:
    """Print a line of progress to standard error: standard output has the figures."""
    print(text, file=sys.stderr, flush=True)


def mean_line(
    claim: str, dataset: str, model: str, metric: str, values: Float64, seed: int, command: str,
    mask: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The line of the mean of values (N,), with its 95 % interval by their standard deviation."""
    mean, error = float(values.mean()), float(values.std()) / math.sqrt(len(values))
    return line(
        claim, dataset, model, metric, round(mean, 4), seed, command,
        round(mean - 1.96 * error, 4), round(mean + 1.96 * error, 4), mask,
    )  # fmt: skip
