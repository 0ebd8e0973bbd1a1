"""What benchmarks write: the lines and tables of every measurement, and the interval of a share."""

from __future__ import annotations

from scipy import stats

from trainer.evaluation.results import RESULTS, commit, line, put_table

__all__ = ["COMMIT", "RESULTS", "line", "put_table", "share"]

COMMIT = commit()


def share(count: int, of: int) -> dict[str, float]:
    """A share and its exact 95 % interval (Clopper and Pearson 1934), as fields of a line."""
    interval = stats.binomtest(count, of).proportion_ci(0.95, "exact")
    return {
        "value": round(count / of, 4),
        "low": round(float(interval.low), 4),
        "high": round(float(interval.high), 4),
    }
