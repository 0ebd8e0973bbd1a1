"""Single answers to learn from: an item that a user was shown, after its own history, with what it brought.

A log has what users did. These rows stand beside it in training (registry.bundles.rewards): what was shown
and ignored, and what a model answered when it was asked for rewards (trainer.rewards.online). They teach what
an item with such rewards looks like, and never what comes next: a row whose rewards are not told is not
learned.
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
    """N answers; histories (rows of `Catalogue.codes`, newest last) lie one after the other."""

    items: Int64  # (M,) of all histories
    starts: Int64  # (N + 1,) first item of each history
    targets: Int64  # (N,) the item that was answered with
    context: Int32  # (N, C) token ids of what was said, 0 where nothing was
    rewards: Int32  # (N, R) token ids of what it brought, 0: not known
    always_visible: npt.NDArray[
        np.bool_
    ]  # (N, R) rewards that are always told: the row would be wrong without them

    def __len__(self) -> int:
        return len(self.targets)

    def of_items(self, items: Int64) -> LabelledAnswers:
        """Those that answer with one of `items`."""
        at = np.flatnonzero(np.isin(self.targets, items))
        return join_answers(
            [self.items[self.starts[row] : self.starts[row + 1]] for row in at], self.targets[at],
            self.context[at], self.rewards[at], self.always_visible[at],
        )  # fmt: skip

    def sequence_batches(
        self, settings: TrainerSettings, number: int, most: int | None = None
    ) -> list[SequenceBatch]:
        """The answers of epoch `number` as batches whose last items alone are learned, shuffled.

        Each field of a row's rewards is left out with `rewards.dropout`, but for the firm ones; a row of
        which nothing is left is not there. `most`: so many of the rows, drawn; None: all.
        """
        rng = np.random.default_rng((settings.seed, number, 6))
        kept = (rng.random(self.rewards.shape) >= settings.rewards.dropout) | self.always_visible
        told = self.rewards * kept.astype(np.int32)
        said = self.context * (rng.random((len(self), 1)) >= settings.context.dropout).astype(np.int32)
        rows = rng.permutation(np.flatnonzero(told.any(1)))[:most]
        length = np.diff(self.starts) + 1
        order = rows[np.lexsort((rng.random(len(rows)), length[rows]))]
        made = []
        for batch in batches_of_similar_length(order, length, settings.batch_positions):
            width = int(length[batch].max())
            items = np.full((len(batch), width), -1, dtype=np.int64)
            contexts = []
            for row, at in enumerate(batch):
                past = self.items[self.starts[at] : self.starts[at + 1]]
                items[row, : len(past)], items[row, len(past)] = past, self.targets[at]
                empty = np.zeros((len(past), said.shape[1] + told.shape[1]), dtype=np.int32)
                contexts.append(np.vstack((empty, np.concatenate((said[at], told[at])))))
            learned = np.arange(width) == length[batch, None] - 1
            made.append(
                SequenceBatch(
                    torch.from_numpy(items), torch.from_numpy(learned), pad_contexts(contexts, width),
                    torch.zeros(items.shape, dtype=torch.bool),
                )
            )  # fmt: skip
        return [made[at] for at in rng.permutation(len(made))]


def join_answers(
    histories: Sequence[Int64], targets: Int64, context: Int32, rewards: Int32, firm: npt.NDArray[np.bool_]
) -> LabelledAnswers:
    """Answers whose histories are given one by one."""
    starts = np.cumsum([0, *map(len, histories)], dtype=np.int64)
    none = np.zeros(0, dtype=np.int64)
    return LabelledAnswers(np.concatenate([none, *histories]), starts, targets, context, rewards, firm)
