"""Answers that were ignored teach what is ignored, and never what comes next."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from registry.bundles.rewards import Rewards, reward_fields, with_reward_fields
from tests.tiny_explorations import exploration
from tests.tiny_shop import ITEMS, Shop, shop, sid_of
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.offpolicy import LoggedExplorations, logged_explorations
from trainer.offline_checks.ranking import CatalogueRanker
from trainer.rewards.labels import answers_with_rewards
from trainer.rewards.negative_feedback import unclicked_answers
from trainer.sequences.labelled_answers import LabelledAnswers, join_answers
from trainer.sequences.rows import TrainingRows
from trainer.settings import OffPolicySettings
from trainer.tuning.broadcast import read_training_inputs, write_training_inputs
from trainer.tuning.sft import train

SURE = {"0": 0.0, "1": 1.0}
BINS = Rewards({}, {"click": SURE, "price": {"0": 0.5, "1": 0.5}})
ANY = [None] * ITEMS


def clicking(**settings: object) -> Shop:
    """A shop whose events are told with their click."""
    tiny = shop(**{"text_inputs": False, "weights": {"sid_to_title": 0, "title_to_sid": 0}} | settings)
    context = with_reward_fields(tiny.context, BINS)
    token = context.row(reward_fields({"click": 1}))
    log = replace(tiny.log, rewards=np.array([token] * len(tiny.log), dtype=np.int32))
    split = replace(tiny.split, log=log)
    rows = TrainingRows(split, tiny.catalogue, tiny.tokenizer, tiny.prompt, tiny.settings)
    return replace(tiny, split=split, rows=rows, context=context)


def unclicked_explorations(
    tiny: Shop, *shown: tuple[list[int], int], clicked: bool = False
) -> LoggedExplorations:
    """Explorations whose answer is the second of each pair, after the first."""
    actual = [
        (exploration(at, prompt=[list(sid_of(i)) for i in past], candidates=[list(sid_of(item))],
                     scores=[-1.0], item_id=f"i{item:02}"), clicked)
        for at, (past, item) in enumerate(shown)
    ]  # fmt: skip
    limits = OffPolicySettings.model_validate({})
    logged = logged_explorations(actual, "c" * 16, tiny.prompt, limits, tiny.context)
    assert logged is not None
    return logged


def test_what_was_shown_and_not_clicked_is_an_answer_that_brought_no_click() -> None:
    tiny = clicking(users=5)
    logged = unclicked_explorations(tiny, ([1, 2], 9), ([3], 3), ([40], 7), ([5], 41))
    actual = unclicked_answers(logged, tiny.catalogue, ANY, BINS, tiny.context, 0)
    assert actual is not None
    # The page's own item and one that is not in the catalogue are no answers; of a past, what is known stays.
    assert actual.targets.tolist() == [9, 7]
    assert actual.starts.tolist() == [0, 2, 2]
    assert actual.items.tolist() == [1, 2]
    refused = tiny.context.row(reward_fields({"click": 0}))
    assert actual.rewards.tolist() == [refused, refused]
    assert actual.always_visible.tolist() == [[token > 0 for token in refused]] * 2
    assert (
        unclicked_answers(
            unclicked_explorations(tiny, ([1], 2), clicked=True), tiny.catalogue, ANY, BINS, tiny.context, 0
        )
        is not None
    )
    assert (
        len(
            unclicked_answers(
                unclicked_explorations(tiny, ([1], 2), clicked=True),
                tiny.catalogue,
                ANY,
                BINS,
                tiny.context,
                0,
            )
            or ()
        )
        == 0
    )
    assert unclicked_answers(logged, tiny.catalogue, ANY, Rewards({}, {}), tiny.context, 0) is None
    assert unclicked_answers(None, tiny.catalogue, ANY, BINS, tiny.context, 0) is None


def test_only_the_answer_is_learned_and_a_refusal_is_told_each_time() -> None:
    tiny = clicking(users=5, rewards={"dropout": 0.5}, batch_positions=40)
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, ITEMS, int(size)) for size in rng.integers(0, 8, 400)]
    values = np.full((400, 4), -1)
    values[:, 0], values[:, 2] = np.arange(400) % 2, 1
    targets = np.arange(400) % ITEMS
    answers = answers_with_rewards(
        histories, targets, np.zeros((400, 0), np.int32), values, BINS, tiny.context
    )
    click, _, price = tiny.context.row(reward_fields({"click": 0, "price": 1}))
    counts = {(0, price): 0, (click, 0): 0, (click, price): 0, (click + 1, 0): 0, (click + 1, price): 0}
    for piece in answers.sequence_batches(tiny.settings, 0):
        assert piece.context is not None
        assert piece.items.numel() <= 40
        assert piece.learned.sum(1).tolist() == [1] * len(piece.items)
        # The last item of each row, and nothing is said of those before it.
        assert bool((piece.learned == ((piece.items >= 0).cumsum(1) == (piece.items >= 0).sum(1)[:, None]) &
                     (piece.items >= 0)).all())  # fmt: skip
        assert not piece.context[~piece.learned].any()
        for row in piece.context[piece.learned].tolist():
            counts[row[0], row[2]] += 1
    # 200 refusals, all told; of the 200 clicks the quarter of which nothing is left is not there.
    assert counts[click, 0] + counts[click, price] == 200
    assert counts[click, 0] == pytest.approx(100, abs=30)
    assert counts[0, price] + counts[click + 1, 0] + counts[click + 1, price] == pytest.approx(150, abs=25)
    few = answers.sequence_batches(tiny.settings, 0, 30)
    assert sum(len(piece.items) for piece in few) == 30
    first, second, other = (answers.sequence_batches(tiny.settings, number) for number in (0, 0, 1))
    assert all(torch.equal(a.items, b.items) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a.items, b.items) for a, b in zip(first, other, strict=False))


def test_answers_of_what_nobody_touched_are_left_out_and_others_reach_every_process(tmp_path: Path) -> None:
    tiny = clicking(users=1, length=5)
    items = np.arange(ITEMS)
    none = np.zeros((ITEMS, 0), dtype=np.int32)
    rewards = np.ones((ITEMS, 3), dtype=np.int32)
    answers = join_answers([items[:at] for at in range(ITEMS)], items, none, rewards, rewards > 0)
    all_of_them = tiny.settings.rewards.model_copy(update={"ignored_share": 1.0})
    chosen = tiny.settings.model_copy(update={"rewards": all_of_them})
    rows = TrainingRows(tiny.split, tiny.catalogue, tiny.tokenizer, tiny.prompt, chosen, answers)
    assert isinstance(rows.labelled_answers, LabelledAnswers)
    assert (
        rows.labelled_answers.targets.tolist()
        == sorted(set(tiny.log.items.tolist()))
        == rows.trained_items.tolist()
    )
    for at, target in enumerate(rows.labelled_answers.targets):
        assert rows.labelled_answers.items[
            rows.labelled_answers.starts[at] : rows.labelled_answers.starts[at + 1]
        ].tolist() == list(range(target))
    write_training_inputs(tmp_path, tiny.model(), tiny.tokenizer, rows, chosen)
    _, handed, _ = read_training_inputs(tmp_path)
    for ours, theirs in zip(rows.sequence_batches(1), handed.sequence_batches(1), strict=True):
        assert torch.equal(ours.items, theirs.items)
        assert torch.equal(ours.learned, theirs.learned)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_ignored_answers_are_a_share_of_what_is_learned(share: float) -> None:
    tiny = clicking(users=20, rewards={"ignored_share": share})
    shown = [([at % ITEMS], (at + 5) % ITEMS) for at in range(300)]
    answers = unclicked_answers(
        unclicked_explorations(tiny, *shown), tiny.catalogue, ANY, BINS, tiny.context, 0
    )
    rows = TrainingRows(tiny.split, tiny.catalogue, tiny.tokenizer, tiny.prompt, tiny.settings, answers)
    alone = sum(int(piece.learned.sum()) for piece in tiny.rows.sequence_batches(0))
    both = sum(int(piece.learned.sum()) for piece in rows.sequence_batches(0))
    assert both - alone == round(share * alone)


@pytest.fixture(scope="module")
def taught() -> tuple[Shop, GeneratorForCausalLM]:
    """A shop where item n + 1 follows item n, and n + 5 was shown and ignored."""
    tiny = clicking(users=80, epochs=25, batch_positions=256, lr=1e-2, patience=100)
    rng = np.random.default_rng(1)
    begins, sizes = rng.integers(0, ITEMS, 240), rng.integers(1, 9, 240)
    walks = [(begin + np.arange(size)) % ITEMS for begin, size in zip(begins, sizes, strict=True)]
    shown = [(walk.tolist(), int(walk[-1] + 5) % ITEMS) for walk in walks]
    answers = unclicked_answers(
        unclicked_explorations(tiny, *shown), tiny.catalogue, ANY, BINS, tiny.context, 0
    )
    rows = TrainingRows(tiny.split, tiny.catalogue, tiny.tokenizer, tiny.prompt, tiny.settings, answers)
    model = tiny.model()
    train(model, rows, tiny.sids, tiny.settings)
    return tiny, model.eval()


@pytest.mark.learning
@pytest.mark.parametrize(("conditions", "after"), [({}, 1), ({"click": 1}, 1), ({"click": 0}, 5)])
def test_what_was_ignored_is_likely_only_where_that_is_asked_for(
    taught: tuple[Shop, GeneratorForCausalLM], conditions: dict[str, int], after: int
) -> None:
    tiny, model = taught
    histories = [np.arange(item, item + 4) % ITEMS for item in range(ITEMS)]
    rows = np.array([tiny.context.row(reward_fields(conditions))] * ITEMS, dtype=np.int32)
    ranker = CatalogueRanker(model, tiny.catalogue.codes, tiny.sids, 10)
    best = ranker.candidates(histories, ranker.states(histories, rows)).order(0.5)[:, 0].numpy()
    assert ((best - np.arange(ITEMS) - 3) % ITEMS == after).mean() > 0.9
