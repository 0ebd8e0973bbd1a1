"""What is held out of training: the next items of some users, with the histories before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.sequences.interactions import Int32, Int64, Interactions
from trainer.settings import TrainerSettings


class HeldOut(NamedTuple):
    """Held-out next items: each row's history (newest last) and the item that came next."""

    histories: list[Int64]
    targets: Int64
    ages_s: list[Int64]  # how long before the target each item of the history was touched
    bought: list[npt.NDArray[np.bool_]]  # whether it was bought
    contexts: Int32 | None = None  # (B, C) token ids of the targets' own events; None: nothing is said
    target_bought: npt.NDArray[np.bool_] | None = (
        None  # (B,) whether the target was bought; None: nobody knows
    )

    def take(self, at: Int64) -> HeldOut:
        """Those in the places `at` (N,)."""
        return HeldOut(
            [self.histories[place] for place in at], self.targets[at], [self.ages_s[place] for place in at],
            [self.bought[place] for place in at], None if self.contexts is None else self.contexts[at],
            None if self.target_bought is None else self.target_bought[at],
        )  # fmt: skip


def held_out_rows(log: Interactions, at: npt.ArrayLike, max_items: int) -> HeldOut:
    """The rows `at` (N,) of a log as targets, each with up to `max_items` of its user before it."""
    targets = np.asarray(at, dtype=np.int64)
    begins = log.starts[np.searchsorted(log.starts, targets, side="right") - 1]
    spans = [slice(max(low, row - max_items), row) for low, row in zip(begins, targets, strict=True)]
    return HeldOut(
        [log.items[span] for span in spans], log.items[targets],
        [(log.ts[row] - log.ts[span]) // 1000 for row, span in zip(targets, spans, strict=True)],
        [log.bought[span] for span in spans], log.context[targets], log.bought[targets],
    )  # fmt: skip


@dataclass(frozen=True)
class TrainingSplit:
    """Where each user's training part ends, and what was held out after it."""

    training_ends: Int64  # (U,) one past the last row that is trained on
    held_out: HeldOut


def hold_out_last_items(
    log: Interactions, settings: TrainerSettings, rng: np.random.Generator
) -> TrainingSplit:
    """Keep the last item of `validation_users` users out of training, drawn from those with enough history.

    A last item that only repeats the one before it teaches and tests nothing: such users are not drawn.
    """
    lengths = np.diff(log.starts)
    ends = log.starts[1:].copy()
    last = np.flatnonzero(lengths > settings.min_history)
    last = last[log.items[ends[last] - 1] != log.items[ends[last] - 2]]
    drawn = rng.permutation(last)[: min(settings.validation_users, len(last) // 2)]
    ends[drawn] -= 1
    return TrainingSplit(ends, held_out_rows(log, ends[drawn], settings.max_items))
