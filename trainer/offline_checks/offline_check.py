"""The offline check: which models are refused before they are registered, and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from registry.bundles.ranking import Ranking
from streams.errors import SidstreamError
from trainer.generator.constrained import SidSet
from trainer.offline_checks.probe import HeldOutProbe, ProbeOutcome
from trainer.offline_checks.quality import HeldOutQuality, rank_held_out
from trainer.sequences.held_out import HeldOut
from trainer.sequences.interactions import TrainingCatalogue
from trainer.settings import TrainerSettings


def check_finite(model: nn.Module) -> None:
    """Raise SidstreamError where training diverged."""
    for parameter in model.parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise SidstreamError("training diverged: a weight is not finite; lower SIDSTREAM_TRAINER__LR")


def reason_to_refuse(quality: HeldOutQuality, before: float | None, settings: TrainerSettings) -> str | None:
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


def reason_to_refuse_first(
    quality: HeldOutQuality, popularity: float, settings: TrainerSettings
) -> str | None:
    """Why a model that follows none may not start, where popularity has that HR@10; None: it may."""
    failed = reason_to_refuse(quality, None, settings)
    if failed is None and settings.beat_popularity and quality.hr10 < popularity:
        return (
            f"HR@10 {quality.hr10:.3f} is below popularity's {popularity:.3f} "
            "(train longer: SIDSTREAM_TRAINER__MAX_SECONDS; or allow it: "
            "SIDSTREAM_TRAINER__BEAT_POPULARITY=false)"
        )
    return failed


def held_out_probe(
    held_out: HeldOut, catalogue: TrainingCatalogue, sids: SidSet, settings: TrainerSettings, ranking: Ranking
) -> HeldOutProbe | None:
    """The probe of alignment over the first `dpo.probe_users` held-out users; None where there are none.

    Only users whose held-out event is a click, where they are at least half of all: otherwise more hits among
    purchases could hide lost hits among clicks.
    """
    rows = np.arange(len(held_out.targets))
    if held_out.target_bought is not None and 2 * held_out.target_bought.sum() <= len(rows):
        rows = rows[~held_out.target_bought]
    rows = rows[: settings.dpo.probe_users]
    if not len(rows):
        return None
    probe_users = held_out.take(rows)

    def probe(model: Any) -> ProbeOutcome:
        rank, valid, _ = rank_held_out(model, probe_users, catalogue, sids, ranking)
        return ProbeOutcome((rank < 10).numpy(), valid.numpy())

    return probe
