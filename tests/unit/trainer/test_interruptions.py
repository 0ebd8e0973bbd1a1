"""A stage that is stopped, or killed, after any step goes on to the very weights of an unbroken one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny_shop import shop, sid_of
from tests.unit.trainer.alignment.test_dpo import CODEBOOK, pair
from tests.unit.trainer.language_model.test_lora import foreign
from tests.unit.trainer.rewards.test_labels import OFFERS, rewarded
from trainer.alignment.dpo import align, learning_rate_share
from trainer.alignment.rows import preference_rows
from trainer.codebooks.rqvae import fit_rqvae
from trainer.language_model.lora import align_lora, tune_lora
from trainer.offline_checks.probe import ProbeOutcome
from trainer.rewards.labels import purchase_labels
from trainer.rewards.online import RewardEvidence, learn_from_own_answers
from trainer.settings import DpoSettings
from trainer.tuning.checkpoint import snapshot
from trainer.tuning.ensemble import train_ensemble

Stop = Callable[[], bool]
# The weights of a stage in a run folder; None: it was interrupted.
Stage = Callable[[Path, Stop], dict[str, Tensor] | None]


class Killed(BaseException):
    """The end of a process, of which nothing is caught."""


def after(calls: int, kill: bool) -> Stop:
    """Says stop, or kills, at its call number `calls` from 0."""
    left = iter(range(calls))

    def stop() -> bool:
        if next(left, None) is not None:
            return False
        if kill:
            raise Killed
        return True

    return stop


def fine_tuning(folder: Path, stop: Stop) -> dict[str, Tensor] | None:
    """Two members, each of a pretraining and its SFT."""
    tiny = shop(
        epochs=3, dropout=0.2, members=2, checkpoint_seconds=0, users=12, validation_users=4,
        pretrain={"share": 0.4}, batch_positions=48,
    )  # fmt: skip
    model, result = train_ensemble(
        lambda own, rows, path: tiny.model(seed=own.seed, dropout=0.2), tiny.rows, tiny.sids, tiny.settings,
        folder, stop=stop,
    )  # fmt: skip
    return None if result.stopped == "interrupted" else snapshot(model)


def online_rewards(folder: Path, stop: Stop) -> dict[str, Tensor] | None:
    online = {"rounds": 2, "requests": 60, "steps": 4, "floor": 0.25}
    tiny, rewards = rewarded(
        users=30, batch_positions=64, checkpoint_seconds=0,
        rewards={"min_count": 5, "unconditioned": 0.5, "online": online},
    )  # fmt: skip
    model = tiny.model(dropout=0.2)
    evidence = RewardEvidence(rewards, tiny.context, OFFERS, purchase_labels(tiny.log, 0))
    result = learn_from_own_answers(
        model, tiny.rows, tiny.sids, evidence, None, lambda text: None, stop, folder
    )
    return None if result.interrupted else snapshot(model)


def alignment(folder: Path, stop: Stop) -> dict[str, Tensor] | None:
    tiny = shop(checkpoint_seconds=0)
    dpo = DpoSettings.model_validate(
        {
            "batch": 4, "lr": 3e-3, "dynamic_beta": True, "left_out": 0.3, "epochs": 2, "probe_steps": 5,
            "max_seconds": None, "max_drop": 50.0,
        }
    )  # fmt: skip
    tiny.settings.dpo = dpo
    pairs = [
        pair(n, chosen=list(sid_of(n % 7)), rejected=[[1, 0, 0], [2, 0, 0]], history=[[n % 4, n % 3, 0]])
        for n in range(48)
    ]
    rows = preference_rows(pairs, CODEBOOK, tiny.prompt, dpo)
    hits = np.arange(50) < 25
    aligned, result = align(
        tiny.model(dropout=0.2), tiny.tokenizer, rows, tiny.settings, folder=folder, sequences=tiny.rows,
        probe=lambda _: ProbeOutcome(hits, hits), stop=stop,
    )  # fmt: skip
    return None if result.stopped == "interrupted" else snapshot(aligned) | figures(result)


def figures(result: Any) -> dict[str, Tensor]:
    """All of the result but its time."""
    numbers = [result.steps, result.kept, result.loss, result.margin, result.accuracy, result.drop]
    points = [sorted(point.items()) for point in result.curve]
    return {"figures": torch.tensor([*numbers, *(value for point in points for _, value in point)])}


def language_model(folder: Path, stop: Stop) -> dict[str, Tensor] | None:
    """LoRA, then its alignment by fresh adapters."""
    tiny = shop(
        users=8, length=6, epochs=2, max_items=4, validation_users=2, checkpoint_seconds=0,
        weights={"next_sid": 1.0, "sid_to_title": 0.0, "title_to_sid": 0.0},
        lora={"batch_tokens": 128, "rank": 2, "dropout": 0.2},
        dpo={"batch": 8, "lr": 1e-2, "max_drop": 50.0, "max_seconds": None, "probe_users": 0},
    )  # fmt: skip
    name = foreign(folder.parent / "foreign", "llama")
    tuned = tune_lora(
        name, tiny.rows, tiny.tokenizer, tiny.sids, tiny.settings, folder / "model", run=folder, stop=stop
    )
    if tuned is None:
        return None
    pairs = [pair(n, history=[[n % 4, n % 3, n % 5]]) for n in range(32)]
    rows = preference_rows(pairs, CODEBOOK, tiny.prompt, tiny.settings.dpo)
    result = align_lora(
        tuned, rows, tiny.rows, tiny.tokenizer, tiny.sids, tiny.settings, run=folder, stop=stop
    )
    if result.aligned is None:
        return None
    return load_file(Path(result.aligned) / "model.safetensors")


def rqvae(folder: Path, stop: Stop) -> dict[str, Tensor] | None:
    """It is never asked to stop: a fit ends with its process."""
    data = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)

    def advance(epochs: int) -> None:
        if stop():
            raise Killed

    fitted = fit_rqvae(data, (4, 4), 3, optional=2, progress=advance, runs=folder)
    weights = [part for layer in fitted.encoder for part in layer]
    return {str(at): torch.from_numpy(part) for at, part in enumerate([*weights, *fitted.centroids])}


STAGES: dict[str, Stage] = {
    "fine-tuning": fine_tuning, "online rewards": online_rewards, "alignment": alignment,
    "language model": language_model, "RQ-VAE": rqvae,
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_was_cut_off_ends_in_the_weights_of_an_unbroken_one(name: str, tmp_path: Path) -> None:
    stage, calls = STAGES[name], 0

    def count() -> bool:
        nonlocal calls
        calls += 1
        return False

    unbroken = stage(tmp_path / "whole", count)
    assert unbroken is not None
    assert calls >= 8
    folder, calls_unbroken = tmp_path / "broken", calls
    # Killed, then stopped, each time after some steps more; what a kill takes is done again.
    for kill in (True, False):
        with contextlib.suppress(Killed):
            assert stage(folder, after(calls * 3 // 10, kill)) is None
    calls = 0
    resumed = stage(folder, count)
    assert resumed is not None
    assert calls < calls_unbroken
    assert resumed.keys() == unbroken.keys()
    for key, expected in unbroken.items():
        assert torch.equal(resumed[key], expected), key
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".pth", ".pkl", ".bin")]


def test_a_time_budget_ends_the_alignments_rate_as_its_steps_do() -> None:
    assert learning_rate_share(0, 100, 0.0) < 0.1
    assert learning_rate_share(10, 100, 0.0) == 1.0
    assert learning_rate_share(99, 100, 0.0) < 0.01
    # With the budget all but spent the rate is low, however many steps are left.
    assert learning_rate_share(20, 100, 0.99) < 0.01
    assert learning_rate_share(0, 1, 0.0) == 1.0
    # A budget that all steps fit into changes nothing, or no two runs had the same weights.
    for step in range(8):
        assert learning_rate_share(step, 8, (step + 1) / 9) == learning_rate_share(step, 8, 0.0)
