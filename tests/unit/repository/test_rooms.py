"""CONTRIBUTING's table of rooms is the tree, folders stay small, and names that hide do not come back."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("streams", "registry", "agents", "serving", "trainer", "sidstream")
OTHERS = ("harness", "tests", "benchmarks", "docs", "ops")
LARGEST_ROOM = 15
# Participles that say nothing about what a function gives.
HIDING = re.compile(r"^(told|said|made|found|known|held|asked|grown)$")


def rooms() -> set[str]:
    """Every folder of a package that has Python modules, as CONTRIBUTING writes it."""
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    return {f"{folder.relative_to(ROOT).as_posix()}/" for folder in folders}


def modules(room: Path) -> list[str]:
    return sorted(path.name for path in room.glob("*.py") if path.name != "__init__.py")


def documented(text: str) -> list[str]:
    """The rooms that the table of rooms names, in its order."""
    return re.findall(r"^\| `([a-z_/]+/)` \|", text, re.MULTILINE)


def test_the_table_of_rooms_names_every_folder_once() -> None:
    named = documented((ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) == len(set(named))
    assert set(named) == rooms() | {f"{name}/" for name in OTHERS}


def test_a_room_that_is_missing_from_the_table_would_be_seen() -> None:
    assert documented("| `streams/wire/` | a | b |\n| other | `x/` |\n") == ["streams/wire/"]


@pytest.mark.parametrize("room", sorted(rooms()))
def test_no_room_has_more_modules_than_one_look_takes_in(room: str) -> None:
    assert len(modules(ROOT / room)) <= LARGEST_ROOM, modules(ROOT / room)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", *sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")
)])  # fmt: skip
def test_files_named_in_documents_exist(document: str) -> None:
    named = re.findall(
        r"`((?:streams|registry|agents|serving|trainer|sidstream|harness|tests|benchmarks|docs|ops)/[\w./-]+)`",
        (ROOT / document).read_text(),
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_unit_tests_stand_where_their_rooms_stand() -> None:
    allowed = rooms() | {"repository/", "benchmarks/"}
    folders = {path.parent for path in (ROOT / "tests/unit").rglob("test_*.py")}
    placed = {f"{folder.relative_to(ROOT / 'tests/unit').as_posix()}/" for folder in folders}
    assert placed <= allowed


def test_benchmarks_and_harness_import_nothing_of_the_tests() -> None:
    found = [
        path.name
        for folder in ("benchmarks", "harness")
        for path in (ROOT / folder).glob("*.py")
        if re.search(r"^\s*(from|import) tests\b", path.read_text(), re.MULTILINE)
    ]
    assert found == []


def test_no_function_is_named_by_a_bare_participle() -> None:
    named = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for folder in (*PACKAGES, *OTHERS)
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and HIDING.match(node.name)
    ]
    assert named == []
