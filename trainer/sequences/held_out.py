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
    ages_s: list[Int64]  # seconds from each item of the history to the target
    bought: list[npt.NDArray[np.bool_]]  # whether it was bought
    contexts: Int32 | None = None  # (B, C) token ids of the targets' own events; None: no context
    # (B,) whether the target was bought; None: not known.
    target_bought: npt.NDArray[np.bool_] | None = None

    def take(self, places: Int64) -> HeldOut:
        """The rows at `places` (N,)."""
        return HeldOut(
            [self.histories[place] for place in places], self.targets[places],
            [self.ages_s[place] for place in places],
            [self.bought[place] for place in places],
            None if self.contexts is None else self.contexts[places],
            None if self.target_bought is None else self.target_bought[places],
        )  # fmt: skip


def held_out_rows(log: Interactions, rows: npt.ArrayLike, max_items: int) -> HeldOut:
    """The `rows` (N,) of a log as targets, each with up to `max_items` of its user before it."""
    targets = np.asarray(rows, dtype=np.int64)
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
    training_ends = log.starts[1:].copy()
    candidates = np.flatnonzero(lengths > settings.min_history)
    candidates = candidates[
        log.items[training_ends[candidates] - 1] != log.items[training_ends[candidates] - 2]
    ]
    held_out_users = rng.permutation(candidates)[: min(settings.validation_users, len(candidates) // 2)]
    training_ends[held_out_users] -= 1
    return TrainingSplit(training_ends, held_out_rows(log, training_ends[held_out_users], settings.max_items))
