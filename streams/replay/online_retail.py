"""UCI Online Retail, one year of a British gift shop, as purchases, a catalogue and its customers' countries.

Source: Chen, D. (2015), Online Retail, UCI Machine Learning Repository, doi 10.24432/C5BW33, CC BY 4.0; it
ships with the package (`streams.data.build` made it, every row of the original kept).

The rule that makes a row a purchase: it is not a cancellation (InvoiceNo without the leading C), it has a
customer, Quantity and UnitPrice are above 0, and StockCode is a product, that is five digits and any letters:
POST, M, C2, DOT, BANK CHARGES, PADS, AMAZONFEE, gift_0001_10 and the like are fees, samples and vouchers. Of
541,909 rows 396,337 remain, of 4,334 users and 3,659 items.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from streams.errors import SidstreamError
from streams.events import CatalogItem, Purchase, UserProfile
from streams.replay.source import (
    RowLog,
    catalogue_item,
    collapse_spaces,
    in_time_range,
    simulated_commission,
    user_profile,
)

FILE = Path(__file__).parent.parent / "data" / "online_retail.parquet"
_PRODUCT = r"^[0-9]{5}[A-Za-z]*$"


class _Row(NamedTuple):
    event_id: str
    invoice: str
    item: str
    description: str
    quantity: int
    ts: int
    price: float
    user: str
    country: str


class OnlineRetail(RowLog):
    """The shop's clean purchases. Times are the file's, whose zone is unknown, taken as UTC."""

    def __init__(self, path: Path = FILE) -> None:
        self._path = path

    def events(self, start: int | None = None, end: int | None = None) -> Iterator[Purchase]:
        """Purchases in event time; `event_id` is the invoice and the line on it."""
        for row in self._rows:
            if in_time_range(row.ts, start, end):
                yield Purchase(
                    schema_version=1,
                    event_id=row.event_id,
                    ts=row.ts,
                    user_id=row.user,
                    item_id=row.item,
                    price=row.price,
                    quantity=row.quantity,
                    order_id=row.invoice,
                )

    def catalogue(self) -> Iterator[CatalogItem]:
        """Every item that was bought.

        Title: the item's most frequent non-empty description, the latest of equally frequent ones. Price: the
        median of its unit prices. Category and brand are not in the data. Commission rate: simulated, by the
        last word of the title ("Bag", "Holder"). `ts`: its first purchase.
        """
        titles: dict[str, Counter[str]] = {}
        last_seen: dict[tuple[str, str], int] = {}
        prices: dict[str, list[float]] = {}
        first: dict[str, int] = {}
        for place, row in enumerate(self._rows):
            first.setdefault(row.item, row.ts)
            prices.setdefault(row.item, []).append(row.price)
            descriptions = titles.setdefault(row.item, Counter())
            if row.description:
                descriptions[row.description] += 1
                last_seen[row.item, row.description] = place
        for item, ts in first.items():
            counts = titles[item]
            title = max(counts, key=lambda text: (counts[text], last_seen[item, text]), default=item)
            yield catalogue_item(
                "online-retail",
                ts,
                item_id=item,
                # The shop writes in capitals.
                title=string.capwords(title),
                price=round(median(prices[item]), 4),
                commission_rate=simulated_commission(title.split()[-1]),
            )

    def profiles(self) -> Iterator[UserProfile]:
        """The country of every user, from the first purchase on; the few who change keep the first one."""
        users: set[str] = set()
        for row in self._rows:
            if row.user not in users:
                users.add(row.user)
                yield user_profile("online-retail", row.ts, row.user, {"country": row.country})

    @cached_property
    def _rows(self) -> list[_Row]:
        """Clean rows, oldest first, ties in the file's order."""
        try:
            table = pq.read_table(self._path)
        except FileNotFoundError as error:
            raise SidstreamError(
                f"{self._path} is missing: install sidstream again, or `python -m streams.data.build`"
            ) from error
        lines: Counter[str] = Counter()
        ids = []
        invoices = table["InvoiceNo"].cast(pa.string()).to_pylist()
        for invoice in invoices:
            lines[invoice] += 1
            ids.append(f"online-retail-{invoice}-{lines[invoice]}")
        table = table.append_column("event_id", pa.array(ids))
        stock, invoice = table["StockCode"].cast(pa.string()), table["InvoiceNo"].cast(pa.string())
        clean = table.filter(
            pc.and_(
                pc.and_(pc.invert(pc.starts_with(invoice, "C")), pc.is_valid(table["CustomerID"])),
                pc.and_(
                    pc.and_(pc.greater(table["Quantity"], 0), pc.greater(table["UnitPrice"], 0)),
                    pc.match_substring_regex(stock, _PRODUCT),
                ),
            )
        )
        columns = (
            clean["event_id"].to_pylist(),
            clean["InvoiceNo"].to_pylist(),
            clean["StockCode"].to_pylist(),
            [collapse_spaces(text) for text in clean["Description"].to_pylist()],
            clean["Quantity"].to_pylist(),
            pc.cast(clean["InvoiceDate"].cast(pa.timestamp("ms")), pa.int64()).to_pylist(),
            clean["UnitPrice"].to_pylist(),
            [str(user) for user in clean["CustomerID"].to_pylist()],
            clean["Country"].cast(pa.string()).to_pylist(),
        )
        rows = [_Row(*row) for row in zip(*columns, strict=True)]
        rows.sort(key=lambda row: row.ts)
        return rows
