"""Replay: a log of the past written to Kafka as events, in event time."""

from __future__ import annotations

import os
from pathlib import Path

from streams.errors import SidstreamError
from streams.replay.jsonl import JsonLines
from streams.replay.online_retail import OnlineRetail
from streams.replay.rees46 import Rees46, find_rees46_file
from streams.replay.source import EventSource, user_item_sequences

__all__ = ["EventSource", "JsonLines", "OnlineRetail", "Rees46", "source_of", "user_item_sequences"]

# Where data that does not ship with the package lies: a folder.
DATA_VARIABLE = "SIDSTREAM_DATA"


def source_of(name: str, data: Path | None = None, topic: str | None = None) -> EventSource:
    """The log called `name`: online-retail, rees46, or the path of a file of JSON lines.

    `data`: REES46's file or a folder that has it (default: SIDSTREAM_DATA). `topic`: what a file's lines are.
    Raises SidstreamError when there is no such log.
    """
    if name == "online-retail":
        return OnlineRetail()
    if name == "rees46":
        default_folder = os.environ.get(DATA_VARIABLE)
        return Rees46(find_rees46_file(data or (Path(default_folder) if default_folder else None)))
    path = Path(name)
    if not path.is_file():
        raise SidstreamError(
            f"there is no log {name!r}: give online-retail, rees46, or the path of a file of JSON lines"
        )
    return JsonLines(path, topic)
