"""What a trial has seen so far: per-arm arrays of per-user sums, read from Redis."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from streams import keys
from streams.errors import SidstreamError

_FIELDS = ("arm", "impressions", "clicks", "orders")
# Keys a round trip.
_BATCH = 1000


def read_outcomes(redis: Any, trial: str) -> dict[str, npt.NDArray[np.int64]]:
    """Arrays int64 (users, 3) of impressions, clicks and orders, by arm.

    `redis` is a redis-py client that answers bytes or text. Raises SidstreamError for a hash that does not
    hold whole numbers.
    """
    rows: dict[str, list[tuple[int, int, int]]] = {}
    # SCAN may name a key twice; a user counts once.
    found = iter(set(redis.scan_iter(match=keys.sums_pattern(trial), count=_BATCH)))
    while names := list(islice(found, _BATCH)):
        pipeline = redis.pipeline(transaction=False)
        for name in names:
            pipeline.hmget(name, _FIELDS)
        for name, (arm, *numbers) in zip(names, pipeline.execute(), strict=True):
            if arm is None:
                continue
            try:
                shown, clicked, bought = (int(number or 0) for number in numbers)
            except ValueError as error:
                # The key ends with the user's id, which no message may show.
                raise SidstreamError(
                    f"trial {trial} has sums that are no whole numbers ({error}), in a Redis key whose name "
                    f"hashes to {keys.hashed(_text(name))}; delete that key"
                ) from error
            rows.setdefault(_text(arm), []).append((shown, clicked, bought))
    return {arm: np.array(sorted(values), dtype=np.int64) for arm, values in sorted(rows.items())}


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
