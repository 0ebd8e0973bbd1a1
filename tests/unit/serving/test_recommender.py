"""Every request gets an answer, and the answer says what it was made of."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from registry.bundles.context import Context
from registry.bundles.prompt import prompt_sids
from registry.bundles.ranking import RepeatRule
from registry.bundles.rewards import Rewards
from registry.decoding.list_rules import ListLimits
from registry.decoding.sid_index import SidIndex
from registry.releases.rollout import assign
from serving.bundle_loader import LoadedBundle, LoadedRollout
from serving.exploration import Explorer
from serving.recommender import Recommender, Request
from streams.events import Arm, Rollout, Trigger, UserProfile
from streams.settings import HistorySettings
from streams.state import history, profile

BOOK, OTHER_BOOK = "00000000aaaaaaaa", "11111111bbbbbbbb"
SIZES = (3, 3)
SIDS = list(itertools.product(range(3), repeat=2))
ITEMS = [f"i{a}{b}" for a, b in SIDS]
NO_EXPLORATION = Explorer(0, 50, 1.0)


class Last:
    """Prefers the codes that follow the last SID of the prompt: (a, b) -> (a + 1, b + 1), modulo 3."""

    sizes = SIZES

    def __init__(self):
        self.prompts = []

    def encode(self, prompts):
        self.prompts += [list(prompt) for prompt in prompts]
        return np.array([prompt[-1] if prompt else (0, 0) for prompt in prompts])

    def step(self, state, prefix):
        level = prefix.shape[1]
        logits = -np.abs(np.arange(3)[None, :] - (state[:, level : level + 1] + 1) % 3).astype(np.float32)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


class RecordsContexts(Last):
    """Records the contexts of its last call; False: it was called without that argument."""

    def encode(self, prompts, contexts=False):
        self.contexts = contexts
        return super().encode(prompts)


class Failing(Last):
    """Fails on prompts that hold SID (2, 2)."""

    def encode(self, prompts):
        if any((2, 2) in prompt for prompt in prompts):
            raise RuntimeError("no answer")
        return super().encode(prompts)


def sid_index(active=None, sids=SIDS, items=ITEMS):
    return SidIndex.build(np.array(sids).reshape(-1, 2), items, active)


def loaded_rollout(generator, popular=(), names=("champion",), bundles=("b0",)):
    arms = [
        Arm(name=name, bundle=bundle, weight=1 / len(names), version="1")
        for name, bundle in zip(names, bundles, strict=True)
    ]
    rollout = Rollout.new(name="sidstream", action="start", trial="t1", arms=arms)
    loaded = {bundle: LoadedBundle(bundle, BOOK, 4, tuple(popular), generator) for bundle in bundles}
    return LoadedRollout(rollout, loaded)


def history_of(*sids, codebook=BOOK):
    changes = [
        history.HistoryChange(None, 0, history.pack_entry(10**12 + at, 1, f"e{at}", history.pack_sid(sid)))
        for at, sid in enumerate(sids)
    ]
    value, _, _ = history.apply_changes(
        None, changes, codebook=codebook, levels=2, incarnations={"clicks": 1, "purchases": 1},
        bounds=HistorySettings(),
    )  # fmt: skip
    return value


def trigger(**fields):
    return Trigger.new(**{"request_id": "r", "user_id": "u", "k": 3, **fields})


def recommender(index=None, repeat=None, beam=9):
    index = sid_index() if index is None else index
    indexes = {BOOK: index, None: index}
    return Recommender(indexes.get, ListLimits(beam, repeats=repeat), NO_EXPLORATION)


def ask(request_trigger, packed_history=None, index=None, serving=None, **options):
    serving = loaded_rollout(Last()) if serving is None else serving
    return (
        recommender(index, **options)
        .recommend([Request(request_trigger, packed_history)], serving)[0]
        .recommendation
    )


def ids(answer):
    return [item.item_id for item in answer.items]


def test_history_and_trigger_together_are_no_fallback_and_the_prompt_holds_both():
    generator = Last()
    answer = ask(trigger(item_id="i11"), history_of((0, 0), (2, 0)), serving=loaded_rollout(generator))
    assert answer.fallback is None
    assert generator.prompts == [prompt_sids([(0, 0), (2, 0)], (1, 1), 4)]
    assert ids(answer)[0] == "i22"
    assert (answer.bundle, answer.arm, answer.trial) == ("b0", "champion", "t1")
    assert answer.items[0].sid == [2, 2]
    assert [item.score for item in answer.items] == sorted((i.score for i in answer.items), reverse=True)


def test_a_user_without_history_is_answered_from_the_trigger_item():
    answer = ask(trigger(item_id="i00"))
    assert (answer.fallback, ids(answer)[0]) == ("trigger_only", "i11")


@pytest.mark.parametrize("item", [None, "unheard-of"])
def test_an_unknown_trigger_item_leaves_the_history(item):
    answer = ask(trigger(item_id=item), history_of((0, 0)))
    assert (answer.fallback, ids(answer)[0]) == ("history_only", "i11")
    assert answer.trigger_item_id == item


def test_neither_history_nor_trigger_gives_the_active_popular_items_then_the_rest_by_sid():
    active = np.array([item != "i01" for item in ITEMS])
    popular = ["i22", "i01", "gone", "i12", "i22"]
    answer = ask(
        trigger(k=5, exclude=["i12"]),
        index=sid_index(active),
        serving=loaded_rollout(Last(), popular=popular),
    )
    assert (answer.fallback, ids(answer)) == ("popular", ["i22", "i00", "i02", "i10", "i11"])
    assert [item.score for item in answer.items] == [0, -1, -2, -3, -4]
    assert (answer.bundle, answer.arm) == ("b0", "champion")


def test_without_a_bundle_active_items_are_answered_and_no_model_is_named():
    answer = (
        recommender().recommend([Request(trigger(item_id="i00"), history_of((1, 1)))], None)[0].recommendation
    )
    assert (answer.fallback, ids(answer)) == ("popular", ["i01", "i02", "i10"])
    assert (answer.bundle, answer.arm, answer.trial) == (None, None, None)


@pytest.mark.parametrize(
    "index", [sid_index(np.zeros(9, dtype=bool)), sid_index(sids=[], items=[])], ids=["inactive", "empty"]
)
@pytest.mark.parametrize("serving", [loaded_rollout(Last()), None], ids=["bundle", "no bundle"])
def test_a_catalogue_without_an_active_item_is_named_as_the_reason_of_an_empty_answer(index, serving):
    answer = recommender(index).recommend([Request(trigger(item_id="i00"), history_of((1, 1)))], serving)[0]
    assert (answer.recommendation.fallback, answer.recommendation.items) == ("no_catalog", [])


def test_a_bundle_without_an_index_answers_that_there_is_no_catalogue():
    answers = Recommender(lambda _: None, ListLimits(5), NO_EXPLORATION).recommend(
        [Request(trigger(), None)], loaded_rollout(Last())
    )
    assert answers[0].recommendation.fallback == "no_catalog"


def test_the_trigger_item_and_exclusions_are_never_answered():
    excluded = ["i11", "i12", "i21"]
    answer = ask(trigger(item_id="i00", exclude=excluded, k=9), history_of((0, 0)))
    assert set(ids(answer)) == set(ITEMS) - {"i00", *excluded}


@pytest.mark.parametrize(
    ("repeat", "repeated"), [(RepeatRule(), True), (RepeatRule(repeats="never"), False), (None, True)]
)
def test_whether_past_items_come_again_is_a_setting(repeat, repeated):
    answer = ask(trigger(k=9), history_of((0, 0), (1, 1)), repeat=repeat)
    assert ({"i00", "i11"} <= set(ids(answer))) == repeated
    assert len(ids(answer)) == (9 if repeated else 7)


def test_a_history_under_another_codebook_is_not_used_where_its_sids_are_not_known():
    assert ask(trigger(item_id="i00"), history_of((1, 1), codebook=OTHER_BOOK)).fallback == "trigger_only"


def test_a_history_is_translated_into_the_codebook_of_each_bundle():
    # Under the other codebook an item's codes are swapped; (2, 1) has no item there.
    def translator(codebook):
        def translate(tag, packed):
            a, b = history.unpack_sid(packed)
            return None if (a, b) == (1, 2) else history.pack_sid((b, a))

        return translate

    index = sid_index()
    foreign_history, generator = history_of((0, 1), (1, 2), (2, 0), codebook=OTHER_BOOK), Last()
    tested = Recommender(
        {BOOK: index}.get,
        ListLimits(9, repeats=RepeatRule(repeats="never")),
        NO_EXPLORATION,
        translator=translator,
    )
    (answer,) = tested.recommend([Request(trigger(k=9), foreign_history)], loaded_rollout(generator))
    assert generator.prompts == [[(1, 0), (0, 2)]]
    assert not {"i10", "i02"} & set(ids(answer.recommendation)), "what the user knows is not repeated"
    own = Last()
    tested.recommend([Request(trigger(), history_of((0, 1), (1, 2), codebook=BOOK))], loaded_rollout(own))
    assert own.prompts == [[(0, 1), (1, 2)]]


@pytest.mark.parametrize("value", [b"\xff" * 40, b"\x01", b"\x01\x02\x00\x00\x00\x00" + bytes(21)])
def test_a_history_that_cannot_be_read_is_as_none(value, caplog):
    answer = ask(trigger(item_id="i00", user_id="somebody"), value)
    assert answer.fallback == "trigger_only"
    assert "somebody" not in caplog.text


def test_each_user_is_answered_by_the_bundle_of_its_arm_and_order_is_kept():
    serving = loaded_rollout(Last(), names=("champion", "challenger-sft"), bundles=("b0", "b1"))
    requests = [Request(trigger(user_id=f"u{n}", request_id=f"r{n}", item_id="i00"), None) for n in range(30)]
    answers = [answer.recommendation for answer in recommender().recommend(requests, serving)]
    assert [answer.request_id for answer in answers] == [f"r{n}" for n in range(30)]
    for answer in answers:
        arm = assign("t1", answer.user_id, serving.rollout.arms)
        assert (answer.arm, answer.bundle) == (arm.name, arm.bundle)
    assert {answer.arm for answer in answers} == {"champion", "challenger-sft"}


def test_all_steps_of_a_trial_deal_users_by_one_salt():
    serving = loaded_rollout(Last(), names=("champion", "challenger-sft"), bundles=("b0", "b1"))
    rollout = Rollout.new(
        name="sidstream", action="trial", trial="t1.step-2", salt="t1", arms=serving.rollout.arms
    )
    requests = [Request(trigger(user_id=f"u{n}", item_id="i00"), None) for n in range(50)]
    for answered in recommender().recommend(requests, LoadedRollout(rollout, serving.bundles)):
        answer = answered.recommendation
        assert (answer.arm, answer.trial) == (assign("t1", answer.user_id, rollout.arms).name, "t1.step-2")


def test_a_model_that_fails_on_one_request_costs_only_that_one_its_ranking():
    requests = [
        Request(trigger(request_id="fine", item_id="i00"), None),
        Request(trigger(request_id="poison", item_id="i22"), None),
    ]
    answers = recommender().recommend(requests, loaded_rollout(Failing(), popular=["i10"]))
    fine, poison = (answer.recommendation for answer in answers)
    assert (fine.fallback, ids(fine)[0]) == ("trigger_only", "i11")
    assert (poison.fallback, ids(poison)[0]) == ("popular", "i10")
    assert [answer.model_failed for answer in answers] == [False, True]


def test_a_model_gets_the_scene_and_profile_values_that_its_bundle_has(caplog):
    about = [
        profile.pack_profile(UserProfile.new(user_id="u", attributes={"country": "Peru", "mood": "odd"})),
        None,
        b"\x07not a profile",
        profile.pack_profile(UserProfile.new(user_id="u", attributes={"country": "Mars"})),
    ]  # fmt: skip
    requests = [
        Request(trigger(item_id="i00", scene="home", user_id="somebody"), None, packed) for packed in about
    ]
    generator = RecordsContexts()
    plain = loaded_rollout(generator)
    context = Context(40, {"profile.country": ["Japan", "Peru"], "scene": ["home"]})
    bundle = replace(plain.bundles["b0"], context=context)
    recommender().recommend(requests, LoadedRollout(plain.rollout, {"b0": bundle}))
    assert generator.contexts == [[41, 42], [0, 42], [0, 42], [0, 42]]
    assert "profile of user" in caplog.text
    assert "somebody" not in caplog.text
    caplog.clear()
    recommender().recommend(requests, plain)
    assert generator.contexts is False
    assert not caplog.text


def test_preferences_become_conditions_of_the_model_and_the_answer_names_them():
    generator = RecordsContexts()
    plain = loaded_rollout(generator)
    even = {str(value): 0.25 for value in range(4)}
    context = Context(40, {"scene": ["home"], "reward.price": ["0", "1", "2", "3"]})
    rewards = Rewards({"price": {"": [1.0, 2.0, 3.0]}}, {"price": even})
    bundle = replace(plain.bundles["b0"], context=context, rewards=rewards)
    serving = LoadedRollout(plain.rollout, {"b0": bundle})
    wishes = [None, {"price": 2}, {"click": 1}, {"price": 1}]
    requests = [
        Request(trigger(item_id="i00", scene="home", preferences=wish), history_of((0, 0))) for wish in wishes
    ]
    # Neither history nor trigger item: no model is asked.
    requests.append(Request(trigger(preferences={"price": 1}), None))
    explored = Explorer(1.0, 3, 1.0)
    ask_all = Recommender({BOOK: sid_index(), None: sid_index()}.get, ListLimits(9), explored)
    answers = ask_all.recommend(requests, serving)
    assert generator.contexts == [[40, 0], [40, 44], [40, 0], [40, 44]]
    conditions = [answer.recommendation.conditions for answer in answers]
    assert conditions == [None, {"price": 3}, None, {"price": 3}, None]
    logged_contexts = [answer.exploration.context for answer in answers[:4]]
    assert logged_contexts == [
        {"scene": "home"} | ({"reward.price": "3"} if condition else {}) for condition in conditions[:4]
    ]
    # A bundle that knows no rewards answers as if nothing were preferred.
    bare = LoadedRollout(plain.rollout, {"b0": replace(bundle, context=Context(), rewards=None)})
    assert ask(trigger(preferences={"price": 1}), history_of((0, 0)), serving=bare).conditions is None
