"""The whole loop as a stranger runs it, made short: two months of the shop, a few hundred sessions.

The machine is made bare: PATH holds no java, docker, redis-server, mvn or node, so that a green run shows
that Python packages are all that the product needs. Caches are the user's own (the Kafka jars come once).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH is an empty folder, and whose state is a temporary one."""
    empty = tmp_path / "bin"
    empty.mkdir()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SIDSTREAM_")}
    return {
        **inherited,
        "PATH": str(empty),
        "SIDSTREAM_STACK__HOME": str(tmp_path / "state"),
        "SIDSTREAM_TRAINER__HOME": str(tmp_path / "trainer"),
        "SIDSTREAM_REGISTRY__CACHE": str(tmp_path / "cache"),
        # Seconds of training make a poor model: the demo is shown here, not its quality.
        "SIDSTREAM_TRAINER__MIN_VALIDITY": "0",
        "SIDSTREAM_TRAINER__MAX_FALL": "0.99",
        "SIDSTREAM_TRAINER__BEAT_POPULARITY": "false",
        "SIDSTREAM_TRAINER__DPO__MIN_PAIRS": "1",
    }


def _sidstream(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sidstream", *arguments],
        env=environment, capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip


@pytest.mark.timeout(900)
def test_the_demo_closes_the_loop_on_a_machine_with_python_packages_only(bare: dict[str, str]) -> None:
    try:
        demo = _sidstream(
            bare, "demo", "--since", "2011-11-01", "--train-seconds", "8", "--sessions", "150", "--seed", "3",
            "--json",
        )  # fmt: skip
        assert demo.returncode == 0, demo.stderr
        result = json.loads(demo.stdout.splitlines()[-1])
        assert [stage["name"] for stage in result["stages"]] == [
            "stack", "catalogue", "events", "first model", "in service", "shoppers", "second model", "trial",
            "gate", "next answer",
        ]  # fmt: skip
        assert result["seed"] == 3
        assert result["verdict"] in {"promote", "reject", "inconclusive"}
        assert len(result["before"]) == len(result["after"]) == 3
        # What a benchmark reads of a demo: who was served, what the gate saw, what a page showed and shows.
        assert {name.split()[0] for name in result["sessions"]["trial"]["arms"]} >= {
            "champion",
            "challenger-sft",
        }
        assert result["gate"]["arms"][result["winner"]]["bundle"]
        assert len(result["page"]["in_trial"]) == len(result["page"]["now"]) == 10
        assert "warn" not in demo.stderr.lower(), demo.stderr

        # What the demo tells a person to type works while the stack is up.
        recommendation_run = _sidstream(
            bare, "recommend", "--user", "17850", "--item", "85123A", "-k", "3", "--json"
        )
        assert recommendation_run.returncode == 0, recommendation_run.stderr
        answer = json.loads(recommendation_run.stdout)
        assert len(answer["items"]) == 3
        assert answer["bundle"]
    finally:
        down = _sidstream(bare, "down", "--purge", "--json")
    assert down.returncode == 0, down.stderr
    assert not Path(bare["SIDSTREAM_STACK__HOME"]).exists()
