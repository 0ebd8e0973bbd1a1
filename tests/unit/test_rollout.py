from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.rollout import assign, share
from streams.errors import SidstreamError
from streams.events import Arm


def arms(*weights):
    names = ("champion", "challenger-sft", "challenger-dpo", "anchor")
    return [
        Arm(name, f"b{n}", weight, str(n))
        for n, (name, weight) in enumerate(zip(names, weights, strict=False))
    ]


@given(st.text(), st.text())
def test_a_share_is_in_the_half_open_unit_interval_and_fixed(trial, user):
    assert 0 <= share(trial, user) < 1
    assert share(trial, user) == share(trial, user)


def test_assignments_do_not_move_between_releases_of_the_software():
    # Users who change arm in mid-trial would spoil it: these values are part of the contract.
    assert [round(share("t1", user), 6) for user in ("17850", "ü", "")] == [0.471582, 0.358572, 0.802985]


def test_arms_get_their_shares():
    counts = Counter(assign("t", str(n), arms(0.5, 0.3, 0.2)).name for n in range(30_000))
    # Four standard deviations of a binomial share.
    for name, weight in (("champion", 0.5), ("challenger-sft", 0.3), ("challenger-dpo", 0.2)):
        assert abs(counts[name] / 30_000 - weight) < 4 * (weight * (1 - weight) / 30_000) ** 0.5


def test_weights_are_scaled():
    for n in range(200):
        assert assign("t", str(n), arms(0.2, 0.1)).name == assign("t", str(n), arms(0.6, 0.3)).name


def test_another_trial_shuffles_the_users_anew():
    both = Counter((assign("t1", str(n), arms(0.5, 0.5)).name, assign("t2", str(n), arms(0.5, 0.5)).name)
                   for n in range(20_000))  # fmt: skip
    assert len(both) == 4
    assert all(abs(count / 20_000 - 0.25) < 4 * (0.25 * 0.75 / 20_000) ** 0.5 for count in both.values())


def test_an_arm_without_weight_serves_nobody():
    assert {assign("t", str(n), arms(0, 1, 0)).name for n in range(500)} == {"challenger-sft"}
    with pytest.raises(SidstreamError, match="no weight"):
        assign("t", "u", arms(0, 0))
    with pytest.raises(SidstreamError, match="no weight"):
        assign("t", "u", [])
