"""Stores the plot of a decision beside its record, where one can be drawn; it is no part of the decision."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from registry.bundles.store import Registry
from registry.experiment.outcomes import Seen
from registry.settings import GateSettings
from streams.errors import SidstreamError

log = logging.getLogger(__name__)


def store_decision_plot(
    registry: Registry, record: Mapping[str, Any], outcomes: Mapping[str, Seen], settings: GateSettings
) -> str | None:
    """Draw and store the plot; returns its path in the registry.

    None for a guard's record, without the extra `train`, and where it cannot be drawn or stored.
    """
    if record["mode"] == "guard":
        return None
    try:
        from trainer.plots.trial_plot import save_trial_plot

        return save_trial_plot(registry, record, outcomes, settings)
    except (ModuleNotFoundError, SidstreamError) as error:
        log.info("decision %s has no picture: %s", record["decision"], error)
        return None
