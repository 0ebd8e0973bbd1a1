"""The page of figures that others published, beside which ours are read: a line each, with its source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.results import markdown_table


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A row a model and data set."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for figure in lines:
        row = rows.setdefault((figure["dataset"], figure["model"]), dict(figure))
        row[figure["metric"]] = f"{figure['value']:.4f}"
    return markdown_table(
        ["data set", "model", "mask", "HR@10", "NDCG@10", "source"],
        [
            [row["dataset"], row["model"], row["mask"], row.get("HR@10", ""), row.get("NDCG@10", ""),
             f"<{row['source']}>"]
            for row in rows.values()
        ],
    )  # fmt: skip
