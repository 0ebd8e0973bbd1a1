"""The interaction log: what was read from Kafka, as Parquet files that are only ever added to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from streams.errors import SidstreamError
from trainer.files import digest, write_atomically

FORMAT = 1
MANIFEST = "manifest.json"

Offsets = dict[int, int]
Ranges = dict[str, dict[int, tuple[int, int]]]

# Clicks and purchases are read by every cycle: they are kept as columns. The rest keeps its bytes. A file
# from before there were request ids, or scenes, has no such column, and is read as if nobody had sent one.
# Purchases have no scene.
INTERACTIONS = pa.schema([
    ("partition", pa.int32()), ("offset", pa.int64()), ("event_id", pa.string()), ("user_id", pa.string()),
    ("item_id", pa.string()), ("ts", pa.int64()), ("kind", pa.string()),
    ("request_id", pa.string()), ("scene", pa.string()),
])  # fmt: skip
VALUES = pa.schema([
    ("partition", pa.int32()), ("offset", pa.int64()), ("key", pa.binary()), ("value", pa.binary()),
])  # fmt: skip


class LogFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file: a topic's records of these offsets, and its digest."""

    topic: str
    incarnation: int  # tells the offsets of a topic that was deleted and made again from the old ones
    path: str  # relative to the log
    rows: int
    refused: int  # records of the range that broke the event contract, and are not in the file
    window: dict[int, tuple[int, int]]
    sha256: str


class _Manifest(msgspec.Struct, kw_only=True):
    format: int = FORMAT
    files: list[LogFile] = []


@dataclass
class InteractionLog:
    """The folder `<home>/log`. One process writes it at a time (the trainer's own lock)."""

    folder: Path
    files: list[LogFile] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path) -> InteractionLog:
        """Read the manifest, or begin an empty log. Raises SidstreamError for a damaged manifest."""
        path = folder / MANIFEST
        if not path.exists():
            return cls(folder)
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=_Manifest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise SidstreamError(
                f"{path} is damaged ({error}); remove {folder}, and the next cycle reads Kafka again"
            ) from error
        if manifest.format != FORMAT:
            raise SidstreamError(
                f"{path} has format {manifest.format}, this version reads {FORMAT}; remove {folder}"
            )
        return cls(folder, manifest.files)

    def ends(self, topic: str, incarnation: int) -> Offsets:
        """The next offset of each partition that was logged."""
        ends: Offsets = {}
        for file in self.files:
            if (file.topic, file.incarnation) == (topic, incarnation):
                for partition, (_, end) in file.window.items():
                    ends[partition] = max(ends.get(partition, 0), end)
        return ends

    def append(
        self, topic: str, incarnation: int, window: dict[int, tuple[int, int]], table: pa.Table, refused: int
    ) -> None:
        """Add one file, then name it in the manifest: a crash in between leaves no trace of it."""
        begins = "-".join(str(window[partition][0]) for partition in sorted(window))
        name = begins if len(begins) <= 100 else hashlib.sha256(begins.encode()).hexdigest()
        path = self.folder / topic / f"{incarnation:08x}" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        pq.write_table(table, part, compression="zstd")
        sha256 = digest(part)
        part.replace(path)
        self.files.append(
            LogFile(
                topic=topic, incarnation=incarnation, path=path.relative_to(self.folder).as_posix(),
                rows=table.num_rows, refused=refused, window=window, sha256=sha256,
            )
        )  # fmt: skip
        manifest = msgspec.json.format(msgspec.json.encode(_Manifest(files=self.files)), indent=1)
        write_atomically(self.folder / MANIFEST, manifest + b"\n")

    def read(
        self, topic: str, since: Offsets, incarnation: int, until: Offsets | None = None
    ) -> tuple[pa.Table, np.ndarray]:
        """All records of a topic in the order they were logged, and which are new.

        New: of this incarnation, at or after `since` (a partition that it lacks: from 0). Of this incarnation
        only those before `until` (a partition that it lacks: none); None: all. Raises SidstreamError when a
        file is missing or was changed.
        """
        schema = INTERACTIONS if topic in ("clicks", "purchases") else VALUES
        tables, fresh = [schema.empty_table()], [np.zeros(0, dtype=bool)]
        for file in self.files:
            if file.topic != topic:
                continue
            path = self.folder / file.path
            if not path.exists() or digest(path) != file.sha256:
                raise SidstreamError(
                    f"{path} is missing or was changed; remove {self.folder}, "
                    "and the next cycle reads Kafka again"
                )
            table = pq.read_table(path, schema=schema)
            partition, offset = table["partition"].to_numpy(), table["offset"].to_numpy()
            new = np.zeros(len(offset), dtype=bool)
            if file.incarnation == incarnation:
                new = offset >= _of_partitions(since, partition)
                if until is not None and not (in_range := offset < _of_partitions(until, partition)).all():
                    table, new = table.filter(pa.array(in_range)), new[in_range]
            tables.append(table)
            fresh.append(new)
        return pa.concat_tables(tables), np.concatenate(fresh)


def _of_partitions(offsets: Offsets, partition: np.ndarray) -> np.ndarray:
    """The offset of each record's partition (N,); 0 where there is none."""
    table = np.zeros(int(partition.max(initial=0)) + 1, dtype=np.int64)
    for number, offset in offsets.items():
        if number < len(table):
            table[number] = offset
    return table[partition]
