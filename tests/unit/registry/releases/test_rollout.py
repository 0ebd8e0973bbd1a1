from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.hold_out import user_share
from registry.releases.rollout import assign
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
    assert 0 <= user_share(trial, user) < 1
    assert user_share(trial, user) == user_share(trial, user)


def test_assignments_do_not_move_between_releases_of_the_software():
    # Users who change arm in mid-trial would spoil it: these values are part of the contract.
    assert [round(user_share("t1", user), 6) for user in ("17850", "ü", "")] == [0.471582, 0.358572, 0.802985]


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


def arms_of(anchor, champion, sft, dpo):
    return arms(champion, sft, dpo, anchor)


weights = st.floats(0.001, 1)


@given(st.text(), st.text(), st.text(), st.permutations([3, 1, 0.5, 0.25]), st.randoms(use_true_random=False))
def test_whether_a_user_is_held_out_hangs_on_the_user_and_the_weight_alone(trial, other, user, some, random):
    anchor, *rest = some
    first, second = arms_of(anchor, *rest), arms_of(anchor, *rest[::-1])
    random.shuffle(second)
    names = {assign(trial, user, first).name, assign(other, user, second).name}
    assert names == {"anchor"} or "anchor" not in names
    assert assign(trial, user, first) == assign(trial, user, list(first))


@given(st.text(), st.text(), st.lists(weights, min_size=4, max_size=4), weights)
def test_who_is_held_out_stays_so_when_the_anchor_grows(trial, user, some, more):
    small, great = arms_of(*some), arms_of(some[0] + more, *some[1:])
    if assign(trial, user, small).name == "anchor":
        assert assign("another", user, great).name == "anchor"


@given(st.text(), st.text(), st.lists(weights, min_size=3, max_size=3), weights)
def test_who_is_not_held_out_gets_the_arm_of_the_trial_without_the_anchor(trial, user, rest, anchor):
    chosen = assign(trial, user, arms_of(anchor, *rest))
    if chosen.name != "anchor":
        assert chosen == assign(trial, user, arms(*rest))


@given(st.text(), st.text(), weights)
def test_an_anchor_alone_or_without_weight_is_an_arm_as_any(trial, user, weight):
    assert assign(trial, user, arms(0, 0, 0, weight)).name == "anchor"
    assert assign(trial, user, arms(weight, weight, 0, 0)) == assign(trial, user, arms(weight, weight))


def test_trials_without_an_anchor_deal_as_they_always_did():
    # Part of the contract, as the shares are: a release of the software moves nobody in mid-trial.
    drawn = "".join(assign("t1", str(n), arms(0.4, 0.3, 0.3)).name[-1] for n in range(40))
    assert drawn == "otntnntottoootonttonontononnonttnootnnon"


def test_the_hold_out_and_the_other_arms_get_their_shares_of_100_000_users():
    shares = {"champion": 0.4, "challenger-sft": 0.3, "challenger-dpo": 0.28, "anchor": 0.02}
    users = [str(n) for n in range(100_000)]
    four = arms(*shares.values())
    first, second = ([assign(trial, user, four).name for user in users] for trial in ("t1", "t2"))
    for dealt in (first, second):
        counts = Counter(dealt)
        for name, weight in shares.items():
            # Four standard deviations of a binomial share.
            assert abs(counts[name] / 100_000 - weight) < 4 * (weight * (1 - weight) / 100_000) ** 0.5
    both = Counter(zip(first, second, strict=True))
    assert all((one == "anchor") == (two == "anchor") for one, two in both)
    others = {pair: count for pair, count in both.items() if pair[0] != "anchor"}
    assert len(others) == 9
    left = sum(others.values())
    for (one, two), count in others.items():
        expected = shares[one] * shares[two] / 0.98**2
        assert abs(count / left - expected) < 4 * (expected * (1 - expected) / left) ** 0.5
