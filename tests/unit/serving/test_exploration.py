"""An explored answer's first item was drawn with the logged probability; other answers are as before."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from registry.decoding.beam import beam_search
from registry.decoding.list_rules import ListLimits
from registry.decoding.sid_index import SidIndex
from serving.exploration import Explorer, draw_candidate, propensities
from serving.recommender import Recommender, Request
from streams.events import Arm, Exploration, decode, encode
from tests.unit.serving.test_recommender import BOOK, Failing, history_of, loaded_rollout, trigger

SIZES = (4, 4)
SIDS = list(itertools.product(range(4), repeat=2))
ITEMS = [f"i{a}{b}" for a, b in SIDS]
# A rank score is a sum of log-probabilities: 0 or less, and float32.
SCORES = st.lists(st.floats(-80, 0, width=32), min_size=1, max_size=60)
TEMPERATURES = st.floats(0.01, 100)


class Prompted:
    """Log-probabilities drawn by the prompt's last SID and the prefix: each request ranks otherwise."""

    sizes = SIZES

    def encode(self, prompts):
        return np.array([prompt[-1] if prompt else (9, 9) for prompt in prompts])

    def step(self, state, prefix):
        return np.stack(
            [
                self.row(*map(int, last_sid), *map(int, codes))
                for last_sid, codes in zip(state, prefix, strict=True)
            ]
        )

    def row(self, *seed):
        logits = np.random.default_rng(seed).normal(size=6) * 2
        return (logits - np.log(np.exp(logits).sum()))[:4].astype(np.float32)


INDEX = SidIndex.build(np.array(SIDS), ITEMS)


def recommender(explorer, beam=3):
    return Recommender(lambda _: INDEX, ListLimits(beam), explorer)


def requests_of(count, k=3):
    """`count` requests, each opened from another item."""
    return [
        Request(trigger(request_id=f"r{n}", item_id=ITEMS[n % 16], k=k), history_of(SIDS[n // 16 % 16]))
        for n in range(count)
    ]


def ranking(request, k, beam):
    """Items and scores as a beam search alone answers them, best first."""
    sid = SIDS[ITEMS.index(request.trigger.item_id)]
    ranked = beam_search(Prompted(), INDEX, [[sid]], [{INDEX.leaf_of_sid(sid)}], [k], beam)[0]
    return list(zip([INDEX.item(leaf) for leaf in ranked.leaves], ranked.scores.tolist(), strict=True))


def items_and_scores(answer):
    return [(item.item_id, item.score) for item in answer.recommendation.items]


@given(SCORES, TEMPERATURES)
def test_the_chances_are_a_softmax_that_sums_to_one(scores, temperature):
    chances = propensities(scores, temperature)
    assert chances.sum() == pytest.approx(1)
    top = max(scores)
    weights = [math.exp((score - top) / temperature) for score in scores]
    assert chances.tolist() == pytest.approx([weight / math.fsum(weights) for weight in weights])


@given(SCORES, TEMPERATURES, st.text(min_size=1, max_size=20))
def test_what_is_drawn_had_a_chance_and_the_same_request_draws_it_again(scores, temperature, request_id):
    assume(request_id.isprintable())
    drawn = draw_candidate(scores, temperature, request_id)
    assert drawn.propensity == propensities(scores, temperature)[drawn.position] > 0
    assert draw_candidate(list(scores), temperature, request_id) == drawn


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("portion", [1.0, 0.05])
def test_items_are_drawn_as_often_as_their_chances_say(temperature, portion):
    """Also among the few requests that are explored: the two hashes have nothing to do with one another."""
    scores = [-0.5, -1.0, -1.2, -2.5, -4.0, -4.0, -7.0]
    explorer = Explorer(portion, 7, temperature)
    ids = [f"r{n}" for n in range(round(20_000 / portion)) if explorer.explores(f"r{n}")]
    assert len(ids) == pytest.approx(20_000, rel=0.03)
    counts = Counter(draw_candidate(scores, temperature, request_id).position for request_id in ids)
    for place, chance in enumerate(propensities(scores, temperature)):
        error = math.sqrt(chance * (1 - chance) / len(ids))
        assert counts[place] / len(ids) == pytest.approx(chance, abs=4 * error)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(2, 20), st.integers(1, 20), TEMPERATURES)
def test_an_explored_answer_is_the_ranking_with_one_of_its_best_moved_to_the_front(
    k, candidates, beam, temperature
):
    requests = requests_of(6, k)
    answers = recommender(Explorer(1, candidates, temperature), beam).recommend(
        requests, loaded_rollout(Prompted())
    )
    for request, answer in zip(requests, answers, strict=True):
        event = answer.exploration
        full = ranking(request, max(k, candidates), beam)
        best = full[:candidates]
        first = best[event.chosen]
        assert items_and_scores(answer) == [first, *(item for item in full if item != first)][:k]
        assert event.candidates == [list(SIDS[ITEMS.index(item)]) for item, _ in best]
        assert event.scores == [score for _, score in best]
        assert event.item_id == first[0]
        assert event.propensity == propensities(event.scores, temperature)[event.chosen]
        assert decode(Exploration, encode(event)) == event


def test_an_exploration_names_all_that_an_estimate_needs():
    request = Request(
        trigger(request_id="r9", user_id="u9", item_id="i12", ts=10**12), history_of((0, 1), (3, 3))
    )
    answer = recommender(Explorer(1, 5, 2.0)).recommend([request], loaded_rollout(Prompted()))[0]
    event = answer.exploration
    assert (event.request_id, event.user_id, event.ts, event.temperature) == ("r9", "u9", 10**12, 2.0)
    assert (event.bundle, event.arm, event.trial, event.codebook) == ("b0", "champion", "t1", BOOK)
    assert event.prompt == [[0, 1], [3, 3], [1, 2]]
    assert len(event.candidates) == 5


def test_the_same_request_is_explored_alike_and_its_event_is_the_same():
    requests = requests_of(5)
    first = recommender(Explorer(1, 10, 1.0)).recommend(requests, loaded_rollout(Prompted()))
    second = recommender(Explorer(1, 10, 1.0)).recommend(requests[::-1], loaded_rollout(Prompted()))[::-1]
    assert [answer.exploration for answer in first] == [answer.exploration for answer in second]
    assert len({answer.exploration.event_id for answer in first}) == 5


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20))
def test_without_exploration_an_answer_is_the_ranking_to_the_last_bit(k, beam):
    requests = requests_of(8, k)
    answers = recommender(Explorer(0, 16, 1.0), beam).recommend(requests, loaded_rollout(Prompted()))
    assert [items_and_scores(answer) for answer in answers] == [
        ranking(request, k, beam) for request in requests
    ]
    assert {answer.exploration for answer in answers} == {None}


def test_requests_that_are_not_explored_are_answered_as_if_none_were():
    requests = requests_of(200)
    explored = recommender(Explorer(0.3, 16, 5.0)).recommend(requests, loaded_rollout(Prompted()))
    plain = recommender(Explorer(0, 16, 5.0)).recommend(requests, loaded_rollout(Prompted()))
    alone = [
        (items_and_scores(answer), items_and_scores(other))
        for answer, other in zip(explored, plain, strict=True)
        if not answer.exploration
    ]
    assert 100 < len(alone) < 180
    assert all(answer == other for answer, other in alone)


def test_every_arm_explores_the_same_requests():
    def explored(arm):
        requests = requests_of(100)
        answers = recommender(Explorer(0.3, 5, 1.0)).recommend(
            requests, loaded_rollout(Prompted(), names=(arm,))
        )
        assert {answer.exploration.arm for answer in answers if answer.exploration} == {arm}
        return [answer.exploration is not None for answer in answers]

    assert explored("champion") == explored("anchor")


def test_items_that_the_model_rules_out_are_no_candidates():
    class Narrow(Prompted):
        def row(self, *seed):
            log_probs = super().row(*seed)
            log_probs[2:] = -np.inf
            return log_probs

    answers = recommender(Explorer(1, 16, 100.0), beam=16).recommend(
        requests_of(50, k=16), loaded_rollout(Narrow())
    )
    for answer in answers:
        assert 3 <= len(answer.exploration.candidates) <= 4
        assert max(map(max, answer.exploration.candidates)) <= 1
        assert len({item for item, _ in items_and_scores(answer)}) == 15


def test_nothing_is_explored_where_no_model_answered():
    poisoned = Request(trigger(request_id="r1", item_id="i22"), None)
    unknown = Request(trigger(request_id="r2"), None)
    left_out = Request(trigger(request_id="r3", item_id="i00", exclude=ITEMS), None)
    fine = Request(trigger(request_id="r4", item_id="i00"), None)
    small = SidIndex.build(
        np.array(list(itertools.product(range(3), repeat=2))), [name for name in ITEMS if "3" not in name]
    )
    tested = Recommender(lambda _: small, ListLimits(3), Explorer(1, 4, 1.0))
    answers = tested.recommend([poisoned, unknown, left_out, fine], loaded_rollout(Failing()))
    assert [answer.recommendation.fallback for answer in answers] == [
        "popular",
        "popular",
        "no_catalog",
        "trigger_only",
    ]
    assert [answer.exploration is None for answer in answers] == [True, True, True, False]


def test_a_shadow_explores_nothing():
    arm = Arm(name="champion", bundle="b0", weight=1, version="1")
    answers = recommender(Explorer(1, 16, 1.0)).shadow(requests_of(5), loaded_rollout(Prompted()), arm)
    assert {answer.exploration for answer in answers} == {None}
