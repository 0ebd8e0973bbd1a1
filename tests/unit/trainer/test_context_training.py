"""A generator learns to follow what a request says, and what is served from it follows too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from registry.bundles.context import Context
from registry.bundles.ranking import Ranking
from registry.decoding.list_rules import ListLimits
from registry.decoding.onnx_generator import OnnxGenerator
from registry.decoding.sid_index import SidIndex
from serving.bundle_loader import LoadedBundle, LoadedRollout
from serving.exploration import Explorer
from serving.recommender import Recommender, Request
from streams.events import Arm, Rollout, Trigger, UserProfile
from streams.settings import HistorySettings
from streams.state import history, profile
from tests.tiny_explorations import exploration
from tests.tiny_shop import SIZES, Shop, shop, sid_of
from trainer.generator.export import TOLERANCE, check_parity, export_generator
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.offpolicy import candidate_scores, logged_explorations
from trainer.offline_checks.quality import evaluate_held_out
from trainer.offline_checks.ranking import CatalogueRanker
from trainer.sequences.batches import SequenceBatch
from trainer.tuning.next_item import sequence_loss
from trainer.tuning.sft import train

BOOK = "00000000aaaaaaaa"


@pytest.fixture(scope="module")
def tiny() -> Shop:
    return shop(users=120, scenes=True, epochs=20, batch_positions=128, lr=1e-2, patience=100)


@pytest.fixture(scope="module")
def model(tiny: Shop) -> GeneratorForCausalLM:
    model = tiny.model()
    train(model, tiny.rows, tiny.sids, tiny.settings)
    return model.eval()


def first(tiny: Shop, model: GeneratorForCausalLM, scene: str | None, item: int) -> int:
    """The best next item after one item."""
    ranker = CatalogueRanker(model, tiny.catalogue.codes, tiny.sids, 10)
    row = np.array([tiny.context.row({} if scene is None else {"scene": scene})], dtype=np.int32)
    history = [np.array([item])]
    return int(ranker.candidates(history, ranker.states(history, row)).order(1.0)[0, 0])


@pytest.mark.learning
def test_the_same_history_is_answered_by_the_scene(tiny: Shop, model: GeneratorForCausalLM) -> None:
    right = [
        (first(tiny, model, "up", at) == at + 1, first(tiny, model, "down", at) == at - 1)
        for at in range(2, 22)
    ]
    assert np.mean(right) > 0.9
    assert first(tiny, model, "nowhere", 7) == first(tiny, model, None, 7)


@pytest.mark.learning
def test_held_out_events_are_judged_under_their_own_context(tiny: Shop, model: GeneratorForCausalLM) -> None:
    held_out = tiny.split.held_out
    with_context = evaluate_held_out(model, held_out, tiny.catalogue, tiny.sids)
    without_context = evaluate_held_out(model, held_out._replace(contexts=None), tiny.catalogue, tiny.sids)
    assert with_context.ndcg10 > 0.9 > without_context.ndcg10
    # Each target has the scene of its own event, which says where it lies.
    step = (
        np.array(
            [target - past[-1] for past, target in zip(held_out.histories, held_out.targets, strict=True)]
        )
        % 24
    )
    up = tiny.context.row({"scene": "up"})[0]
    assert held_out.contexts is not None
    assert [(token == up) for token in held_out.contexts[:, 0].tolist()] == (step == 1).tolist()


@pytest.mark.learning
def test_the_loss_of_a_sequence_is_under_each_targets_own_context(
    tiny: Shop, model: GeneratorForCausalLM
) -> None:
    up, down = tiny.context.row({"scene": "up"}), tiny.context.row({"scene": "down"})
    items, learned = torch.tensor([[4, 5, 4]]), torch.tensor([[True, True, True]])
    table = model.model.items.rows(torch.from_numpy(tiny.catalogue.codes))
    weights = tiny.settings.weights.model_copy(update={"next_sid": 0.0})

    def loss(*tokens: list[int]) -> list[float]:
        """Of each target alone."""
        alone = [torch.eye(3, dtype=torch.bool)[at][None] for at in range(3)]
        pieces = [SequenceBatch(items, one, torch.tensor([tokens])) for one in alone]
        with torch.no_grad():
            return [float(sequence_loss(model, piece, table, weights)) for piece in pieces]

    base, other = loss([0], up, down), loss([0], down, down)
    assert other[0] == base[0]
    assert other[1] > base[1] + 1
    assert other[2] == base[2]
    with torch.no_grad():
        with_context = sequence_loss(
            model, SequenceBatch(items, learned, torch.tensor([[[0], up, down]])), table, weights
        )
    assert float(with_context) == pytest.approx(np.mean(base), rel=1e-4)


def test_pieces_have_each_events_own_context_and_a_share_is_without_any() -> None:
    tiny = shop(users=200, scenes=True, context={"dropout": 0.3})
    of = {}
    for user, begin in enumerate(tiny.log.starts[:-1].tolist()):
        of[user] = tiny.log.items[begin : tiny.log.starts[user + 1]].tolist()
    gone = total = 0
    for piece in tiny.rows.sequence_batches(0):
        assert piece.context is not None
        assert piece.context.shape == (*piece.items.shape, 1)
        there = piece.items >= 0
        assert not piece.context[~there].any()
        for items, tokens, real in zip(piece.items, piece.context[..., 0], there, strict=True):
            event_tokens = tokens[real]
            total += 1
            if not event_tokens.any():
                gone += 1
                continue
            # All or nothing; and the scene of a target says the step that led to it.
            assert bool(event_tokens.all())
            steps = (items[real][1:] - items[real][:-1]) % 24
            up = event_tokens[1:] == tiny.context.row({"scene": "up"})[0]
            assert torch.equal(steps == 1, up)
    assert 0.2 < gone / total < 0.4
    second = [piece.context for piece in tiny.rows.sequence_batches(0)]
    assert all(
        torch.equal(one, piece.context)
        for one, piece in zip(second, tiny.rows.sequence_batches(0), strict=True)
    )
    whole = shop(scenes=True, context={"dropout": 0.0})
    assert all(bool(piece.context[piece.items >= 0].all()) for piece in whole.rows.sequence_batches(0))  # type: ignore[index]
    assert all(piece.context is None for piece in shop().rows.sequence_batches(0))


@pytest.mark.learning
def test_graphs_follow_the_context_as_torch_does(
    tiny: Shop, model: GeneratorForCausalLM, tmp_path: Path
) -> None:
    export_generator(model, tmp_path)
    assert check_parity(model, tmp_path) < TOLERANCE
    served = OnnxGenerator(tmp_path, SIZES, 8)
    assert served.takes_context
    prompts = [[sid_of(3)], [sid_of(3)], [], [sid_of(3)]]
    up, down = tiny.context.row({"scene": "up"}), tiny.context.row({"scene": "down"})
    states = served.encode(prompts, [up, down, up, [0]])
    codes = torch.tensor([[tiny.prompt.tokens(sid_of(3))]])
    with torch.no_grad():
        for row, token in ((0, up), (1, down), (3, [0])):
            expected = model.encode(codes, torch.tensor([1]), context=torch.tensor([token]))[0]
            np.testing.assert_allclose(states[row], expected.numpy(), atol=1e-4)
    assert np.abs(states[0] - states[1]).max() > 0.1
    np.testing.assert_array_equal(served.encode([prompts[0]]), served.encode([prompts[0]], [[0]]))
    # One that was never told of contexts is exported as it always was.
    export_generator(shop().model(), tmp_path / "bare")
    assert not OnnxGenerator(tmp_path / "bare", SIZES, 8).takes_context


def answered(
    tiny: Shop, generator: OnnxGenerator, context: Context, scene: str | None, attributes: dict[str, str]
) -> tuple[list[str], list[float], dict[str, str]]:
    """Items, scores, and the context that an exploration logs."""
    bundle = LoadedBundle("b0", BOOK, 8, (), generator, generator.items, Ranking(dense_weight=1.0), context)
    rollout = Rollout.new(
        name="s", action="start", trial="t", arms=[Arm(name="champion", bundle="b0", weight=1.0, version="1")]
    )
    index = SidIndex.build(np.array(tiny.catalogue.sids), tiny.catalogue.item_ids)
    ask = Recommender(lambda _: index, ListLimits(9), Explorer(1.0, 1, 1.0))
    change = history.HistoryChange(None, 0, history.pack_entry(10**12, 1, "e", history.pack_sid(sid_of(7))))
    stored_history, _, _ = history.apply_changes(
        None, [change], codebook=BOOK, levels=3, incarnations={"clicks": 1, "purchases": 1},
        bounds=HistorySettings(),
    )  # fmt: skip
    about = profile.pack_profile(UserProfile.new(user_id="u", attributes=attributes))
    trigger = Trigger.new(request_id="r", user_id="u", k=5, scene=scene)
    (answer,) = ask.recommend(
        [Request(trigger, stored_history, about)], LoadedRollout(rollout, {"b0": bundle})
    )
    assert answer.exploration is not None
    items = answer.recommendation.items
    return [one.item_id for one in items], [one.score for one in items], answer.exploration.context


@pytest.mark.learning
def test_the_scene_of_a_request_changes_its_answer_and_an_unknown_one_is_as_none(
    tiny: Shop, model: GeneratorForCausalLM, tmp_path: Path
) -> None:
    export_generator(model, tmp_path)
    served = OnnxGenerator(tmp_path, SIZES, 8)
    ask = {
        scene: answered(tiny, served, tiny.context, scene, {}) for scene in ("up", "down", "nowhere", None)
    }
    assert ask["up"][0][0] == "i08"
    assert ask["down"][0][0] == "i06"
    assert ask["nowhere"] == ask[None]
    assert [ask[scene][2] for scene in ("up", "nowhere", None)] == [{"scene": "up"}, {}, {}]
    # The same model as if the scene were an attribute of the user.
    about = Context(tiny.context.first, {"profile.mood": tiny.context.fields["scene"]})
    assert answered(tiny, served, about, None, {"mood": "down"})[:2] == ask["down"][:2]
    assert answered(tiny, served, about, "up", {"mood": "odd"})[:2] == ask[None][:2]
    assert answered(tiny, served, about, "up", {"mood": "up"})[2] == {"profile.mood": "up"}


@pytest.mark.learning
def test_explored_answers_are_judged_under_the_context_that_they_were_given_in(
    tiny: Shop, model: GeneratorForCausalLM
) -> None:
    fields = {"prompt": [list(sid_of(7))], "candidates": [list(sid_of(8)), list(sid_of(6))]}
    contexts = [{"scene": "up"}, {"scene": "down"}, {}, {"scene": "nowhere"}]
    actual = [
        (exploration(at, ts=1_600_000_000_000 + at, context=context, **fields), False)
        for at, context in enumerate(contexts)
    ]
    logged = logged_explorations(actual, "c" * 16, tiny.prompt, tiny.settings.offpolicy, tiny.context)
    assert logged is not None
    made_scores = candidate_scores(model, logged, weight=1.0).reshape(4, 2)
    assert made_scores[0, 0] > made_scores[0, 1] + 1
    assert made_scores[1, 1] > made_scores[1, 0] + 1
    np.testing.assert_allclose(made_scores[2], made_scores[3], atol=1e-6)
    untold = logged_explorations(actual, "c" * 16, tiny.prompt, tiny.settings.offpolicy)
    assert untold is not None
    assert untold.contexts.shape == (4, 0)
    assert len(candidate_scores(shop().model(), replace(untold, contexts=logged.contexts), weight=1.0)) == 8
