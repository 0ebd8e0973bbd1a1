"""The health of each arm: requests, failures, model time and invalid mass, summed in Redis by trial step.

Serving adds to the sums once a second; the guards read them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from streams.state import keys

# Upper bounds of the classes of model time, in milliseconds.
BOUNDS_MS: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, math.inf)
# Invalid mass is summed in whole millionths: integers add up exactly, whoever adds first.
MASS_UNIT: Final = 1_000_000


@dataclass(frozen=True)
class ArmHealth:
    """Sums over one arm's requests.

    `requests` that its model answered or failed on, `failed` of them, `invalid`: sum of the probability
    (0 to 1) that each spent on codes of no item, `times`: calls of the model, each for the requests of one
    batch, by class of their time (BOUNDS_MS).
    """

    requests: int = 0
    failed: int = 0
    invalid: float = 0.0
    times: Mapping[float, int] = field(default_factory=dict)

    def slower(self, limit_ms: float) -> int:
        """Calls that took longer than the smallest bound at or above `limit_ms` (ms).

        Calls in the class that contains the limit do not count: they may be faster than the limit.
        """
        bound_ms = min(bound for bound in BOUNDS_MS if bound >= limit_ms)
        return sum(count for bound, count in self.times.items() if bound > bound_ms)


def read_health(redis: Any, step_id: str) -> dict[str, ArmHealth]:
    """The health of a step's arms by name; `redis` is a redis-py client that answers bytes or text."""
    arms: dict[str, dict[str, int]] = {}
    for name, value in redis.hgetall(keys.health(step_id)).items():
        arm, _, counter = (name.decode() if isinstance(name, bytes) else name).partition(":")
        arms.setdefault(arm, {})[counter] = int(value)
    return {
        arm: ArmHealth(
            requests=sums.get("n", 0),
            failed=sums.get("failed", 0),
            invalid=sums.get("invalid", 0) / MASS_UNIT,
            times={float(name[3:]): count for name, count in sums.items() if name.startswith("le:")},
        )
        for arm, sums in sorted(arms.items())
    }
