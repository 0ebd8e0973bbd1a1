"""The command line before any command."""

from __future__ import annotations

import tomllib
from pathlib import Path

from typer.testing import CliRunner

from sidstream.cli import app

ROOT = Path(__file__).resolve().parents[3]


def test_version_prints_the_name_and_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"sidstream {version}\n")


def test_help_names_every_group_and_the_version_option() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for name in ("--version", "up", "gate", "sids", "topics", "codebook", "pairs"):
        assert name in result.output
