"""How measurements are published: one line of JSON a figure, and tables between marks in Markdown pages."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from registry.bundles.code_version import commit
from streams.errors import SidstreamError
from trainer.settings import Arithmetic

# Only a checkout has it; an installed package has no pages.
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


@cache
def _processor() -> str:
    """The processor's own name; the kind of machine where it has none."""
    try:
        cpu_info = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        cpu_info = []
    names = [text.partition(":")[2].strip() for text in cpu_info if text.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def machine(arithmetic: Arithmetic = "auto") -> str:
    """What a figure was measured on: processor, cores, and how torch computes there, where it is installed.

    That is the GPU where there is one, the widest vector instructions, the threads, and the type of matrix
    products in training under that setting. All of them change what is learned in its last digits.
    """
    about = [_processor(), f"{os.cpu_count()} cores"]
    try:
        import torch

        from trainer.tuning.devices import device, resolved_arithmetic
    except ModuleNotFoundError:
        return ", ".join(about)
    where = device()
    if where.type == "cuda":
        about.append(torch.cuda.get_device_name())
    about += [torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads"]
    return ", ".join([*about, resolved_arithmetic(arithmetic, where)])


def line(
    claim: str, dataset: str, model: str, metric: str, value: Any, seed: int | None, command: str,
    low: float | None = None, high: float | None = None, mask: str | None = None,
    arithmetic: Arithmetic = "auto",
) -> dict[str, Any]:  # fmt: skip
    """One figure, with the commit, the day and the machine; `arithmetic`: the setting of its trainings."""
    return {
        "claim": claim, "dataset": dataset, "model": model, "metric": metric, "value": value, "low": low,
        "high": high, "seed": seed, "mask": mask, "command": command, "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": machine(arithmetic),
    }  # fmt: skip


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none where there is no file."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write the lines in place of the file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [_cells(headings), "|" + "---|" * len(headings), *map(_cells, rows)]


def _cells(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"


def put_table(page: Path, begin: str, end: str, rows: Sequence[str]) -> None:
    """Put the rows between two marks of a page, in place of what stands there.

    Raises SidstreamError where the page or its first mark is not there.
    """
    text = page.read_text() if page.is_file() else ""
    before, mark, rest = text.partition(begin)
    if not mark:
        raise SidstreamError(f"{page} has no line {begin.strip()!r}: a table is published in a checkout only")
    page.write_text(before + begin + "\n".join(rows) + "\n" + end + rest.partition(end)[2])
