"""The picture of a decision, kept beside its record where one can be drawn: it is no part of the decision."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from registry.bundles.store import Registry
from registry.experiment.outcomes import Seen
from registry.settings import GateSettings
from streams.errors import SidstreamError

log = logging.getLogger(__name__)


def keep_picture(
    registry: Registry, record: Mapping[str, Any], seen: Mapping[str, Seen], settings: GateSettings
) -> str | None:
    """Draw and store it; its path in the registry. None for a guard's record, without the extra `train`, and
    where there is nothing to draw or nowhere to store it."""
    if record["mode"] == "guard":
        return None
    try:
        from trainer.plots.trial_plot import save_trial_plot

        return save_trial_plot(registry, record, seen, settings)
    except (ModuleNotFoundError, SidstreamError) as error:
        log.info("decision %s has no picture: %s", record["decision"], error)
        return None
