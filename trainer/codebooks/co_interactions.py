"""The items that each user clicked and bought, read from Kafka before any SID exists, oldest first."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np

from registry.hold_out import HoldOut
from streams.settings import KafkaSettings
from trainer.log.interaction_log import InteractionLog
from trainer.log.window import read_window
from trainer.sequences.held_out import validation_mask
from trainer.sequences.interactions import TrainingCatalogue


def read_item_sequences(
    kafka: KafkaSettings, items: list[str], hold_out: HoldOut, advance: Callable[[int], None] | None = None
) -> list[list[str]]:
    """The item_ids of each user's clicks and purchases of `items`, oldest first; one list a user.

    Validation users have none: codes that are fitted to these lists do not know what they did. Raises
    SidstreamError when the broker does not answer or a topic is missing.
    """
    catalogue = TrainingCatalogue(items, [], np.zeros((len(items), 0), dtype=np.int64), [""] * len(items))
    # A temporary log: the trainer's own log belongs to the update cycle, which may be running.
    with tempfile.TemporaryDirectory() as folder:
        log = read_window(kafka, InteractionLog.open(Path(folder)), advance=advance).user_sequences(catalogue)
    log = log.of_users(~validation_mask(log, hold_out))
    rows = log.items.tolist()
    return [[items[row] for row in rows[begin:end]] for begin, end in pairwise(log.starts.tolist())]
