"""REES46's multi-category store (2019) as clicks, carts, purchases and a catalogue.

Source: https://rees46.com/en/datasets, "eCommerce behavior data from multi category store", free to use with
a link to REES46, not redistributed here: give the CSV (or CSV.gz) with its columns event_time, event_type,
product_id, category_id, category_code, brand, price, user_id, user_session.

view -> Click(kind="click"), cart -> Click(kind="cart"), purchase -> Purchase of one piece. There are no
titles: brand and category path stand for one ("samsung electronics smartphone"); an item with neither is
called by its category's number ("category 2053013561218695907").
"""

from __future__ import annotations

import csv
import gzip
import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import NamedTuple

from streams.errors import SidstreamError
from streams.events import CatalogItem, Click, Purchase, UserProfile
from streams.replay.source import RowLog, catalogue_item, collapse_spaces, in_time_range, simulated_commission

COLUMNS = (
    "event_time", "event_type", "product_id", "category_id", "category_code", "brand", "price", "user_id",
    "user_session",
)  # fmt: skip


class _Row(NamedTuple):
    event_id: str
    ts: int
    kind: str
    item: str
    category_id: str
    category: str
    brand: str
    price: float | None
    user: str


class Rees46(RowLog):
    """The store's events; `path` is the CSV, gzipped or not. Times are UTC, to the second."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def events(self, start: int | None = None, end: int | None = None) -> Iterator[Click | Purchase]:
        """Clicks, carts and purchases in event time; `event_id` is the line's number and a hash of it."""
        for row in self._rows:
            if not in_time_range(row.ts, start, end):
                continue
            if row.kind == "purchase":
                yield Purchase(
                    schema_version=1,
                    event_id=row.event_id,
                    ts=row.ts,
                    user_id=row.user,
                    item_id=row.item,
                    price=row.price or 0.0,
                )
            else:
                yield Click(
                    schema_version=1,
                    event_id=row.event_id,
                    ts=row.ts,
                    user_id=row.user,
                    item_id=row.item,
                    kind="cart" if row.kind == "cart" else "click",
                )

    def profiles(self) -> Iterator[UserProfile]:
        """Nothing: the file has no attributes of users."""
        return iter(())

    def catalogue(self) -> Iterator[CatalogItem]:
        """Every item that occurs, described by its first row; price: the median of its prices.

        Commission rate: simulated, by the highest level of the category.
        """
        prices: dict[str, list[float]] = {}
        first: dict[str, _Row] = {}
        for row in self._rows:
            first.setdefault(row.item, row)
            if row.price:
                prices.setdefault(row.item, []).append(row.price)
        for item, row in first.items():
            path = row.category.replace("_", " ").split(".") if row.category else []
            item_prices = prices.get(item)
            yield catalogue_item(
                "rees46",
                row.ts,
                item_id=item,
                title=collapse_spaces(" ".join([row.brand, *path])) or f"category {row.category_id}",
                category=" > ".join(path),
                brand=row.brand,
                price=round(median(item_prices), 4) if item_prices else None,
                commission_rate=simulated_commission(path[0] if path else row.category_id),
            )

    @cached_property
    def _rows(self) -> list[_Row]:
        """All rows, oldest first, ties in the file's order."""
        open_file = gzip.open if self._path.suffix == ".gz" else open
        rows = []
        with open_file(self._path, "rt", encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing_columns = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing_columns:
                raise SidstreamError(
                    f"{self._path} lacks the column(s) {', '.join(missing_columns)}: give REES46's own CSV"
                )
            for row in reader:
                rows.append(self._row(reader.line_num, row))
        rows.sort(key=lambda row: row.ts)
        return rows

    def _row(self, line: int, row: dict[str, str]) -> _Row:
        content = hashlib.blake2b(",".join(row[column] for column in COLUMNS).encode(), digest_size=6)
        kind = row["event_type"]
        try:
            when = datetime.strptime(row["event_time"], "%Y-%m-%d %H:%M:%S UTC").replace(tzinfo=UTC)
            price = float(row["price"]) if row["price"] else None
        except ValueError as error:
            raise SidstreamError(f"{self._path} line {line}: {error}; correct or drop the line") from error
        if kind not in ("view", "cart", "purchase"):
            raise SidstreamError(
                f"{self._path} line {line}: event_type is {kind!r}, not view, cart or purchase; drop the line"
            )
        return _Row(
            f"rees46-{line}-{content.hexdigest()}", int(when.timestamp()) * 1000, kind, row["product_id"],
            row["category_id"], row["category_code"], row["brand"], price, row["user_id"],
        )  # fmt: skip


def find_rees46_file(folder: Path | None) -> Path:
    """REES46's file: `folder` itself, or the first of rees46/events.csv(.gz), events.csv(.gz) in it.

    Raises SidstreamError when there is none.
    """
    if folder is None:
        raise SidstreamError(
            "REES46 does not ship with sidstream: name its CSV, or the folder that has rees46/events.csv.gz, "
            "with --data or SIDSTREAM_DATA"
        )
    if folder.is_file():
        return folder
    for name in ("rees46/events.csv.gz", "rees46/events.csv", "events.csv.gz", "events.csv"):
        if (folder / name).is_file():
            return folder / name
    raise SidstreamError(
        f"REES46 is not in {folder}: name its CSV, or the folder that has rees46/events.csv.gz, with "
        "--data or SIDSTREAM_DATA"
    )
