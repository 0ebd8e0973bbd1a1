"""The code of a run is named by its commit, with a mark where code is not committed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from registry.bundles.code_version import code_version, describe_commit


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    completed = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for folder in ("trainer", "docs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file.py").write_text("a = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    assert describe_commit(checkout) == git(checkout, "rev-parse", "--short", "HEAD")


@pytest.mark.parametrize("name", ["trainer/file.py", "trainer/new.py", "pyproject.toml"])
def test_code_that_is_not_committed_is_marked_new_files_too(checkout: Path, name: str) -> None:
    (checkout / name).write_text("a = 2\n")
    assert describe_commit(checkout).endswith("+dirty")


def test_pages_that_a_measurement_writes_are_no_other_code(checkout: Path) -> None:
    (checkout / "docs" / "file.py").write_text("a = 2\n")
    assert not describe_commit(checkout).endswith("+dirty")


def test_without_a_repository_there_is_no_commit(tmp_path: Path) -> None:
    assert describe_commit(tmp_path) == "none"


def test_the_version_names_the_package_and_the_commit() -> None:
    version, _, commit = code_version().partition(" ")
    assert version
    assert commit.startswith("(")
    assert commit.endswith(")")
