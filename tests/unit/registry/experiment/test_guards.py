"""A guard fires on what is shown, at any look, and not on what the control has as well."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import xlogy

from registry.experiment import guards
from registry.experiment.decision import recompute, rejudge
from registry.experiment.gate import compare_with_anchor
from registry.experiment.guards import guard_decision, health_alarms, log_evidence
from registry.experiment.health import BOUNDS_MS, ArmHealth
from registry.experiment.statistics import ArmSums, arm_sums
from registry.settings import GateSettings, GuardSettings
from streams.errors import SidstreamError
from streams.events import Arm

ARMS = [
    Arm("challenger-sft", "b1", 0.3, "2"), Arm("champion", "b0", 0.4, "1"),
    Arm("challenger-dpo", "b2", 0.3, "3"),
]  # fmt: skip
BOTH = ["challenger-sft", "challenger-dpo"]


@given(st.integers(0, 200), st.integers(0, 200), st.floats(0.01, 0.9))
def test_the_evidence_is_the_integral_that_its_docstring_states(hits, misses, limit):
    count = hits + misses

    def log_ratio(q: float) -> float:
        return float(xlogy(hits, q / limit) + xlogy(misses, (1 - q) / (1 - limit)))

    peak = min(max(hits / max(count, 1), limit), 1.0)
    points = sorted({limit, peak, 1.0})
    top = log_ratio(peak)
    parts = [quad(lambda q: math.exp(log_ratio(q) - top), a, b, limit=200)[0] for a, b in pairwise(points)]
    expected = math.log(sum(parts) / (1 - limit)) + top
    assert log_evidence(hits, count, limit) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", ["whole", "between"])
def test_at_the_limit_a_guard_that_is_looked_at_after_every_request_rarely_fires(kind):
    random = np.random.default_rng(3)
    limit, alpha, sequences, length = 0.1, 0.05, 2000, 400
    if kind == "whole":
        values = (random.random((sequences, length)) < limit).astype(float)
    else:
        values = random.beta(1, 9, (sequences, length))
    totals = values.cumsum(axis=1)
    fired = sum(
        any(log_evidence(totals[row, n], n + 1, limit) > -math.log(alpha) for n in range(0, length, 5))
        for row in range(sequences)
    )
    # Three standard deviations above the promised 5 %.
    assert fired / sequences < alpha + 3 * math.sqrt(alpha * (1 - alpha) / sequences)


def test_what_is_twice_the_limit_is_found_soon():
    assert log_evidence(0.2 * 600, 600, 0.1) > -math.log(0.001)


def test_edges_have_an_answer():
    assert log_evidence(0, 0, 0.1) == 0
    assert log_evidence(0, 0, 1.0) == 0
    assert log_evidence(5, 5, 1.0) == -math.inf
    assert log_evidence(1, 5, 0.0) == math.inf
    assert log_evidence(0, 5, 0.0) == 0
    assert log_evidence(0, 100_000, 0.5) == -math.inf


def healthy(requests=2000, failed=0, slow=0, invalid=0.1) -> ArmHealth:
    return ArmHealth(requests, failed, invalid * requests, {10.0: requests - slow, 1000.0: slow})


@pytest.mark.parametrize(
    ("guard", "bad"),
    [("failed", {"failed": 100}), ("slow", {"slow": 400}), ("invalid", {"invalid": 0.8})],
)
def test_each_guard_fires_on_its_own_fault_only_and_not_where_the_control_has_it_too(guard, bad):
    health = {"champion": healthy(), "challenger-sft": healthy(), "challenger-dpo": healthy(**bad)}
    (alarm,) = health_alarms(health, BOTH, "champion", GuardSettings())
    assert (alarm.arm, alarm.guard) == ("challenger-dpo", guard)
    assert "challenger-dpo" in alarm.sentence
    if guard == "invalid":
        assert health_alarms(health, BOTH, None, GuardSettings()) == []
    assert health_alarms(health | {"champion": healthy(**bad)}, BOTH, "champion", GuardSettings()) == []
    few = healthy(
        20, **{key: value * 20 // 2000 if key != "invalid" else value for key, value in bad.items()}
    )
    assert (
        health_alarms(health | {"challenger-dpo": few}, BOTH, "champion", GuardSettings(invalid=0.75)) == []
    )


@given(st.dictionaries(st.sampled_from(BOUNDS_MS), st.integers(0, 1000)), st.floats(0.1, 5000))
def test_a_request_is_slow_when_its_whole_class_is_above_the_limit(times, limit):
    count = ArmHealth(times=times).slower(limit)
    assert count <= sum(number for bound, number in times.items() if bound > limit)
    assert count >= sum(number for bound, number in times.items() if bound > max(2.5 * limit, 1))


def clicking(ctr: float, seed: int, users: int) -> ArmSums:
    random = np.random.default_rng(seed)
    shown = 5 + random.poisson(15, users)
    clicked = random.binomial(shown, ctr)
    return arm_sums(np.stack([shown, clicked, random.binomial(clicked, 0.2)], axis=1))


def sums_of(dpo_ctr: float) -> dict[str, ArmSums]:
    return {
        "challenger-sft": clicking(0.2, 1, 1500), "champion": clicking(0.2, 2, 2000),
        "challenger-dpo": clicking(dpo_ctr, 3, 1500),
    }  # fmt: skip


def guarded(health=None, outcomes=None, watched=BOTH, control="champion", arms=ARMS):
    health = health or {}
    return guard_decision(
        "t", arms, watched, control, health, outcomes or {}, GuardSettings(), GateSettings(), ts=1
    )


def test_lost_clicks_end_a_trial_with_a_record_that_recomputes_and_cannot_be_changed():
    assert guarded(outcomes=sums_of(0.19)) is None
    record = json.loads(json.dumps(guarded(outcomes=sums_of(0.12))))
    assert (record["verdict"], record["winner"], record["mode"]) == ("reject", "champion", "guard")
    assert "challenger-dpo: CTR" in record["sentence"]
    assert recompute(record) == ("reject", "champion")
    assert rejudge(record).sentence == record["sentence"]
    record["inputs"]["sums"]["challenger-dpo"]["clicks"] *= 2
    with pytest.raises(SidstreamError, match="was changed"):
        recompute(record)


def test_the_guard_on_clicks_leaves_lost_orders_to_the_gate():
    # Purchases are to come: the guard reads cohorts whose attribution window is open.
    sums = sums_of(0.2)
    dpo = sums["challenger-dpo"]
    sums["challenger-dpo"] = replace(dpo, orders=0, orders_squared=0, clicks_orders=0, impressions_orders=0)
    comparison = compare_with_anchor("challenger-dpo", "champion", sums, GateSettings(alpha=0.001))
    assert comparison.verdict == "reject"
    assert guarded(outcomes=sums) is None


def test_users_who_do_not_come_as_they_were_dealt_end_a_trial():
    lost = sums_of(0.2) | {"challenger-dpo": clicking(0.2, 3, 700)}
    record = guarded(outcomes=lost)
    assert [alarm["guard"] for alarm in record["alarms"]] == ["users"]


def test_a_champion_that_fails_goes_back_to_its_predecessor_also_without_an_anchor():
    alone = [Arm("champion", "b1", 1.0, "2")]
    record = guarded({"champion": healthy(failed=200)}, watched=["champion"], control=None, arms=alone)
    assert (record["verdict"], record["winner"]) == ("reject", "previous")
    assert guarded({"champion": healthy()}, watched=["champion"], control=None, arms=alone) is None


def test_a_shadow_has_health_and_no_users_and_that_is_no_mismatch():
    arms = [Arm("challenger-sft", "b1", 0.0, "2"), Arm("champion", "b0", 1.0, "1")]
    outcomes = {"champion": clicking(0.2, 2, 2000)}
    assert guarded({"challenger-sft": healthy()}, outcomes, ["challenger-sft"], arms=arms) is None
    record = guarded({"challenger-sft": healthy(failed=500)}, outcomes, ["challenger-sft"], arms=arms)
    assert [alarm["guard"] for alarm in record["alarms"]] == ["failed"]


def test_a_record_of_a_guard_survives_json_with_its_infinite_class():
    health = {"challenger-sft": ArmHealth(1000, 500, 1.0, {math.inf: 500, 1.0: 500})}
    record = json.loads(json.dumps(guarded(health)))
    assert guards.recompute_verdict(record)["sentence"] == record["sentence"]
    assert {alarm["guard"] for alarm in record["alarms"]} == {"failed", "slow"}
