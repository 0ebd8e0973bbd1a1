"""Pretraining on the whole log, then SFT on its newest part: two runs of one loop, under one budget."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from trainer.generator.constrained import SidSet
from trainer.generator.model import GeneratorForCausalLM
from trainer.sequences.rows import TrainingRows
from trainer.settings import TrainerSettings
from trainer.tuning.resumable import INTERRUPTED
from trainer.tuning.sft import SftResult, TrainOptions, train


def pretrain_and_tune(
    model: GeneratorForCausalLM,
    rows: TrainingRows,
    sids: SidSet,
    settings: TrainerSettings,
    **options: Unpack[TrainOptions],
) -> SftResult:
    """`trainer.tuning.sft.train`, after a stage of pretraining where `settings.pretrain` has a share for it.

    Each stage stops by its own held-out figures and keeps its own checkpoint, below `folder` too, so that a
    broken run goes on in its stage. An interrupted pretraining is the result itself.
    """
    if not settings.pretrain.share:
        return train(model, rows, sids, settings, **options)
    progress, folder = options.get("progress"), options.get("folder")

    def report_progress(text: str) -> None:
        if progress:
            progress(f"pretraining: {text}")

    first: TrainOptions = {
        **options, "folder": folder and folder / "pretrain", "progress": report_progress
    }  # fmt: skip
    pretraining = train(model, rows, sids, pretraining_settings(settings), **first)
    if pretraining.stopped == INTERRUPTED:
        return pretraining
    recent, tuning_settings = tuning_after_pretraining(rows, settings, pretraining.seconds)
    result = train(model, recent, sids, tuning_settings, **options)
    result.pretraining = pretraining
    return result


def pretraining_settings(settings: TrainerSettings) -> TrainerSettings:
    """The settings of pretraining: its share of the epochs (at least one) and of the seconds."""
    share, budget = settings.pretrain.share, settings.max_seconds
    return settings.model_copy(
        update={
            "epochs": max(1, round(share * settings.epochs)),
            "max_seconds": budget and share * budget,
        }
    )


def tuning_after_pretraining(
    rows: TrainingRows, settings: TrainerSettings, spent_s: float
) -> tuple[TrainingRows, TrainerSettings]:
    """The rows and settings of the SFT that follows a pretraining of `spent_s` seconds.

    It has what pretraining left of the budget: as many events in more passes, since its passes are shorter.
    """
    share, budget = settings.pretrain.share, settings.max_seconds
    epochs_left = max(1, settings.epochs - pretraining_settings(settings).epochs)
    tuning_settings = settings.model_copy(
        update={
            "lr": settings.pretrain.sft_lr,
            # Validation may have overrun the first share: the second one is there all the same.
            "max_seconds": budget and max(budget - spent_s, (1 - share) * budget),
            # Other cuts and other dropout than those of the first epochs.
            "seed": settings.seed + 1,
        }
    )
    recent_rows = rows.newest_share(settings.pretrain.recent_share, tuning_settings)
    tuning_settings.epochs = max(1, round(epochs_left * _events(rows) / max(1, _events(recent_rows))))
    return recent_rows, tuning_settings


def _events(rows: TrainingRows) -> int:
    """How many events one pass reads."""
    return sum(high - low for low, high in rows.crops(np.random.default_rng(rows.settings.seed)))
