"""The log as arrays: the items that have a SID, and users' interactions with them in time order."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from registry.bundles.prompt import Prompt, Sid
from registry.decoding.list_rules import ListLimits
from registry.decoding.sid_index import SidIndex

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Interactions:
    """Users' interactions in event time; equal times keep the order of the log. Rows are grouped by user."""

    users: list[str]  # user of each group
    starts: Int64  # (U + 1,) first row of each user's group
    items: Int64  # (N,) row of `TrainingCatalogue.codes`
    ts: Int64  # (N,) milliseconds
    fresh: npt.NDArray[np.bool_]  # (N,) True in the window that this cycle reads
    bought: npt.NDArray[np.bool_]  # (N,) True for a purchase
    context: Int32  # (N, C) token ids of what each event says beside its item (bundles.context), 0: nothing
    rewards: Int32  # (N, R) token ids of the rewards that each event brought (bundles.rewards), 0: not known

    def __len__(self) -> int:
        return len(self.items)

    def of_users(self, kept: npt.NDArray[np.bool_]) -> Interactions:
        """The interactions of the users (U,) that are `kept`."""
        lengths = np.diff(self.starts)
        rows = np.repeat(kept, lengths)
        return Interactions(
            [user for user, keep in zip(self.users, kept.tolist(), strict=True) if keep],
            np.concatenate(([0], np.cumsum(lengths[kept]))), self.items[rows], self.ts[rows],
            self.fresh[rows], self.bought[rows], self.context[rows], self.rewards[rows],
        )  # fmt: skip


@dataclass(frozen=True)
class TrainingCatalogue:
    """The items that have a SID, the tokens they are spelled with, and how lists of them are served."""

    item_ids: list[str]
    sids: list[Sid]
    codes: Int64  # (I, L) token ids
    titles: list[str]
    active: npt.NDArray[np.bool_] | None = None  # (I,) may be recommended; None: all
    limits: ListLimits = field(default_factory=ListLimits)
    # Whether a held-out event is a request from the page of the newest item of its history, which no list of
    # that page has. Data sets of an evaluation have no pages: there any item may follow itself.
    newest_is_page: bool = True

    @cached_property
    def index(self) -> SidIndex:
        """The index that lists are searched in."""
        sids = np.array(self.sids, dtype=np.int64).reshape(len(self.sids), self.codes.shape[1])
        return SidIndex.build(sids, self.item_ids, self.active)


def training_catalogue(
    sids: Mapping[str, Sid], titles: Mapping[str, str], prompt: Prompt,
    active: Collection[str] | None = None, limits: ListLimits | None = None, newest_is_page: bool = True,
) -> TrainingCatalogue:  # fmt: skip
    """Items in order of item_id, with their codes as token ids. Raises SidstreamError for a foreign SID.

    `active`: the items that may be recommended (None: all), `limits`: those of their lists (None: serving's
    defaults), `newest_is_page`: see TrainingCatalogue.
    """
    items = sorted(sids)
    codes = np.array([prompt.tokens(sids[item]) for item in items], dtype=np.int64)
    return TrainingCatalogue(
        items, [tuple(sids[item]) for item in items], codes.reshape(len(items), len(prompt.sizes)),
        [titles.get(item, "") for item in items],
        None if active is None else np.array([item in active for item in items], dtype=np.bool_),
        limits or ListLimits(), newest_is_page,
    )  # fmt: skip


def user_sequences(
    users: Sequence[str],
    ts: npt.ArrayLike,
    items: Sequence[str],
    catalogue: TrainingCatalogue,
    fresh: npt.ArrayLike | None = None,
    bought: npt.ArrayLike | None = None,
    context: Int32 | None = None,
) -> Interactions:
    """Group a log (in its own order) by user and sort it by event time. Items without a SID are left out."""
    row_of_item = {item: row for row, item in enumerate(catalogue.item_ids)}
    rows = np.fromiter((row_of_item.get(item, -1) for item in items), dtype=np.int64, count=len(items))
    with_sid = np.flatnonzero(rows >= 0)
    # Sorted names: the same log gives the same groups, however its partitions were read.
    names = sorted({users[at] for at in with_sid.tolist()})
    group_of_user = {user: at for at, user in enumerate(names)}
    group = np.fromiter((group_of_user.get(user, -1) for user in users), dtype=np.int64, count=len(rows))
    times = np.asarray(ts, dtype=np.int64)
    is_fresh = np.ones(len(rows), dtype=bool) if fresh is None else np.asarray(fresh, dtype=bool)
    is_purchase = np.zeros(len(rows), dtype=bool) if bought is None else np.asarray(bought, dtype=bool)
    context_tokens = np.zeros((len(rows), 0), dtype=np.int32) if context is None else context
    order = with_sid[np.lexsort((with_sid, times[with_sid], group[with_sid]))]
    starts = np.searchsorted(group[order], np.arange(len(names) + 1))
    return Interactions(
        names, starts, rows[order], times[order], is_fresh[order], is_purchase[order], context_tokens[order],
        np.zeros((len(order), 0), dtype=np.int32),
    )  # fmt: skip


def items_by_popularity(log: Interactions, catalogue: TrainingCatalogue) -> Iterator[int]:
    """Rows of items, most interactions first; ties by item_id."""
    counts = np.bincount(log.items, minlength=len(catalogue.item_ids))
    yield from np.argsort(-counts, kind="stable").tolist()
