"""What is counted of an arm's model is what its answers took and lost; shadows count and disturb nobody."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.decoding.list_rules import ListLimits
from registry.experiment.health import BOUNDS_MS
from serving.bundle_loader import LoadedBundle, LoadedRollout
from serving.exploration import Explorer
from serving.model_health import count_by_trial
from serving.recommender import Answer, Recommender, Request
from serving.shadow import Shadow
from streams.events import Arm, Recommendation, Rollout
from tests.unit.serving.test_recommender import (
    BOOK,
    Failing,
    Last,
    history_of,
    loaded_rollout,
    sid_index,
    trigger,
)


def answer(arm="champion", trial="t1", **fields):
    recommendation = Recommendation.new(request_id="r", user_id="u", items=[], arm=arm, trial=trial)
    return Answer(recommendation, **fields)


ARMS = st.sampled_from(["champion", "challenger-sft", "anchor"])
ANSWERED = st.builds(
    answer, ARMS, st.sampled_from(["t1", "t2"]), model_s=st.floats(0, 10),
    invalid_mass=st.lists(st.floats(0, 1), min_size=1, max_size=4).map(tuple),
)  # fmt: skip
FAILED = st.builds(
    answer, ARMS, st.sampled_from(["t1", "t2"]), model_s=st.floats(0, 10), model_failed=st.just(True)
)
WITHOUT_MODEL = st.builds(answer, ARMS, st.just("t1")) | st.just(answer(None, None))


@given(st.lists(ANSWERED | FAILED | WITHOUT_MODEL, max_size=30))
def test_every_call_of_a_model_is_in_one_class_of_times_and_every_failure_is_counted(answers):
    counts = count_by_trial(answers)
    for trial, arm in itertools.product(["t1", "t2"], ["champion", "challenger-sft", "anchor"]):
        fields = counts.get(trial, {})
        here = [
            answer
            for answer in answers
            if (answer.recommendation.trial, answer.recommendation.arm) == (trial, arm)
        ]
        times = [answer.model_s for answer in here if answer.model_s is not None]
        took = [1000 * seconds for seconds in set(times)]
        assert fields.get(f"{arm}:n", 0) == len(times)
        assert fields.get(f"{arm}:failed", 0) == sum(answer.model_failed for answer in here)
        below = -1.0
        for bound in BOUNDS_MS:
            inside = sum(below < time <= bound for time in took)
            assert fields.get(f"{arm}:le:{bound:g}", 0) == inside
            below = bound


@pytest.mark.parametrize(
    ("seconds", "bound"), [(0.0, "1"), (0.001, "1"), (0.0011, "2"), (0.5, "500"), (5, "5000"), (5.1, "inf")]
)
def test_a_time_is_counted_by_the_smallest_bound_that_it_keeps(seconds, bound):
    fields = count_by_trial([answer(model_s=seconds)])["t1"]
    assert [name for name in fields if ":le:" in name] == [f"champion:le:{bound}"]


def test_the_chance_of_no_item_at_all_is_summed_in_millionths():
    answers = [answer(model_s=0.1, invalid_mass=(0.5, 0.2)), answer(model_s=0.1, invalid_mass=(0.0, 0.1))]
    assert count_by_trial(answers)["t1"]["champion:invalid"] == 600_000 + 100_000


def ticking():
    """A clock that is some half of a second further at each look, never twice the same."""
    times = itertools.count()
    return lambda: 0.5 * (n := next(times)) + n * n / 1024


def recommender():
    return Recommender(lambda _: sid_index(), ListLimits(9), Explorer(0, 2, 1.0), clock=ticking())


def test_the_time_of_a_call_counts_once_for_all_its_requests():
    serving = loaded_rollout(Last(), names=("champion", "challenger-sft"), bundles=("b0", "b0"))
    requests = [Request(trigger(user_id=f"u{n}", item_id="i00"), None) for n in range(20)]
    fields = count_by_trial(recommender().recommend(requests, serving))["t1"]
    assert fields["champion:n"] + fields["challenger-sft:n"] == 20
    assert (fields["champion:le:1000"], fields["challenger-sft:le:1000"]) == (1, 1)


def test_a_request_of_a_failed_batch_counts_once_answered_or_failed():
    requests = [Request(trigger(item_id=item), None) for item in ("i00", "i22", "i11")]
    fields = count_by_trial(recommender().recommend(requests, loaded_rollout(Failing())))["t1"]
    assert (fields["champion:n"], fields["champion:failed"], fields["champion:le:1000"]) == (3, 1, 3)


def test_answers_that_no_model_was_asked_for_or_could_give_count_nowhere():
    unknown = Request(trigger(), None)
    nothing_left = Request(
        trigger(item_id="i00", exclude=[f"i{a}{b}" for a in range(3) for b in range(3)]), None
    )
    assert count_by_trial(recommender().recommend([unknown, nothing_left], loaded_rollout(Last()))) == {}
    assert count_by_trial(recommender().recommend([unknown], None)) == {}


class RecordedAnswers:
    """Stands for the recorder of model health: keeps the answers that it gets."""

    def __init__(self):
        self.answers = []
        self.news = asyncio.Event()

    def count(self, answers):
        self.answers += answers
        self.news.set()

    def arms(self):
        return [(answer.recommendation.arm, answer.recommendation.request_id) for answer in self.answers]


class Blocking(Last):
    """A model that answers once `go` is set."""

    def __init__(self):
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def encode(self, prompts):
        self.begun.set()
        assert self.go.wait(30)
        return super().encode(prompts)


def on_trial(challenger, weight=0.0):
    """A champion that serves everybody, and a challenger beside it."""
    arms = [
        Arm(name="champion", bundle="b0", weight=1.0, version="1"),
        Arm(name="challenger-sft", bundle="b1", weight=weight, version="2"),
    ]
    rollout = Rollout.new(name="sidstream", action="trial", trial="t1", step=weight, arms=arms)
    models = {"b0": Last(), "b1": challenger}
    return LoadedRollout(
        rollout, {name: LoadedBundle(name, BOOK, 4, (), model) for name, model in models.items()}
    )


def requests_of(count):
    return [
        Request(trigger(request_id=f"r{n}", user_id=f"u{n}", item_id="i00"), history_of((0, 0)))
        for n in range(count)
    ]


def run(story):
    return asyncio.run(asyncio.wait_for(story, 30))


async def shadowed(challenger, portion=1.0, busy=lambda: False, weight=0.0, count=50):
    """Offer a batch to the shadow and wait for its end; returns the recorded answers."""
    recorded = RecordedAnswers()
    shadow = Shadow(recommender(), recorded, portion, busy)
    shadow.offer(requests_of(count), on_trial(challenger, weight))
    await shadow.stop()
    return recorded


def test_a_shadow_answers_for_its_arm_and_every_arm_with_users_for_itself():
    recorded = run(shadowed(Last()))
    assert recorded.arms() == [("challenger-sft", f"r{n}") for n in range(50)]
    assert {answer.recommendation.bundle for answer in recorded.answers} == {"b1"}
    assert run(shadowed(Last(), weight=0.1)).answers == []


def test_the_same_share_of_requests_is_shadowed_again():
    first, second = run(shadowed(Last(), 0.1, count=2000)), run(shadowed(Last(), 0.1, count=2000))
    assert first.arms() == second.arms()
    assert len(first.answers) == pytest.approx(200, abs=50)
    assert run(shadowed(Last(), 0.0)).answers == []


def test_no_shadow_while_requests_wait():
    assert run(shadowed(Last(), busy=lambda: True)).answers == []


def test_a_shadow_whose_model_fails_is_counted_as_failed():
    class Broken(Last):
        def encode(self, prompts):
            raise RuntimeError("no answer")

    recorded = run(shadowed(Broken(), count=3))
    counts = count_by_trial(recorded.answers)["t1"]
    assert (counts["challenger-sft:n"], counts["challenger-sft:failed"]) == (3, 3)
    assert "challenger-sft:invalid" not in counts


def test_batches_that_come_while_a_shadow_runs_are_not_shadowed():
    async def story():
        recorded, model = RecordedAnswers(), Blocking()
        serving = on_trial(model)
        shadow = Shadow(recommender(), recorded, 1.0, lambda: False)
        first, second, third = requests_of(3)
        shadow.offer([first], serving)
        await asyncio.to_thread(model.begun.wait, 30)
        shadow.offer([second], serving)
        model.go.set()
        await shadow.stop()
        shadow.offer([third], serving)
        await shadow.stop()
        return recorded.arms()

    assert run(story()) == [("challenger-sft", "r0"), ("challenger-sft", "r2")]


def test_a_defect_in_a_shadow_ends_that_shadow_only(caplog):
    async def story():
        recorded = RecordedAnswers()
        shadow = Shadow(recommender(), recorded, 1.0, lambda: False)
        whole = on_trial(Last())
        lacking = LoadedRollout(whole.rollout, {"b0": whole.bundles["b0"]})
        shadow.offer(requests_of(2), lacking)
        await shadow.stop()
        shadow.offer(requests_of(2), whole)
        await shadow.stop()
        return len(recorded.answers)

    assert run(story()) == 2
    assert "challenger-sft" in caplog.text
