"""The offline check: which models are turned away before they are registered, and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from registry.bundles.ranking import Ranking
from streams.errors import SidstreamError
from trainer.generator.constrained import SidSet
from trainer.offline.probe import Health, Probe
from trainer.offline.quality import Quality, ranked
from trainer.sequences.held_out import HeldOut
from trainer.sequences.interactions import TrainingCatalogue
from trainer.settings import TrainerSettings


def check_finite(model: nn.Module) -> None:
    """Raise SidstreamError where training diverged."""
    for parameter in model.parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise SidstreamError("training diverged: a weight is not finite; lower SIDSTREAM_TRAINER__LR")


def failing(quality: Quality, before: float | None, settings: TrainerSettings) -> str | None:
    """Why a model may not follow one whose HR@10 was `before`; None: it may."""
    if quality.validity < settings.min_validity:
        return (
            f"{quality.validity:.1%} of its unconstrained answers are real SIDs, "
            f"SIDSTREAM_TRAINER__MIN_VALIDITY is {settings.min_validity:.1%}"
        )
    if before is not None and quality.hr10 < (1 - settings.max_fall) * before:
        return (
            f"HR@10 fell from {before:.3f} to {quality.hr10:.3f}, more than SIDSTREAM_TRAINER__MAX_FALL "
            f"({settings.max_fall:.0%})"
        )
    return None


def failing_first(quality: Quality, popularity: float, settings: TrainerSettings) -> str | None:
    """Why a model that follows none may not start, where popularity has that HR@10; None: it may."""
    failed = failing(quality, None, settings)
    if failed is None and settings.beat_popularity and quality.hr10 < popularity:
        return (
            f"HR@10 {quality.hr10:.3f} is below popularity's {popularity:.3f} "
            "(train longer: SIDSTREAM_TRAINER__MAX_SECONDS; or allow it: "
            "SIDSTREAM_TRAINER__BEAT_POPULARITY=false)"
        )
    return failed


def held_probe(
    held: HeldOut, known: TrainingCatalogue, sids: SidSet, settings: TrainerSettings, ranking: Ranking
) -> Probe | None:
    """What alignment asks of the first `dpo.probe_users` held-out users; None where there are none.

    Of those who clicked, where they are as many as the others: what is bought more often must not hide the
    clicks that are lost. A log of purchases alone has no others.
    """
    at = np.arange(len(held.targets))
    if held.target_bought is not None and 2 * held.target_bought.sum() <= len(at):
        at = at[~held.target_bought]
    at = at[: settings.dpo.probe_users]
    if not len(at):
        return None
    some = held.take(at)

    def probe(model: Any) -> Health:
        rank, valid, _ = ranked(model, some, known, sids, settings, ranking)
        return Health((rank < 10).numpy(), valid.numpy())

    return probe
