"""What is held out of training for good: everything that validation users did.

A salted hash of the user deals them (`registry.hold_out`), so that they are the same in every generation of a
lineage: no event of theirs is learned by a model, by its parents or by its alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from registry.hold_out import HoldOut, user_share
from trainer.sequences.interactions import Int32, Int64, Interactions
from trainer.settings import TrainerSettings

Record = TypeVar("Record")
Mask = npt.NDArray[np.bool_]


class HeldOut(NamedTuple):
    """Held-out next items: each row's history (newest last) and the item that came next."""

    histories: list[Int64]
    targets: Int64
    ages_s: list[Int64]  # seconds from each item of the history to the target
    bought: list[Mask]  # whether it was bought
    contexts: Int32 | None = None  # (B, C) token ids of the targets' own events; None: no context
    # (B,) whether the target was bought; None: not known.
    target_bought: Mask | None = None
    # (B,) whether the target is an event of the new window; None: all are.
    target_fresh: Mask | None = None

    def take(self, places: Int64) -> HeldOut:
        """The rows at `places` (N,)."""
        return HeldOut(
            [self.histories[place] for place in places], self.targets[places],
            [self.ages_s[place] for place in places], [self.bought[place] for place in places],
            None if self.contexts is None else self.contexts[places],
            None if self.target_bought is None else self.target_bought[places],
            None if self.target_fresh is None else self.target_fresh[places],
        )  # fmt: skip


def held_out_rows(log: Interactions, rows: npt.ArrayLike, max_items: int) -> HeldOut:
    """The `rows` (N,) of a log as targets, each with up to `max_items` of its user before it."""
    targets = np.asarray(rows, dtype=np.int64)
    begins = log.starts[np.searchsorted(log.starts, targets, side="right") - 1]
    spans = [slice(max(low, row - max_items), row) for low, row in zip(begins, targets, strict=True)]
    return HeldOut(
        [log.items[span] for span in spans], log.items[targets],
        [(log.ts[row] - log.ts[span]) // 1000 for row, span in zip(targets, spans, strict=True)],
        [log.bought[span] for span in spans], log.context[targets], log.bought[targets], log.fresh[targets],
    )  # fmt: skip


@dataclass(frozen=True)
class TrainingSplit:
    """A log in two parts: the users who are learned from, and held-out events of the others."""

    log: Interactions  # of the users who are learned from, whole
    held_out: HeldOut
    validation_users: int = 0  # users who are not learned from; not all have an event that can be scored

    def new_targets_only(self) -> TrainingSplit:
        """The split without held-out events from before the new window."""
        fresh = self.held_out.target_fresh
        if fresh is None:
            return self
        return TrainingSplit(self.log, self.held_out.take(np.flatnonzero(fresh)), self.validation_users)


def split_log(log: Interactions, hold_out: HoldOut, settings: TrainerSettings) -> TrainingSplit:
    """Take the validation users out of a log, and one event of each as a target: at most `validation_users`.

    A user's target is the newest event of the new window; where there is none, the newest of all. It has
    `min_history` events before it, and is not the item right before it: a page's own item is no answer.
    Where more users have one than are scored, half are new and half old as far as there are so many, those
    with the smallest hash: a later generation scores the same users.
    """
    validation = validation_mask(log, hold_out)
    rows = _target_rows(log, np.flatnonzero(validation), settings.min_history)
    owners = np.searchsorted(log.starts, rows, side="right") - 1
    rows = rows[np.argsort([user_share(hold_out.salt, log.users[owner]) for owner in owners], kind="stable")]
    most, fresh = settings.validation_users, log.fresh[rows]
    new = min(int(fresh.sum()), max(most // 2, most - int((~fresh).sum())))
    kept = np.where(fresh, np.cumsum(fresh) <= new, np.cumsum(~fresh) <= most - new)
    held_out = held_out_rows(log, rows[kept], settings.max_items)
    return TrainingSplit(log.of_users(~validation), held_out, int(validation.sum()))


def validation_mask(log: Interactions, hold_out: HoldOut) -> Mask:
    """(U,) which of a log's users are validation users."""
    return np.array([hold_out.has(user) for user in log.users], dtype=bool)


def _target_rows(log: Interactions, users: Int64, min_history: int) -> Int64:
    """The row of each user's target, ascending; users without one have none."""
    rows = np.arange(len(log))
    owner = np.searchsorted(log.starts, rows, side="right") - 1
    usable = rows - log.starts[owner] >= max(1, min_history)
    usable[1:] &= log.items[1:] != log.items[:-1]
    newest = np.full(len(log.users), -1, dtype=np.int64)
    # In this order, a new event takes the place of an old one, and a later one that of an earlier one.
    for part in (usable & ~log.fresh, usable & log.fresh):
        newest[owner[part]] = rows[part]
    targets = newest[users]
    return targets[targets >= 0]


def without_validation_users(
    records: Iterable[Record], user_of: Callable[[Record], str], hold_out: HoldOut
) -> tuple[list[Record], list[Record]]:
    """The records of users who are learned from, and those of validation users, in the order given."""
    learned: list[Record] = []
    validation: list[Record] = []
    for record in records:
        (validation if hold_out.has(user_of(record)) else learned).append(record)
    return learned, validation
