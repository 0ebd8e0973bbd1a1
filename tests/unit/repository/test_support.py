"""The tests' own rules: without a broker, a desk skips and continuous integration fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from streams.errors import SidstreamError
from tests import support


@pytest.mark.parametrize(
    ("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)], ids=["ci", "desk"]
)
def test_a_missing_broker_fails_under_ci_and_skips_elsewhere(
    ci: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="no Kafka"):
        support.unavailable("Kafka", SidstreamError("no Java"))


def test_a_docker_command_without_an_engine_counts_as_no_docker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not support.docker_answers()
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\nexit 1\n")
    docker.chmod(0o755)
    assert not support.docker_answers()
    docker.write_text("#!/bin/sh\nexit 0\n")
    assert support.docker_answers()
