"""Figures of docs/results come from their lines of JSON: tables are made of them, sentences quote them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest

from benchmarks import (
    ablations,
    alignment,
    cycles_page,
    demo_page,
    gate,
    holdout,
    lineage_report,
    position_bias,
    promoters,
    published_page,
    ratchet,
    rewards,
    speed_page,
    tasks,
    tuning,
)
from benchmarks.results import RESULTS, read_lines, share_table
from trainer.evaluation import report

Line = dict[str, Any]
Table = Callable[[Sequence[Line]], Sequence[str]]

PAGES = sorted(page.name for page in RESULTS.glob("*.md"))
# A chapter with such a heading tells what today's code cannot measure again.
_HISTORY = re.compile(r"^(#+) History\b.*?(?=^\1? ?#+ |\Z)", re.MULTILINE | re.DOTALL)
_TABLE = re.compile(
    r"^<!-- (?P<mark>[a-z0-9-]+) -->\n(?P<rows>.*?)^<!-- end(?: of (?P=mark))? -->\n",
    re.MULTILINE | re.DOTALL,
)
# Code, links and the addresses of pictures name settings and files, not figures.
_CODE = re.compile(r"```.*?```|^    .*?$|`[^`]*`|\]\([^)]*\)", re.MULTILINE | re.DOTALL)
_FIGURE = re.compile(r"(?<![\w./-])[+-]?(?P<number>\d[\d,]*\.\d+|\.\d+|\d[\d,]*(?= ?%))(?P<percent> ?%)?")


def of_dataset(name: str, lines: Sequence[Line]) -> list[Line]:
    """The lines of one data set."""
    return [row for row in lines if row["dataset"] == name]


def of_command(module: str, table: Table, lines: Sequence[Line]) -> Sequence[str]:
    """The table of those lines that a module's command wrote."""
    return table([row for row in lines if row["command"].startswith(f"python -m {module}")])


# What makes each table of each page from the lines beside it.
TABLES: dict[tuple[str, str], Table] = {
    ("ablations.md", "ablations"): ablations.table,
    ("alignment.md", "rees46"): lambda lines: alignment.table(of_dataset("rees46", lines)),
    ("alignment.md", "tmall2014"): lambda lines: alignment.table(of_dataset("tmall2014", lines)),
    ("cycles.md", "cycles"): partial(of_command, "benchmarks.cycles", cycles_page.table),
    ("cycles.md", "holdout"): partial(of_command, "benchmarks.holdout", holdout.table),
    ("cycles.md", "ratchet"): partial(of_command, "benchmarks.ratchet", ratchet.table),
    ("demo.md", "seeds"): demo_page.tables,
    ("evaluation.md", "table"): report.page_rows,
    ("tuning.md", "table"): tuning.table,
    ("gate.md", "table"): partial(share_table, columns=gate.COLUMNS, cells=gate.cells),
    ("lineages.md", "lineages"): lineage_report.tables_of,
    ("position-bias.md", "position-bias"): position_bias.table,
    ("published.md", "published"): published_page.table,
    ("promoters.md", "table"): partial(share_table, columns=promoters.COLUMNS, cells=promoters.cells),
    ("rewards.md", "rewards"): rewards.table,
    ("speed.md", "speed"): speed_page.table,
    ("tasks.md", "tasks"): tasks.table,
}


def marked_tables() -> list[tuple[str, str]]:
    """(page, mark) of every table between marks."""
    return [
        (page, table["mark"]) for page in PAGES for table in _TABLE.finditer((RESULTS / page).read_text())
    ]


def page_lines(page: str) -> list[Line]:
    """The lines beside a page, and those of other files that it links."""
    linked = re.findall(r"\]\(([a-z-]+\.jsonl)\)", (RESULTS / page).read_text())
    names = dict.fromkeys([page.removesuffix(".md") + ".jsonl", *linked])
    return [row for name in names for row in read_lines(RESULTS / name)]


def numbers(value: Any) -> Iterator[float]:
    """All numbers in a line."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def is_of_a_line(figure: re.Match[str], of_lines: Sequence[float]) -> bool:
    """Whether a figure is a number of a line, rounded as it is printed; a share may be printed in percent."""
    text = figure["number"].replace(",", "")
    digits = len(text.partition(".")[2])
    value, half = float(text), 0.5 * 10**-digits + 1e-9
    scales = (100,) if figure["percent"] else (1, 100)
    return any(abs(abs(number) * scale - value) <= half for number in of_lines for scale in scales)


def of_tables(text: str) -> Iterator[float]:
    """The numbers in the marked tables of a page, such as means over the lines of all seeds."""
    for table in _TABLE.finditer(text):
        for figure in _FIGURE.finditer(table["rows"]):
            yield float(figure["number"].replace(",", "")) / (100 if figure["percent"] else 1)


def figures_without_a_line(text: str, of_lines: Sequence[float]) -> list[str]:
    """The figures in the sentences of a text that no line has; 95 % is the level of every interval."""
    sentences = _CODE.sub(" ", _TABLE.sub("", _HISTORY.sub("", text)))
    return [
        figure.group()
        for figure in _FIGURE.finditer(sentences)
        if figure["number"] != "95" and not is_of_a_line(figure, of_lines)
    ]


@pytest.mark.parametrize(("page", "mark"), marked_tables())
def test_a_table_is_made_of_the_lines_beside_it(page: str, mark: str) -> None:
    tables = {table["mark"]: table["rows"] for table in _TABLE.finditer((RESULTS / page).read_text())}
    lines = read_lines((RESULTS / page).with_suffix(".jsonl"))
    # A page whose figures are not measured by this version has its marks, and nothing between them.
    assert tables[mark].splitlines() == (list(TABLES[page, mark](lines)) if lines else [])


@pytest.mark.parametrize("page", PAGES)
def test_sentences_quote_figures_of_a_line_or_of_a_table_that_is_made_of_lines(page: str) -> None:
    text = (RESULTS / page).read_text()
    of_lines = [number for row in page_lines(page) for number in numbers(row)]
    assert figures_without_a_line(text, [*of_lines, *of_tables(text)]) == []


def test_a_figure_is_compared_as_it_is_printed() -> None:
    of_lines = [0.1234, -0.05, 12_345.6]
    assert (
        figures_without_a_line("x .123, 12.3 %, -5 %, 12,346 % of 12,345.6; 3 items", [*of_lines, 123.456])
        == []
    )
    assert figures_without_a_line("x .124 and 13 %, or `0.5`", of_lines) == [".124", "13 %"]
    assert figures_without_a_line("## History\n.9\n## Now\n.8\n", of_lines) == [".8"]
