"""Which code ran: the version of the package and, in a checkout, its commit, with a mark for changes."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DIRTY = "+dirty"
# What can change a result. Pages and figures under docs/ change while measurements are written.
CODE = (
    "streams", "registry", "agents", "serving", "trainer", "sidstream", "harness", "benchmarks",
    "pyproject.toml",
)  # fmt: skip
_CHECKOUT = Path(__file__).resolve().parents[2]


def describe_commit(checkout: Path) -> str:
    """The commit of a working tree, with `+dirty` where code in it is not committed; "none" where there is
    no repository."""
    commit = _git(checkout, "rev-parse", "--short", "HEAD")
    if not commit:
        return "none"
    changes = _git(checkout, "status", "--porcelain", "--", *CODE)
    return commit + (DIRTY if changes else "")


@cache
def commit() -> str:
    """`describe_commit` of this package's working tree at the first call.

    Call it at the start of a run: there may be a new commit before the end.
    """
    # An installed package may lie inside somebody else's repository.
    return describe_commit(_CHECKOUT) if (_CHECKOUT / "pyproject.toml").is_file() else "none"


def code_version() -> str:
    """The version of the package and its commit, as `0.1.0 (3cea89c+dirty)`."""
    try:
        installed = version("sidstream")
    except PackageNotFoundError:
        installed = "not installed"
    return f"{installed} ({commit()})"


def _git(checkout: Path, *arguments: str) -> str:
    """What git prints; empty where it fails or is not there."""
    try:
        completed = subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True)
    except OSError:
        return ""
    return completed.stdout.strip() if completed.returncode == 0 else ""
