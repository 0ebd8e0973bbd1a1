"""The rule on data whose truth is known, and on data that nobody should judge."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.decision import decide, recompute
from registry.gate import compare
from registry.settings import GateSettings
from registry.statistics import Sums, sums
from streams.errors import SidstreamError
from streams.events import Arm

SETTINGS = GateSettings()
ARMS = [
    Arm("champion", "b0", 0.4, "1"),
    Arm("challenger-sft", "b1", 0.3, "2"),
    Arm("challenger-dpo", "b2", 0.3, "3"),
]


def arm(random, count, ctr=0.2, cvr=0.2):
    """Sums of `count` users whose own rates scatter around ctr and cvr."""
    shown = 5 + random.poisson(15, count)
    clicked = random.binomial(shown, random.beta(10, 10 / ctr - 10, count))
    bought = random.binomial(clicked, random.beta(10, 10 / cvr - 10, count))
    return sums(np.stack([shown, clicked, bought], axis=1))


def pair(seed=0, count=3000, **target):
    random = np.random.default_rng(seed)
    return {"t": arm(random, count, **target), "c": arm(random, count)}


@pytest.mark.parametrize(
    ("target", "verdict"),
    [
        ({"cvr": 0.26}, "promote"),
        ({"cvr": 0.26, "ctr": 0.195}, "promote"),
        ({"cvr": 0.20}, "inconclusive"),
        ({"cvr": 0.15}, "reject"),
        ({"cvr": 0.26, "ctr": 0.15}, "reject"),
        ({"cvr": 0.26, "ctr": 0.18}, "inconclusive"),
    ],
)
def test_verdicts_follow_the_truth_where_the_data_are_many(target, verdict):
    made = compare("t", "c", pair(**target), SETTINGS)
    assert made.verdict == verdict
    assert made.sentence.startswith(f"t against c: {verdict}; ")
    assert "\n" not in made.sentence


def test_an_aa_trial_promotes_at_most_as_often_as_alpha_and_the_point_rule_is_a_coin_flip():
    random = np.random.default_rng(11)
    runs = 2000
    by_test = by_point = by_test_harm = 0
    for _ in range(runs):
        arms = {"t": arm(random, 400), "c": arm(random, 400)}
        verdict = compare("t", "c", arms, SETTINGS).verdict
        by_test += verdict == "promote"
        by_test_harm += verdict == "reject"
        by_point += compare("t", "c", arms, SETTINGS, "point").verdict == "promote"
    # Three standard deviations of a share over `runs`.
    assert by_test / runs < 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5
    assert by_test > 0
    assert by_test_harm / runs < 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5
    assert 0.42 < by_point / runs < 0.55


def test_a_fall_to_the_margin_is_seldom_promoted_however_much_is_bought():
    random = np.random.default_rng(12)
    runs = 1000
    promoted = sum(
        compare("t", "c", {"t": arm(random, 400, 0.18, 0.35), "c": arm(random, 400)}, SETTINGS).verdict
        == "promote"
        for _ in range(runs)
    )
    assert promoted / runs < 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5
    assert promoted > 0


def test_two_applications_of_the_rule_promote_a_useless_pair_about_as_often_as_alpha():
    random = np.random.default_rng(13)
    runs = 1500
    promoted = 0
    for _ in range(runs):
        data = {one.name: arm(random, 300) for one in ARMS}
        promoted += decide("t", ARMS, data, SETTINGS)["verdict"] == "promote"
    # At most alpha for either challenger; the aligned one is tried only when it beat the other.
    assert promoted / runs < 0.08


@given(
    st.dictionaries(
        st.sampled_from(["t", "c"]),
        st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60)), max_size=6).map(
            lambda rows: sums(np.array(rows, dtype=np.int64).reshape(-1, 3))
        ),
    ),
    st.sampled_from(["test", "point"]),
)
def test_no_data_makes_the_gate_crash_or_say_a_number_that_is_none(arms, mode):
    relaxed = GateSettings(min_users=2, min_impressions=1)
    made = compare("t", "c", arms, relaxed, mode)
    json.dumps(made.as_dict(), allow_nan=False)
    assert made.sentence


@pytest.mark.parametrize(
    ("rows", "mode", "said"),
    [
        ([], "test", "has served no user yet"),
        ([], "point", "has served no user yet"),
        ([[5000, 100, 10]], "test", "wants at least 2"),
        ([[5000, 100, 10]], "point", "one user"),
        ([[5000, 0, 0], [5000, 0, 0]], "test", "rates do not exist"),
        ([[0, 0, 0], [0, 0, 0]], "point", "rates do not exist"),
        ([[5000, 10, 20], [5000, 10, 20]], "test", "above 1"),
        ([[5, 10, 1], [5, 10, 1]], "point", "above 1"),
        ([[5000, 100, 0], [5000, 90, 0]], "test", "neither arm has an order"),
        ([[5000, 100, 0], [5000, 90, 0]], "point", "neither arm has an order"),
    ],
)
def test_degenerate_data_are_inconclusive_with_the_reason(rows, mode, said):
    same = sums(np.array(rows, dtype=np.int64).reshape(-1, 3))
    made = compare("t", "c", {"t": same, "c": same}, GateSettings(min_users=2, min_impressions=1), mode)
    assert made.verdict == "inconclusive"
    assert said in made.sentence


def test_users_who_all_behave_alike_are_no_evidence():
    target = sums(np.tile([[20, 4, 2]], (200, 1)))
    control = sums(np.tile([[20, 4, 1]], (200, 1)))
    made = compare("t", "c", {"t": target, "c": control}, SETTINGS)
    assert made.verdict == "inconclusive"
    assert "without variance" in made.sentence


def test_too_few_users_are_not_judged():
    made = compare("t", "c", pair(count=99, cvr=0.9), SETTINGS)
    assert made.verdict == "inconclusive"
    assert "99 users" in made.sentence


def trial(seed=0, sft=None, dpo=None, count=3000):
    random = np.random.default_rng(seed)
    data = {"champion": arm(random, count), "challenger-sft": arm(random, count, **(sft or {}))}
    if dpo is not None:
        data["challenger-dpo"] = arm(random, count, **dpo)
    return data


@pytest.mark.parametrize(
    ("sft", "dpo", "pairs", "verdict", "winner"),
    [
        ({"cvr": 0.25}, {"cvr": 0.32}, ["dpo-sft", "dpo-champion"], "promote", "challenger-dpo"),
        ({"cvr": 0.25}, {"cvr": 0.25}, ["dpo-sft", "sft-champion"], "promote", "challenger-sft"),
        ({"cvr": 0.25}, {"cvr": 0.15}, ["dpo-sft", "sft-champion"], "promote", "challenger-sft"),
        ({"cvr": 0.12}, {"cvr": 0.15}, ["dpo-sft", "dpo-champion"], "reject", "champion"),
        ({"cvr": 0.20}, {"cvr": 0.20}, ["dpo-sft", "sft-champion"], "inconclusive", "champion"),
    ],
)
def test_the_winner_of_the_first_comparison_meets_the_champion(sft, dpo, pairs, verdict, winner):
    record = decide("t", ARMS, trial(4, sft, dpo), SETTINGS)
    short = {"challenger-dpo": "dpo", "challenger-sft": "sft", "champion": "champion"}
    assert [f"{short[c['target']]}-{short[c['control']]}" for c in record["comparisons"]] == pairs
    assert (record["verdict"], record["winner"]) == (verdict, winner)


def test_without_an_aligned_arm_there_is_one_comparison():
    record = decide("t", ARMS[:2], trial(4, {"cvr": 0.26}), SETTINGS)
    assert len(record["comparisons"]) == 1
    assert (record["verdict"], record["winner"]) == ("promote", "challenger-sft")


@pytest.mark.parametrize("mode", ["test", "point"])
def test_a_record_recomputes_from_itself_after_a_trip_through_json(mode):
    record = decide("t", ARMS, trial(4, {"cvr": 0.25}, {"cvr": 0.32}), SETTINGS, mode)
    back = json.loads(json.dumps(record, allow_nan=False))
    assert recompute(back) == (record["verdict"], record["winner"])
    assert back["mode"] == mode
    if mode == "point":
        assert "mode point" in record["sentence"]


def test_a_record_with_other_sums_or_another_rule_is_refused():
    record = decide("t", ARMS, trial(4, {"cvr": 0.25}, {"cvr": 0.32}), SETTINGS)
    for path, value in (
        (("inputs", "champion", "orders"), 1),
        (("settings", "alpha"), 0.4),
        (("trial",), "u"),
    ):
        changed = json.loads(json.dumps(record))
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        with pytest.raises(SidstreamError, match="was changed"):
            recompute(changed)
    del record["inputs"]
    with pytest.raises(SidstreamError, match="incomplete"):
        recompute(record)


def test_the_same_data_under_the_same_rule_are_the_same_decision():
    data = trial(4, {"cvr": 0.25}, {"cvr": 0.32})
    first, second = decide("t", ARMS, data, SETTINGS, ts=1), decide("t", ARMS, data, SETTINGS, ts=2)
    assert first["decision"] == second["decision"]
    assert decide("t", ARMS, data, SETTINGS, "point")["decision"] != first["decision"]
    assert decide("u", ARMS, data, SETTINGS)["decision"] != first["decision"]


def test_an_arm_that_nobody_has_met_yet_is_inconclusive():
    record = decide("t", ARMS, {"champion": asdict_sums(5)}, SETTINGS)
    assert record["verdict"] == "inconclusive"
    assert "challenger-sft has served no user yet" in record["sentence"]


def asdict_sums(seed):
    return Sums(**asdict(arm(np.random.default_rng(seed), 500)))


def test_nothing_on_trial_is_an_error():
    with pytest.raises(SidstreamError, match="nothing is on trial"):
        decide("t", ARMS[:1], {}, SETTINGS)
