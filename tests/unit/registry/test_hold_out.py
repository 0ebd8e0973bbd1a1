"""Who is dealt hangs on the rule and the user alone, and the dealt are as many as was asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from registry.hold_out import HoldOut
from registry.releases.rollout import is_held_out

shares = st.floats(0, 1)


@given(st.text(), st.text(), shares, shares)
def test_a_greater_share_adds_users_and_lets_none_go(salt: str, user: str, one: float, other: float) -> None:
    small, great = (HoldOut(salt=salt, share=share) for share in sorted((one, other)))
    assert great.covers(small)
    assert small.covers(great) == (one == other)
    assert great.has(user) or not small.has(user)


@given(st.text(), shares)
def test_nobody_is_dealt_by_a_share_of_0_and_everybody_by_1(user: str, share: float) -> None:
    assert not HoldOut(share=0.0).has(user)
    assert HoldOut(share=1.0).has(user)
    assert HoldOut(salt="another", share=share).covers(HoldOut(share=0.0))
    assert HoldOut(salt="another", share=1.0).covers(HoldOut(share=share)) == (share == 0)


def test_of_100_000_users_a_tenth_is_dealt_whoever_always_sees_the_first_model() -> None:
    users = [str(number) for number in range(100_000)]
    validation = {user for user in users if HoldOut(share=0.1).has(user)}
    anchored = {user for user in users if is_held_out(user, 0.1)}
    # Four standard deviations of a binomial share.
    assert abs(len(validation) / 100_000 - 0.1) < 4 * (0.1 * 0.9 / 100_000) ** 0.5
    both = len(validation & anchored)
    assert abs(both / 100_000 - 0.01) < 4 * (0.01 * 0.99 / 100_000) ** 0.5


def test_the_validation_users_are_dealt_as_they_always_were() -> None:
    # A lineage's weights never learned from them: a release of the software must not deal others.
    assert [n for n in range(60) if HoldOut(share=0.1).has(str(n))] == [7, 23, 32, 51]
