"""What benchmarks write: one line of JSON a figure, and tables between marks in the pages for people."""

from __future__ import annotations

import datetime
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def _commit() -> str:
    """The commit of the working tree; "none" outside of a repository."""
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True
    )
    return asked.stdout.strip() or "none"


# Asked for at the start: a run can take longer than the next commit.
COMMIT = _commit()


def line(
    claim: str, dataset: str, model: str, metric: str, value: Any, seed: int, command: str,
    low: float | None = None, high: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One figure, with the commit, the day and the machine."""
    return {
        "claim": claim, "dataset": dataset, "model": model, "metric": metric, "value": value, "low": low,
        "high": high, "seed": seed, "mask": None, "command": command, "commit": COMMIT,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": f"{os.cpu_count()} cores",
    }  # fmt: skip


def share(count: int, of: int) -> dict[str, float]:
    """A share and its exact 95 % interval (Clopper and Pearson 1934), as fields of a line."""
    interval = stats.binomtest(count, of).proportion_ci(0.95, "exact")
    return {
        "value": round(count / of, 4),
        "low": round(float(interval.low), 4),
        "high": round(float(interval.high), 4),
    }


def put_table(page: Path, begin: str, end: str, rows: Sequence[str]) -> None:
    """Put the rows between two marks of a page, in place of what stands there."""
    before, found, rest = page.read_text().partition(begin)
    assert found, f"{page} has no line {begin!r}"
    page.write_text(before + begin + "\n".join(rows) + "\n" + end + rest.partition(end)[2])
