"""The trial of the demo: enough users for its own plan, and a last act that a promotion concerns."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

from agents.settings import AgentsSettings
from registry.releases.rollout import is_held_out
from registry.settings import GateSettings, RolloutSettings
from sidstream.commands.demo import _answered_by_champion, _visitors, demo
from sidstream.demo import SETTINGS
from sidstream.demo_trial import planned_trial
from streams.errors import SidstreamError
from streams.settings import ShoppersSettings

# Shoppers of the shop's year, and what they do with a first model.
EVERYBODY = 4_334
BEFORE = {"arms": {"champion b": {"shown": 30_000, "clicks": 7_200, "purchases": 1_580}}}


def settings(**shares: float) -> Any:
    return SimpleNamespace(
        gate=GateSettings.model_validate({}), rollout=RolloutSettings.model_validate(shares),
        shoppers=ShoppersSettings.model_validate({}),
    )  # fmt: skip


def shares_of_the_demo() -> dict[str, float]:
    prefix = "SIDSTREAM_ROLLOUT__"
    return {
        name.removeprefix(prefix).lower(): float(value)
        for name, value in SETTINGS.items()
        if name.startswith(prefix)
    }


def test_the_demo_gives_its_trial_more_users_than_the_plan_asks_for() -> None:
    sessions = 3 * inspect.signature(demo).parameters["sessions"].default
    planned = planned_trial(settings(**shares_of_the_demo()), BEFORE, sessions, EVERYBODY)
    assert planned["users"] >= planned["users_needed"]
    assert planned["power"] >= 0.9


def test_no_answer_of_the_demo_runs_ahead_of_its_clicks_by_more_than_the_attribution_window() -> None:
    shop = ShoppersSettings.model_validate({"batch": SETTINGS["SIDSTREAM_SHOPPERS__BATCH"]})
    window = AgentsSettings.model_validate({}).attribution_window_s
    assert shop.batch * shop.session_spacing_s < window


def test_a_trial_of_fewer_sessions_has_less_power() -> None:
    few, many = (planned_trial(settings(), BEFORE, sessions, EVERYBODY) for sessions in (1_000, 6_000))
    assert few["users"] < many["users"]
    assert few["power"] < many["power"]
    assert few["users"] < few["users_needed"]


@pytest.mark.parametrize("counts", [(0, 0, 0), (100, 20, 0), (100, 20, 20)])
def test_what_was_not_bought_or_always_bought_is_not_planned(counts: tuple[int, int, int]) -> None:
    arm = dict(zip(("shown", "clicks", "purchases"), counts, strict=True))
    planned = planned_trial(settings(), {"arms": {"champion b": arm}}, 300, EVERYBODY)
    assert planned["users_needed"] is None
    assert planned["power"] is None


def test_visitors_of_median_activity_come_first() -> None:
    pasts = {"a": ["1"], "b": ["1", "2"], "c": ["1", "2", "3"], "d": ["4"] * 9, "e": ["5"] * 30}
    assert _visitors(pasts)[0] == ("c", "3")
    assert {user for user, _ in _visitors(pasts)} == set(pasts)


class Desk:
    """Answers each user from an arm."""

    def __init__(self, arms: dict[str, str]) -> None:
        self.arms = arms

    def ask(self, trigger: Any, timeout: float) -> Any:
        return SimpleNamespace(arm=self.arms[trigger.user_id], items=[SimpleNamespace(item_id="x")])


def test_the_last_act_is_about_a_user_whom_the_champion_answers() -> None:
    pasts = {"a": ["1"], "b": ["1", "2"], "c": ["1", "2", "3"]}
    desk: Any = Desk({"b": "challenger-sft", "a": "anchor", "c": "champion"})
    assert _answered_by_champion(desk, pasts, 0.02) == ("c", "3", ["x"])
    desk = Desk(dict.fromkeys(pasts, "anchor"))
    with pytest.raises(SidstreamError, match="ROLLOUT__CHAMPION"):
        _answered_by_champion(desk, pasts, 0.02)


def test_the_last_act_is_of_a_user_who_is_not_held_out() -> None:
    users = [f"u{number}" for number in range(200)]
    held_out = [user for user in users if is_held_out(user, 0.5)]
    free = next(user for user in users if user not in held_out)
    # In the first trial there is no arm for the hold-out yet: the champion answers them, too.
    desk: Any = Desk(dict.fromkeys(users, "champion"))
    pasts = {user: ["a"] for user in (*held_out, free)}
    assert len(pasts) > 80
    assert _answered_by_champion(desk, pasts, 0.5) == (free, "a", ["x"])
