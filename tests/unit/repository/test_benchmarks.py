"""The benchmarks that fit into a test run in their short form, and their figures stay as published."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_gate_keeps_its_error_rates_and_the_published_rule_does_not():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gate", "--quick"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    harmless = [row for row in rows if row["claim"] == "at most .05"]
    assert len(harmless) >= 4
    # Twenty trials a figure, with a fixed seed: at a true 5 %, four or more come once in sixty times.
    assert all(row["value"] <= 0.15 for row in harmless)
    published = [
        row["value"] for row in rows if "mode point" in row["model"] and "no effect" in row["metric"]
    ]
    assert published
    assert min(published) > 0.3
