"""The beam finds what an exhaustive search finds, and never an item that is inactive or excluded."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.decoding.beam import beam_search
from registry.decoding.sid_index import SidIndex


class Table:
    """Log-probabilities drawn by (prompt, prefix), normalised over a vocabulary wider than the codes."""

    def __init__(self, sizes, seed=0):
        self.sizes = tuple(sizes)
        self.seed = seed
        self.calls = []

    def encode(self, prompts):
        return np.array([sum(sum(sid) + 7 for sid in prompt) for prompt in prompts], dtype=np.int64)

    def row(self, state, prefix):
        rng = np.random.default_rng([self.seed, int(state), len(prefix), *map(int, prefix)])
        logits = rng.normal(size=self.sizes[len(prefix)] + 5)
        return (logits - np.log(np.exp(logits).sum()))[: self.sizes[len(prefix)]].astype(np.float32)

    def step(self, state, prefix):
        self.calls.append(prefix.shape)
        return np.stack([self.row(s, p) for s, p in zip(state, prefix, strict=True)])


class Level:
    """A generator for which every code of a level is as likely as any other."""

    def __init__(self, sizes):
        self.sizes = tuple(sizes)
        self.rows = []

    def encode(self, prompts):
        return np.zeros((len(prompts), 1))

    def step(self, state, prefix):
        self.rows.append(len(state))
        return np.full((len(state), self.sizes[prefix.shape[1]]), -1.0, dtype=np.float32)


def exhaustive(generator, prompt, sids):
    """Every SID with its score, summed in float32 from the first code on, best first, then by SID."""
    state = generator.encode([prompt])[0]
    scored = []
    for sid in sids:
        score = np.float32(0)
        for level, code in enumerate(sid):
            score = score + generator.row(state, sid[:level])[code]
        scored.append((-score, tuple(sid)))
    return [(sid, -score) for score, sid in sorted(scored)]


@st.composite
def catalogues(draw):
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=3))
    space = list(itertools.product(*(range(size) for size in sizes)))
    sids = draw(st.lists(st.sampled_from(space), min_size=1, max_size=40, unique=True))
    active = draw(st.lists(st.booleans(), min_size=len(sids), max_size=len(sids)))
    requests = draw(
        st.lists(
            st.tuples(
                st.lists(st.sampled_from(space), max_size=3),
                st.sets(st.integers(0, len(sids) - 1)),
                st.integers(1, 8),
            ),
            min_size=1, max_size=4,
        )
    )  # fmt: skip
    return sizes, sids, np.array(active), requests


def answers(generator, index, requests, beam):
    rankings = beam_search(
        generator, index,
        [prompt for prompt, _, _ in requests],
        [[index.leaf_of(str(row)) for row in rows] for _, rows, _ in requests],
        [k for _, _, k in requests], beam,
    )  # fmt: skip
    return [[tuple(index.sid(leaf)) for leaf in ranking.leaves] for ranking in rankings], rankings


def make(sids, active=None):
    return SidIndex.build(np.array(sids), [str(row) for row in range(len(sids))], active)


@settings(max_examples=150, deadline=None)
@given(catalogues())
def test_a_beam_as_wide_as_the_catalogue_is_the_exhaustive_search(case):
    sizes, sids, active, requests = case
    generator = Table(sizes)
    answered_sids, rankings = answers(generator, make(sids, active), requests, beam=len(sids))
    for (prompt, excluded, k), answered, ranking in zip(requests, answered_sids, rankings, strict=True):
        allowed = [sid for row, sid in enumerate(sids) if active[row] and row not in excluded]
        expected = exhaustive(generator, prompt, allowed)[:k]
        assert answered == [sid for sid, _ in expected]
        assert ranking.scores.tolist() == [score for _, score in expected]


@settings(max_examples=150, deadline=None)
@given(catalogues(), st.integers(1, 3))
def test_a_narrow_beam_answers_k_allowed_items_whenever_k_are_allowed(case, beam):
    sizes, sids, active, requests = case
    answered_sids, _ = answers(Table(sizes), make(sids, active), requests, beam)
    for (_, excluded, k), answered in zip(requests, answered_sids, strict=True):
        allowed = {sid for row, sid in enumerate(sids) if active[row] and row not in excluded}
        assert set(answered) <= allowed
        assert len(answered) == len(set(answered)) == min(k, len(allowed))


@settings(max_examples=50, deadline=None)
@given(catalogues(), st.integers(1, 5))
def test_requests_in_one_call_get_the_answers_they_would_get_alone(case, beam):
    sizes, sids, active, requests = case
    index = make(sids, active)
    together, _ = answers(Table(sizes), index, requests, beam)
    assert together == [answers(Table(sizes), index, [request], beam)[0][0] for request in requests]


def test_equal_scores_go_to_the_lower_sid():
    sids = [(a, b) for a in range(4) for b in range(4)][::-1]
    generator = Level((4, 4, 4))
    index = make([(a, b, c) for a, b in sids for c in range(4)])
    answered_sids, _ = answers(generator, index, [([], set(), 5)], beam=2)
    assert answered_sids == [[(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 1, 0)]]
    # Equal scores do not widen the beam.
    assert generator.rows == [1, 4, 5]


def test_the_generator_is_called_once_a_level_for_all_beams_of_all_requests():
    generator = Table((3, 3, 3))
    sids = list(itertools.product(range(3), repeat=3))
    answers(generator, make(sids), [([], set(), 2), ([sids[4]], set(), 4)], beam=2)
    assert generator.calls == [(2, 0), (5, 1), (6, 2)]


def test_a_request_without_an_allowed_item_does_not_disturb_its_neighbours():
    sids = [(0, 0), (0, 1), (1, 0)]
    generator = Table((2, 2))
    requests = [([], {0, 1, 2}, 3), ([(0, 0)], set(), 3)]
    answered_sids, _ = answers(generator, make(sids), requests, beam=3)
    assert answered_sids == [[], [sid for sid, _ in exhaustive(generator, [(0, 0)], sids)]]


def test_invalid_mass_is_the_probability_on_codes_without_an_allowed_item():
    generator = Table((3, 2))
    _, rankings = answers(generator, make([(0, 0), (0, 1), (2, 1)]), [([], {2}, 2)], beam=2)
    state = generator.encode([[]])[0]
    first = 1 - float(np.exp(generator.row(state, ())[0]))
    second = 1 - float(np.exp(generator.row(state, (0,))).sum())
    assert rankings[0].invalid_mass == pytest.approx((first, second), abs=1e-6)


def test_a_model_that_answers_nan_is_refused():
    generator = Level((2,))
    generator.step = lambda state, prefix: np.full((len(state), 2), np.nan, dtype=np.float32)
    with pytest.raises(ValueError, match="level 0 are not numbers"):
        answers(generator, make([(0,), (1,)]), [([], set(), 1)], beam=2)
