"""The data sets of the published figures. Only Online Retail ships; the user brings the others."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from registry.bundles.rewards import Offer
from streams.errors import SidstreamError
from streams.events import Purchase
from streams.replay.online_retail import OnlineRetail
from streams.replay.rees46 import Rees46, find_rees46_file
from streams.replay.source import EventSource
from trainer.evaluation.sequences import SequenceDataset, group_events_by_user
from trainer.evaluation.splits import LEAVE_ONE_OUT, TIME

# The Tmall log has no years; it was published in 2014.
_TMALL_YEAR = 2014
_TMALL_BUY = "1"  # of 0 click, 1 buy, 2 favourite, 3 cart


class DatasetSource(NamedTuple):
    """How to read a data set, the splits that suit it (the default first), and a description."""

    load: Callable[[Path | None], SequenceDataset]
    splits: tuple[str, ...]
    about: str


def load_dataset(name: str, folder: Path | None = None) -> SequenceDataset:
    """The data set called `name`; `folder` has those that do not ship.

    Raises SidstreamError when there is no such set, or when its files are not in the folder.
    """
    return dataset_source(name).load(folder)


def dataset_source(name: str) -> DatasetSource:
    """The data set called `name`. Raises SidstreamError when there is none."""
    if name not in DATASETS:
        raise SidstreamError(f"there is no data set {name!r}: give one of {', '.join(DATASETS)}")
    return DATASETS[name]


def _amazon(name: str, subfolder: str) -> Callable[[Path | None], SequenceDataset]:
    """A reader of the 5-core sequences of Amazon 2014 (He and McAuley 2016), without times.

    `user_sequence.txt`: user and items in time order; `item_text.txt`: item and words; `letter_sids.json`,
    where it is: published codes as {"item row": ["<a_1>", ...]} (LETTER, Wang et al. 2024).
    """

    def read(folder: Path | None) -> SequenceDataset:
        rows: dict[str, int] = {}
        users, items = [], []
        with _open_lines(name, folder, subfolder, "user_sequence.txt") as lines:
            for line in lines:
                user, *names = line.split()
                users.append(user)
                items.append(np.array([rows.setdefault(item, len(rows)) for item in names], np.int64))
        with _open_lines(name, folder, subfolder, "item_text.txt") as lines:
            words = dict(line.rstrip("\n").partition(" ")[::2] for line in lines)
        sids = None
        if _find_file(folder, subfolder, "letter_sids.json"):
            with _open_lines(name, folder, subfolder, "letter_sids.json") as file:
                codes = json.load(file)
            sids = np.array(
                [[int(code[3:-1]) for code in codes[str(row)]] for row in range(len(rows))], np.int64
            )
        return SequenceDataset(
            name, users, items, list(rows), [words.get(item, "") for item in rows], sids=sids
        )

    return read


def _tmall(folder: Path | None) -> SequenceDataset:
    """Clicks, favourites, carts and purchases alike; times are days, in which the file's order decides."""
    users, items, ts, bought = [], [], [], []
    with _open_lines("tmall2014", folder, "tmall2014", "events.csv") as lines:
        for row in csv.DictReader(lines):
            month, day = map(int, row["visit_datetime"].split("-"))
            users.append(row["user_id"])
            items.append(row["brand_id"])
            bought.append(row["type"] == _TMALL_BUY)
            ts.append(int(datetime(_TMALL_YEAR, month, day, tzinfo=UTC).timestamp()) * 1000)
    grouped = group_events_by_user(users, items, np.array(ts, np.int64), bought)
    return SequenceDataset(
        "tmall2014", grouped.users, grouped.items, grouped.item_names, [""] * len(grouped.item_names),
        grouped.ts,
        bought=grouped.bought, bought_ts=grouped.bought_ts,
    )  # fmt: skip


def _online_retail(folder: Path | None) -> SequenceDataset:
    """The shop's purchases; it ships with the package, so `folder` is not used."""
    return _from_replay_source("online-retail", OnlineRetail(), mark_purchases=False)


def _rees46(folder: Path | None) -> SequenceDataset:
    return _from_replay_source("rees46", Rees46(find_rees46_file(folder)))


def _from_replay_source(name: str, log: EventSource, mark_purchases: bool = True) -> SequenceDataset:
    """Clicks, carts and purchases of a log alike; `mark_purchases`: keep which are purchases."""
    users, items, ts, bought = [], [], [], []
    for event in log.events():
        users.append(str(event.user_id))  # type: ignore[attr-defined]
        items.append(str(event.item_id))  # type: ignore[attr-defined]
        ts.append(event.ts)
        bought.append(isinstance(event, Purchase))
    grouped = group_events_by_user(users, items, np.array(ts, np.int64), bought if mark_purchases else None)
    item_names = grouped.item_names
    catalogue = {item.item_id: item for item in log.catalogue()}
    profiles = {profile.user_id: profile.attributes for profile in log.profiles()}
    categories = [catalogue[item].category or "" for item in item_names]
    return SequenceDataset(
        name, grouped.users, grouped.items, item_names, [catalogue[item].title or "" for item in item_names],
        grouped.ts, categories if any(categories) else None,
        profiles=[profiles.get(user, {}) for user in grouped.users] if profiles else None,
        bought=grouped.bought, bought_ts=grouped.bought_ts,
        offers=[
            Offer(item.category, item.price, item.commission_rate)
            for item in (catalogue[item_id] for item_id in item_names)
        ],
    )  # fmt: skip


def _find_file(folder: Path | None, subfolder: str, file: str) -> Path | None:
    """`file` or `file`.gz in `folder`/`subfolder` or in `folder`, the first that exists."""
    if folder is not None:
        for path in (folder / subfolder / file, folder / file):
            for candidate in (path, path.with_name(f"{file}.gz")):
                if candidate.is_file():
                    return candidate
    return None


@contextmanager
def _open_lines(name: str, folder: Path | None, subfolder: str, file: str) -> Iterator[TextIOWrapper]:
    """The lines of a data set's file. Raises SidstreamError that names the missing file and its folder."""
    path = _find_file(folder, subfolder, file)
    if path is None:
        where = f"is not in {folder}" if folder else "does not ship with sidstream"
        raise SidstreamError(
            f"{name} {where}: name the folder that has {subfolder}/{file}(.gz) with --data or SIDSTREAM_DATA"
        )
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        yield TextIOWrapper(cast(BinaryIO, stream), encoding="utf-8", newline="")


DATASETS = {
    "amazon14-beauty": DatasetSource(
        _amazon("amazon14-beauty", "amazon14_beauty"), (LEAVE_ONE_OUT,),
        "Amazon 2014 Beauty, 5-core: 22,363 users, 12,101 items, no times",
    ),
    "amazon14-toys": DatasetSource(
        _amazon("amazon14-toys", "amazon14_toys"), (LEAVE_ONE_OUT,),
        "Amazon 2014 Toys and Games, 5-core: 19,412 users, 11,924 items, no times",
    ),
    "online-retail": DatasetSource(
        _online_retail, (TIME, LEAVE_ONE_OUT), "a British gift shop's year, purchases only; it ships"
    ),
    "rees46": DatasetSource(
        _rees46, (TIME, LEAVE_ONE_OUT), "three hours of REES46's store: views, carts and purchases"
    ),
    "tmall2014": DatasetSource(
        _tmall, (TIME, LEAVE_ONE_OUT), "Tmall 2014: clicks, favourites, carts and purchases, to the day"
    ),
}  # fmt: skip
