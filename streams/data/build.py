"""Make online_retail.parquet from the CSV of the UCI Online Retail data set, every row kept.

    python -m streams.data.build online_retail.csv[.gz]

Source: Chen, D. (2015), Online Retail, UCI Machine Learning Repository, doi 10.24432/C5BW33, CC BY 4.0. Only
the form changes: columns get types, order and content stay. Cleaning is code, not data:
`streams.replay.online_retail`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

TARGET = Path(__file__).with_name("online_retail.parquet")


def build(source: Path, target: Path = TARGET) -> int:
    """Write `target` from the CSV at `source`; return the number of rows."""
    text = pa.dictionary(pa.int32(), pa.string())
    types = {
        "InvoiceNo": pa.string(),
        "StockCode": pa.string(),
        "Description": pa.string(),
        "Quantity": pa.int32(),
        "InvoiceDate": pa.timestamp("s"),
        "UnitPrice": pa.float64(),
        "CustomerID": pa.float64(),  # "17850.0": the file's own form of an integer that may be absent
        "Country": pa.string(),
    }
    table = csv.read_csv(
        source,
        convert_options=csv.ConvertOptions(
            column_types=types, include_columns=list(types), strings_can_be_null=False
        ),
    )
    for name, kind in types.items():
        if kind == pa.string():
            table = table.set_column(table.column_names.index(name), name, table[name].cast(text))
    place = table.column_names.index("CustomerID")
    table = table.set_column(place, "CustomerID", pc.cast(table["CustomerID"], pa.int32()))
    pq.write_table(
        table.combine_chunks(), target, compression="zstd", compression_level=19, use_dictionary=True,
        write_statistics=False, store_schema=False,
    )  # fmt: skip
    return int(table.num_rows)


if __name__ == "__main__":
    print(f"{build(Path(sys.argv[1])):,} rows in {TARGET} ({TARGET.stat().st_size:,} bytes)")
