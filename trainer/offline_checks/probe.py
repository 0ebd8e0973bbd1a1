"""A probe: how the same few held-out users are served by the weights of a moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ProbeOutcome:
    """The results of the same N held-out users at each probe."""

    hits: npt.NDArray[np.bool_]  # (N,) the next item is among the ten best
    valid: npt.NDArray[np.bool_]  # (N,) the unconstrained answer is a SID

    @property
    def hr10(self) -> float:
        """The hit rate at 10."""
        return float(self.hits.mean())

    @property
    def validity(self) -> float:
        """The share of real SIDs."""
        return float(self.valid.mean())


# Called with the policy of the moment.
HeldOutProbe = Callable[[Any], ProbeOutcome]
