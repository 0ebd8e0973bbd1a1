"""Negative feedback: explored items that were not clicked, as answers with the reward `click` 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from registry.bundles.context import Context
from registry.bundles.rewards import CLICK, REWARD_NAMES, HasPrice, Rewards
from trainer.offline_checks.offpolicy import LoggedExplorations
from trainer.rewards.labels import answers_with_rewards, reward_values
from trainer.sequences.batches import Int64
from trainer.sequences.interactions import TrainingCatalogue
from trainer.sequences.labelled_answers import LabelledAnswers


def explored_items(
    logged: LoggedExplorations, catalogue: TrainingCatalogue
) -> tuple[list[Int64], Int64, Int64]:
    """Histories and drawn items of explorations as rows of a catalogue, and the explorations' indices (N,).

    Items that the catalogue does not have are dropped from histories. An exploration that drew such an item
    is left out, and so is one that drew the item of its own page, which is no answer.
    """
    row_of = {tuple(codes): row for row, codes in enumerate(catalogue.codes.tolist())}
    histories, targets, explorations = [], [], []
    for exploration, prompt in enumerate(logged.prompts):
        history = [row_of[key] for key in map(tuple, prompt.tolist()) if key in row_of]
        target = row_of.get(tuple(logged.codes[logged.drawn[exploration]].tolist()))
        if target is not None and (not history or history[-1] != target):
            histories.append(np.array(history, dtype=np.int64))
            targets.append(target)
            explorations.append(exploration)
    return histories, np.array(targets, dtype=np.int64), np.array(explorations, dtype=np.int64)


def unclicked_answers(
    logged: LoggedExplorations | None, catalogue: TrainingCatalogue, items: Sequence[HasPrice | None],
    rewards: Rewards | None, context: Context, num_context_fields: int,
) -> LabelledAnswers | None:  # fmt: skip
    """Explored items that were not clicked, as answers with `click` 0; None without a `click` field.

    `items`: of each row of the catalogue; `num_context_fields`: fields of the context that are not rewards.
    Only explorations are used, since they are drawn by chance: the other items of an answer were chosen by
    the model that would learn from them.
    """
    if logged is None or rewards is None or CLICK not in rewards.mass:
        return None
    histories, targets, explorations = explored_items(logged, catalogue)
    unclicked = np.flatnonzero(logged.reward[explorations] == 0)
    values = reward_values(rewards, items, targets[unclicked], np.zeros(len(unclicked), np.int64))
    values[:, REWARD_NAMES.index(CLICK)] = 0
    return answers_with_rewards(
        [histories[row] for row in unclicked], targets[unclicked],
        logged.contexts[explorations[unclicked], :num_context_fields], values, rewards, context,
    )  # fmt: skip
