"""Single answers to learn from: an item that a user was shown, after its own history, with what it brought.

A log has what users did. These rows are learned beside it: items that were shown and not clicked
(trainer.rewards.negative_feedback), and items that a model answered with when a request named rewards
(trainer.rewards.online). They teach which items bring such rewards, and never what comes next: a row whose
rewards are all hidden is not learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from trainer.sequences.batches import Int32, Int64, SequenceBatch, batches_of_similar_length, pad_contexts
from trainer.settings import TrainerSettings


@dataclass(frozen=True)
class LabelledAnswers:
    """N answers. The histories (rows of `TrainingCatalogue.codes`, newest last) lie one after the other."""

    items: Int64  # (M,) of all histories
    starts: Int64  # (N + 1,) first item of each history
    targets: Int64  # (N,) the item that was answered with
    context: Int32  # (N, C) token ids of what was said, 0 where nothing was
    rewards: Int32  # (N, R) token ids of what it brought, 0: not known
    # (N, R) rewards that dropout never hides: the row would be wrong without them.
    always_visible: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.targets)

    def of_items(self, items: Int64) -> LabelledAnswers:
        """Those that answer with one of `items`."""
        rows = np.flatnonzero(np.isin(self.targets, items))
        return join_answers(
            [self.items[self.starts[row] : self.starts[row + 1]] for row in rows], self.targets[rows],
            self.context[rows], self.rewards[rows], self.always_visible[rows],
        )  # fmt: skip

    def sequence_batches(
        self, settings: TrainerSettings, number: int, max_rows: int | None = None
    ) -> list[SequenceBatch]:
        """The answers of epoch `number` as batches whose last items alone are learned, shuffled.

        Each field of a row's rewards is left out with `rewards.dropout`, but for those that are
        `always_visible`; a row without any reward left is not learned. At most `max_rows` of the rows, drawn
        at random; None: all.
        """
        rng = np.random.default_rng((settings.seed, number, 6))
        visible = (rng.random(self.rewards.shape) >= settings.rewards.dropout) | self.always_visible
        rewards = self.rewards * visible.astype(np.int32)
        contexts_of_rows = self.context * (rng.random((len(self), 1)) >= settings.context.dropout).astype(
            np.int32
        )
        rows = rng.permutation(np.flatnonzero(rewards.any(1)))[:max_rows]
        length = np.diff(self.starts) + 1
        order = rows[np.lexsort((rng.random(len(rows)), length[rows]))]
        batches = []
        for batch in batches_of_similar_length(order, length, settings.batch_positions):
            width = int(length[batch].max())
            items = np.full((len(batch), width), -1, dtype=np.int64)
            contexts = []
            for row, at in enumerate(batch):
                history = self.items[self.starts[at] : self.starts[at + 1]]
                items[row, : len(history)], items[row, len(history)] = history, self.targets[at]
                no_tokens = np.zeros(
                    (len(history), contexts_of_rows.shape[1] + rewards.shape[1]), dtype=np.int32
                )
                contexts.append(np.vstack((no_tokens, np.concatenate((contexts_of_rows[at], rewards[at])))))
            learned = np.arange(width) == length[batch, None] - 1
            batches.append(
                SequenceBatch(
                    torch.from_numpy(items), torch.from_numpy(learned), pad_contexts(contexts, width),
                    torch.zeros(items.shape, dtype=torch.bool),
                )
            )  # fmt: skip
        return [batches[at] for at in rng.permutation(len(batches))]


def join_answers(
    histories: Sequence[Int64],
    targets: Int64,
    context: Int32,
    rewards: Int32,
    always_visible: npt.NDArray[np.bool_],
) -> LabelledAnswers:
    """Answers whose histories are given one by one."""
    starts = np.cumsum([0, *map(len, histories)], dtype=np.int64)
    no_items = np.zeros(0, dtype=np.int64)
    return LabelledAnswers(
        np.concatenate([no_items, *histories]), starts, targets, context, rewards, always_visible
    )
