"""The benchmark of the demo over seeds: what counts as right, what is run again, what a page says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import demo_seeds
from benchmarks.demo_page import BEGIN, END, publish
from benchmarks.demo_seeds import seeded, truths
from registry.arms import CHAMPION, DPO, SFT

COMPARED = {
    "target": DPO, "control": SFT, "verdict": "promote",
    "cvr": {"target": 0.25, "control": 0.22, "difference": 0.03, "difference_interval": [0.01, 0.05],
            "p_above": 0.002}, "ctr": None,
}  # fmt: skip


def row(seed: int, winner: str = DPO, right: bool | None = True) -> dict[str, Any]:
    return {
        "seed": seed, "failed": None, "seconds": 300.0, "verdict": "promote", "winner": winner,
        "right": right, "best": DPO, "gate": [COMPARED],
        "truth": {CHAMPION: [0.24, 0.2], SFT: [0.25, 0.2], DPO: [0.24, 0.23]},
        "null": {"compared": "inconclusive", "figures": {"cvr": {"p_above": 0.4}, "ctr": None}},
    }  # fmt: skip


def failure(seed: int) -> dict[str, Any]:
    return {"seed": seed, "failed": "RuntimeError: no broker"}


def test_a_promotion_is_right_where_conversion_rises_in_truth_and_clicks_keep_the_margin() -> None:
    rates = {CHAMPION: [0.24, 0.2], SFT: [0.2, 0.3], DPO: [0.23, 0.23]}
    assert truths(rates, DPO, 0.1)["right"] is True
    assert truths(rates, SFT, 0.1)["right"] is False  # conversion at the price of clicks
    assert truths(rates, CHAMPION, 0.1)["right"] is None
    assert truths(rates, CHAMPION, 0.1)["best"] == DPO
    worse = {CHAMPION: [0.24, 0.2], SFT: [0.24, 0.19], DPO: [0.24, 0.2]}
    assert truths(worse, SFT, 0.1) == {"truth": worse, "better": [], "best": CHAMPION, "right": False}


def test_clicks_that_the_gate_did_not_count_are_seen() -> None:
    arm = {"shown": 1000, "clicks": 200, "purchases": 40}
    inputs = {"impressions": 500, "clicks": 90, "orders": 18}
    demo = {"gate": {"inputs": {DPO: inputs}}, "sessions": {"trial": {"arms": {"a": arm}}}}
    assert demo_seeds.counted(demo) == {"ctr": 0.9, "cvr": 1.0}


def test_a_seed_that_fails_is_a_line_with_its_reason_and_its_stack_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = []

    def run(self: Any, *arguments: str, seconds: float = 0) -> dict[str, Any]:
        ran.append(arguments[0])
        raise RuntimeError("no broker")

    monkeypatch.setattr(demo_seeds.Stack, "run", run)
    assert seeded(5, None) | {"total_s": 0} == failure(5) | {"total_s": 0}
    assert ran == ["demo", "down"]


def test_a_seed_that_is_there_is_not_run_again_and_the_others_go_on_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text(json.dumps(row(1)) + "\n")
    ran = []

    def run(seed: int, sessions: int | None) -> dict[str, Any]:
        ran.append(seed)
        return failure(seed) if seed == 2 else row(seed)

    monkeypatch.setattr(demo_seeds, "seeded", run)
    monkeypatch.setattr(sys, "argv", ["demo_seeds", "--seeds", "1", "2", "3", "--out", str(out)])
    demo_seeds.main()
    assert ran == [2, 3]
    assert [json.loads(text)["seed"] for text in out.read_text().splitlines()] == [1, 2, 3]


def test_the_page_counts_failures_promotions_and_null_trials(tmp_path: Path) -> None:
    page = tmp_path / "demo.md"
    page.write_text(f"# Demo\n{BEGIN}old\n{END}after\n")
    publish([row(1), row(2, CHAMPION, None), row(3, SFT, False), failure(4)], tmp_path)
    text = page.read_text()
    assert "old" not in text
    assert "after" in text
    assert "| 4 |  | failed: RuntimeError: no broker |" in text
    lines = [json.loads(one) for one in (tmp_path / "demo.jsonl").read_text().splitlines()]
    shares = {one["metric"]: one["value"] for one in lines if one["seed"] is None}
    assert shares["demos that ended"] == 0.75
    assert shares["aligned challenger promoted"] == round(1 / 3, 4)
    assert shares["promotions that are right"] == 0.5
    assert shares["null trials that promote"] == 0
    means = {one["metric"]: one["value"] for one in lines if one["metric"].endswith("model, mean")}
    # Two promotions: the aligned model with CVR .23 over .20, the other with CTR .25 over .24 alone.
    assert means["true change of CVR, promoted model, mean"] == pytest.approx(0.075)
    assert means["true change of orders a page, promoted model, mean"] == pytest.approx(
        (0.15 + 0.25 / 0.24 - 1) / 2, abs=1e-4
    )
    assert "| orders a page | +9.6% |" in text
