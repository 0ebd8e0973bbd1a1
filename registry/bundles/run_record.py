"""What MLflow keeps of a run beside its files: settings and figures as flat names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

# MLflow refuses longer values of a parameter (characters).
MAX_PARAM_LENGTH = 6000


def flat_params(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as parameters: `{"dpo": {"lr": 1e-4}}` is `{"dpo.lr": "0.0001"}`.

    Lists are JSON, None is empty. A value that is too long for MLflow ends in "...".
    """
    params: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            params |= flat_params(value, f"{prefix}{name}.")
            continue
        text = "" if value is None else json.dumps(value) if isinstance(value, list | tuple) else str(value)
        too_long = len(text) > MAX_PARAM_LENGTH
        params[prefix + name] = text[: MAX_PARAM_LENGTH - 3] + "..." if too_long else text
    return params


def flat_metrics(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of nested figures as metrics, with `/` between the names; a list counts from 1.

    Texts and what was not measured (None) are left out.
    """
    metrics: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple):
            value = {str(number): inner for number, inner in enumerate(value, 1)}
        if isinstance(value, Mapping):
            metrics |= flat_metrics(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            metrics[prefix + name] = float(value)
    return metrics
