"""The data sets that figures are published on. All but Online Retail have to be brought."""

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
from trainer.evaluation.sequences import Sequences, group_events
from trainer.evaluation.splits import LEAVE_ONE_OUT, TIME

# The year of the Tmall log is not in it; it was given out in 2014.
_TMALL_YEAR = 2014
_TMALL_BUY = "1"  # of 0 click, 1 buy, 2 favourite, 3 cart


class DataSet(NamedTuple):
    """How a data set is read, the splits that suit it (the default first), and what it is."""

    load: Callable[[Path | None], Sequences]
    splits: tuple[str, ...]
    about: str


def load(name: str, folder: Path | None = None) -> Sequences:
    """The data set called `name`; `folder` has those that do not ship.

    Raises SidstreamError when there is no such set, or when its files are not in the folder.
    """
    return known(name).load(folder)


def known(name: str) -> DataSet:
    """The data set called `name`. Raises SidstreamError when there is none."""
    if name not in DATASETS:
        raise SidstreamError(f"there is no data set {name!r}: give one of {', '.join(DATASETS)}")
    return DATASETS[name]


def _amazon(name: str, place: str) -> Callable[[Path | None], Sequences]:
    """A reader of the 5-core sequences of Amazon 2014 (He and McAuley 2016), without times.

    `user_sequence.txt`: user and items in time order; `item_text.txt`: item and words; `letter_sids.json`,
    where it is: published codes as {"item row": ["<a_1>", ...]} (LETTER, Wang et al. 2024).
    """

    def read(folder: Path | None) -> Sequences:
        rows: dict[str, int] = {}
        users, items = [], []
        with _opened(name, folder, place, "user_sequence.txt") as lines:
            for line in lines:
                user, *names = line.split()
                users.append(user)
                items.append(np.array([rows.setdefault(item, len(rows)) for item in names], np.int64))
        with _opened(name, folder, place, "item_text.txt") as lines:
            words = dict(line.rstrip("\n").partition(" ")[::2] for line in lines)
        sids = None
        if _find(folder, place, "letter_sids.json"):
            with _opened(name, folder, place, "letter_sids.json") as file:
                codes = json.load(file)
            sids = np.array(
                [[int(code[3:-1]) for code in codes[str(row)]] for row in range(len(rows))], np.int64
            )
        return Sequences(name, users, items, list(rows), [words.get(item, "") for item in rows], sids=sids)

    return read


def _tmall(folder: Path | None) -> Sequences:
    """Clicks, favourites, carts and purchases alike; times are days, in which the file's order decides."""
    users, items, ts, bought = [], [], [], []
    with _opened("tmall2014", folder, "tmall2014", "events.csv") as lines:
        for row in csv.DictReader(lines):
            month, day = map(int, row["visit_datetime"].split("-"))
            users.append(row["user_id"])
            items.append(row["brand_id"])
            bought.append(row["type"] == _TMALL_BUY)
            ts.append(int(datetime(_TMALL_YEAR, month, day, tzinfo=UTC).timestamp()) * 1000)
    made = group_events(users, items, np.array(ts, np.int64), bought)
    return Sequences(
        "tmall2014", made.users, made.items, made.item_names, [""] * len(made.item_names), made.ts,
        bought=made.bought, bought_ts=made.bought_ts,
    )  # fmt: skip


def _online_retail(folder: Path | None) -> Sequences:
    """The shop's purchases; it ships with the package, so `folder` is not asked."""
    return _of_log("online-retail", OnlineRetail(), marked=False)


def _rees46(folder: Path | None) -> Sequences:
    return _of_log("rees46", Rees46(find_rees46_file(folder)))


def _of_log(name: str, log: EventSource, marked: bool = True) -> Sequences:
    """Clicks, carts and purchases of a log alike; `marked`: which are purchases is kept."""
    users, items, ts, bought = [], [], [], []
    for event in log.events():
        users.append(str(event.user_id))  # type: ignore[attr-defined]
        items.append(str(event.item_id))  # type: ignore[attr-defined]
        ts.append(event.ts)
        bought.append(isinstance(event, Purchase))
    made = group_events(users, items, np.array(ts, np.int64), bought if marked else None)
    item_names = made.item_names
    catalogue = {item.item_id: item for item in log.catalogue()}
    profiles = {one.user_id: one.attributes for one in log.profiles()}
    categories = [catalogue[item].category or "" for item in item_names]
    return Sequences(
        name, made.users, made.items, item_names, [catalogue[item].title or "" for item in item_names],
        made.ts, categories if any(categories) else None,
        profiles=[profiles.get(user, {}) for user in made.users] if profiles else None,
        bought=made.bought, bought_ts=made.bought_ts,
        offers=[
            Offer(one.category, one.price, one.commission_rate)
            for one in (catalogue[item] for item in item_names)
        ],
    )  # fmt: skip


def _find(folder: Path | None, place: str, file: str) -> Path | None:
    """`file` or `file`.gz in `folder`/`place` or in `folder`, the first there is."""
    if folder is not None:
        for path in (folder / place / file, folder / file):
            for found in (path, path.with_name(f"{file}.gz")):
                if found.is_file():
                    return found
    return None


@contextmanager
def _opened(name: str, folder: Path | None, place: str, file: str) -> Iterator[TextIOWrapper]:
    """The lines of a data set's file. Raises SidstreamError that says which file is wanted, and where."""
    path = _find(folder, place, file)
    if path is None:
        where = f"is not in {folder}" if folder else "does not ship with sidstream"
        raise SidstreamError(
            f"{name} {where}: name the folder that has {place}/{file}(.gz) with --data or SIDSTREAM_DATA"
        )
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as opened:
        yield TextIOWrapper(cast(BinaryIO, opened), encoding="utf-8", newline="")


DATASETS = {
    "amazon14-beauty": DataSet(
        _amazon("amazon14-beauty", "amazon14_beauty"), (LEAVE_ONE_OUT,),
        "Amazon 2014 Beauty, 5-core: 22,363 users, 12,101 items, no times",
    ),
    "amazon14-toys": DataSet(
        _amazon("amazon14-toys", "amazon14_toys"), (LEAVE_ONE_OUT,),
        "Amazon 2014 Toys and Games, 5-core: 19,412 users, 11,924 items, no times",
    ),
    "online-retail": DataSet(
        _online_retail, (TIME, LEAVE_ONE_OUT), "a British gift shop's year, purchases only; it ships"
    ),
    "rees46": DataSet(
        _rees46, (TIME, LEAVE_ONE_OUT), "three hours of REES46's store: views, carts and purchases"
    ),
    "tmall2014": DataSet(
        _tmall, (TIME, LEAVE_ONE_OUT), "Tmall 2014: clicks, favourites, carts and purchases, to the day"
    ),
}  # fmt: skip
