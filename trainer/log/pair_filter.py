"""Which preference pairs still hold, after late purchases and clicks.

The agents decide when an attribution window has closed and the allowed lateness is over. An event that
reaches the log later may contradict a pair: its rejected item is withdrawn here, before the pair is learned
from. Here, too, a limit on pairs is shared out among their schemes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from streams.events import PreferencePair

Int64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_REJECTED = pa.schema([
    ("pair", pa.int64()), ("user_id", pa.string()), ("item_id", pa.string()), ("request_id", pa.string()),
    ("ts", pa.int64()), ("same", pa.bool_()), ("by_click", pa.bool_()),
])  # fmt: skip


@dataclass(frozen=True)
class FilteredPairs:
    """The pairs that hold, each once, and what was withdrawn; rejected items are counted over all pairs."""

    pairs: list[PreferencePair]
    repeats: int  # records of a pair that was there already
    bought: int  # rejected items that the user bought within the window
    clicked: int  # rejected items of clicked_over_shown that were clicked, and not bought
    equal_to_chosen: int  # rejected items that are the chosen one, or have its SID
    without_rejected: int  # pairs of which no rejected item is left, or whose items and SIDs are not as many
    of_other_schemes: int = 0  # records of the codebook's pairs of a scheme that the settings leave out

    def summary(self) -> str:
        """What was withdrawn, in a few words; empty where nothing was."""
        if not (items := self.bought + self.clicked + self.equal_to_chosen) and not self.without_rejected:
            return ""
        return (
            f"withdrawn: {items:,} rejected items ({self.bought:,} bought, {self.clicked:,} clicked), "
            f"{self.without_rejected:,} whole pairs"
        )


def newest_of_each_scheme(pairs: Iterable[PreferencePair], max_pairs: int) -> list[PreferencePair]:
    """The newest `max_pairs` pairs, as many of each scheme as of any other where it has them; oldest first.

    Clicks are far more frequent than purchases: without shares nearly all of the newest pairs are about
    them, and conversion hardly moves (docs/decisions/0010).
    """
    by_scheme: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        by_scheme.setdefault(pair.scheme, []).append(pair)
    chosen: list[PreferencePair] = []
    # The rarest first: what it lacks of its share goes to those that have more.
    rarest = sorted(by_scheme, key=lambda scheme: (len(by_scheme[scheme]), scheme))
    for schemes_done, scheme in enumerate(rarest):
        share = (max_pairs - len(chosen)) // (len(rarest) - schemes_done)
        chosen += sorted(by_scheme[scheme], key=_age_order, reverse=True)[:share]
    return sorted(chosen, key=_age_order)


def _age_order(pair: PreferencePair) -> tuple[int, str]:
    return pair.ts, pair.event_id


def withdraw_contradicted(
    pairs: Sequence[PreferencePair], purchases: pa.Table, clicks: pa.Table, window_ms: int
) -> FilteredPairs:
    """Take from each pair the rejected items that the log contradicts; a pair without any is gone.

    `purchases` needs columns user_id, item_id (string) and ts (int64, ms), `clicks` also request_id; both may
    hold the whole log. A rejected item leaves if the same user bought it within `window_ms` of the pair's
    `ts`, before or after. That reaches further than the agents' rule, because a pair does not say when its
    window was opened: an item that is bought so near to a decision was not rejected. In a pair of
    clicked_over_shown it leaves as well if it was clicked under the pair's request in that time. The chosen
    item and its SID are never among the rejected. `event_id` stays: the decision is the same.
    """
    by_id = {pair.event_id: pair for pair in pairs}
    complete = [pair for pair in by_id.values() if len(pair.rejected_items) == len(pair.rejected)]
    rejected = _rejected_table(complete)
    equal_to_chosen = rejected["same"].to_numpy(zero_copy_only=False)
    bought = ~equal_to_chosen & _has_event_near(rejected, purchases, ("user_id", "item_id"), window_ms)
    may_be_clicked = rejected["by_click"].to_numpy(zero_copy_only=False) & ~equal_to_chosen & ~bought
    clicked = np.zeros(len(may_be_clicked), dtype=np.bool_)
    clicked[may_be_clicked] = _has_event_near(
        rejected.filter(pa.array(may_be_clicked)), clicks, ("request_id", "user_id", "item_id"), window_ms
    )
    withdrawn = equal_to_chosen | bought | clicked
    starts = np.cumsum([0, *(len(pair.rejected) for pair in complete)]).tolist()
    reduced = [
        _without_withdrawn(pair, withdrawn[begin:end])
        for pair, (begin, end) in zip(complete, pairwise(starts), strict=True)
    ]
    pairs_left = [pair for pair in reduced if pair is not None]
    return FilteredPairs(
        pairs_left, repeats=len(pairs) - len(by_id), bought=int(bought.sum()), clicked=int(clicked.sum()),
        equal_to_chosen=int(equal_to_chosen.sum()), without_rejected=len(by_id) - len(pairs_left),
    )  # fmt: skip


def _rejected_table(pairs: Sequence[PreferencePair]) -> pa.Table:
    """A row for each rejected item of each pair, in order."""
    columns: list[list[object]] = [[] for _ in _REJECTED]
    for at, pair in enumerate(pairs):
        by_click = pair.scheme == "clicked_over_shown" and pair.request_id is not None
        for item, sid in zip(pair.rejected_items, pair.rejected, strict=True):
            same = item == pair.chosen_item or sid == pair.chosen
            row = (at, pair.user_id, item, pair.request_id, pair.ts, same, by_click)
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    arrays = [pa.array(column, kind.type) for column, kind in zip(columns, _REJECTED, strict=True)]
    return pa.table(arrays, schema=_REJECTED)


def _without_withdrawn(pair: PreferencePair, withdrawn: Mask) -> PreferencePair | None:
    if not withdrawn.any():
        return pair
    if withdrawn.all():
        return None
    remaining = (~withdrawn).nonzero()[0].tolist()
    return msgspec.structs.replace(
        pair,
        rejected_items=[pair.rejected_items[at] for at in remaining],
        rejected=[pair.rejected[at] for at in remaining],
    )


def _has_event_near(questions: pa.Table, events: pa.Table, columns: Sequence[str], window_ms: int) -> Mask:
    """For each row of `questions`: has an event the same `columns`, and a ts at most `window_ms` away?"""
    if not questions.num_rows or not events.num_rows:
        return np.zeros(questions.num_rows, dtype=np.bool_)
    # Codes of the columns together; after each column only events are left that somebody asks about.
    question_codes = np.zeros(questions.num_rows, dtype=np.int64)
    codes = np.zeros(events.num_rows, dtype=np.int64)
    events = events.select([*columns, "ts"])
    for name in columns:
        values = pc.unique(questions[name]).drop_null()
        value_number = pc.index_in(events[name], value_set=values)
        matched = value_number.is_valid()
        events, codes = events.filter(matched), codes[matched.to_numpy()]
        codes = codes * len(values) + value_number.drop_null().to_numpy()
        question_codes = (
            question_codes * len(values) + pc.index_in(questions[name], value_set=values).to_numpy()
        )
        distinct, question_codes = np.unique(question_codes, return_inverse=True)
        at = np.searchsorted(distinct, codes).clip(max=len(distinct) - 1)
        same = distinct[at] == codes
        events, codes = events.filter(pa.array(same)), at[same]
    ts = questions["ts"].to_numpy()
    return _has_event_within(question_codes, ts - window_ms, ts + window_ms, codes, events["ts"].to_numpy())


def _has_event_within(question_codes: Int64, first: Int64, last: Int64, codes: Int64, ts: Int64) -> Mask:
    """For each code of a question (Q,): has an event (E,) of that code its `ts` in [first, last]?

    Questions and events are sorted together by code and time, a question before an event of its moment: the
    next event after a question is the first that can answer it.
    """
    kinds = np.repeat([0, 1], [len(question_codes), len(codes)])
    order = np.lexsort((kinds, np.concatenate([first, ts]), np.concatenate([question_codes, codes])))
    events = order[kinds[order] == 1] - len(question_codes)
    before = np.empty(len(order), dtype=np.int64)
    before[order] = np.cumsum(kinds[order])
    following = before[: len(question_codes)]
    answered = following < len(events)
    event = events[following[answered]]
    answered[answered] = (codes[event] == question_codes[answered]) & (ts[event] <= last[answered])
    return answered
