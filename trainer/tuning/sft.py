"""Supervised fine-tuning: the next SID at every position, and texts, in a time budget, resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from trainer.generator.constrained import SidSet
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.quality import HeldOutQuality, evaluate_held_out
from trainer.offline_checks.repeat_bias import fit_repeat_strength
from trainer.sequences.batches import SequenceBatch, TokenRow
from trainer.sequences.rows import TrainingRows
from trainer.settings import TrainerSettings
from trainer.tuning.checkpoint import Checkpoint, TrainingState, restore, snapshot
from trainer.tuning.devices import Devices, device
from trainer.tuning.next_item import TeacherTargets, batch_loss, catalogue_table_rows, smoothing_tree
from trainer.tuning.optimization import ClippedAdamW

_WARMUP = 0.05
# Seconds between two lines of progress.
_REPORT_S = 2.0
Progress = Callable[[str], None]


@dataclass
class SftResult:
    """What a run did. `quality` is of the weights that were kept."""

    steps: int
    epochs: float
    seconds: float
    loss: float
    quality: HeldOutQuality | None
    stopped: str
    # A point for each validation: epoch, step, seconds, loss; hr10 and ndcg10 where users are held out.
    curve: list[dict[str, float]] = field(default_factory=list)
    pretraining: SftResult | None = None  # what the stage before this one did (trainer.tuning.pretrain)
    members: list[SftResult] = field(default_factory=list)  # of a merged generator (trainer.tuning.ensemble)


def learning_rate_share(fraction: float) -> float:
    """Share of the peak rate after `fraction` of the run: a short linear rise, then half a cosine to 0."""
    if fraction < _WARMUP:
        return max(fraction / _WARMUP, 0.01)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - _WARMUP) / (1 - _WARMUP))))


class TrainOptions(TypedDict, total=False):
    """The keyword arguments of `train`."""

    folder: Path | None
    progress: Progress | None
    stop: Callable[[], bool] | None
    teacher: TeacherTargets | None
    devices: Devices | None


def train(
    model: GeneratorForCausalLM,
    rows: TrainingRows,
    sids: SidSet,
    settings: TrainerSettings,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    teacher: TeacherTargets | None = None,
    devices: Devices | None = None,
) -> SftResult:
    """Train `model` in place and leave in it the weights that ranked the held-out items best.

    With `folder` the run writes a checkpoint after each epoch and when `stop()` says so, and goes on from the
    one it finds there; without a time budget the resumed run ends in the very weights of an unbroken one.
    `teacher` says what is likely at the learned positions of a batch, in rows of what the dense head scores.

    With several `devices` every process calls this with the same rows, settings and folder; a step takes one
    batch in each. Time, `stop`, validation and the best weights are the main process's: the others come back
    with the weights of their last step.
    """
    checkpoint = Checkpoint(folder) if folder else None
    run = _TrainingRun(model, rows, sids, settings, devices or Devices(), checkpoint)
    run.progress, run.stop, run.teacher = progress, stop, teacher
    return run.run()


class _TrainingRun:
    """One run of `train`: the model, what it learns from, and how far the run is."""

    progress: Progress | None = None
    stop: Callable[[], bool] | None = None
    teacher: TeacherTargets | None = None

    def __init__(
        self, model: GeneratorForCausalLM, rows: TrainingRows, sids: SidSet, settings: TrainerSettings,
        devices: Devices, checkpoint: Checkpoint | None,
    ) -> None:  # fmt: skip
        self.model, self.rows, self.sids, self.settings, self.devices = model, rows, sids, settings, devices
        model.to(device())
        self.optimizer = ClippedAdamW(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.checkpoint = checkpoint
        loaded = checkpoint.load(model, self.optimizer.optimizer) if checkpoint else None
        self.state = loaded or TrainingState()
        self.best_weights = checkpoint.best if checkpoint else None
        devices.broadcast_weights(model)
        self.quality: HeldOutQuality | None = None  # of the newest validation
        # On the model's device: the host would wait for a GPU to tell it.
        self.mean_loss: Tensor | None = None
        if self.state.loss is not None:
            self.mean_loss = torch.tensor(self.state.loss, device=model.device)
        self.table, self.scored = catalogue_table_rows(model, rows)
        self.tree = smoothing_tree(model, settings)
        self._began, self._seconds_before = time.monotonic(), self.state.seconds
        self._reported_at = self.state.seconds

    def run(self) -> SftResult:
        """Train until an epoch limit, the patience, the time budget or `stop` ends it."""
        while self.state.stopped is None and self.state.epoch < self.settings.epochs:
            batches = self.rows.sequence_batches(self.state.epoch)
            if not self._train_epoch(batches):
                self._save()
                epochs = self.state.epoch + self.state.batch / len(batches)
                return self._result(epochs, None, "interrupted", [])
            self._end_epoch(self.state.epoch + self.state.batch / max(1, len(batches)))
        return self._finish()

    def _train_epoch(self, batches: list[SequenceBatch]) -> bool:
        """Steps until the epoch, or the budget of time or steps, is over. False: the run was interrupted."""
        state, settings = self.state, self.settings
        texts = self.rows.text_rows(state.epoch)
        per_batch = -(-len(texts) // max(1, len(batches)))
        while state.batch < len(batches):
            self._measure_time()
            spent_time = state.seconds / settings.max_seconds if settings.max_seconds else 0.0
            asked_to_stop = self.stop is not None and self.stop()
            spent_time, interrupted = self.devices.broadcast([spent_time, float(asked_to_stop)])
            spent_steps = state.step / settings.max_steps if settings.max_steps else 0.0
            if spent_time >= 1 or spent_steps >= 1:
                state.stopped = "all steps done" if spent_steps >= 1 else "time budget spent"
                break
            if interrupted:
                return False
            done = state.epoch + state.batch / len(batches)
            # Where batches run out before processes do, the last step has no batch for some.
            own = state.batch + self.devices.rank
            batch = batches[own] if own < len(batches) else None
            loss = self._step(
                batch,
                texts[own * per_batch : (own + 1) * per_batch],
                own,
                max(spent_time, spent_steps, done / settings.epochs),
            )
            self.mean_loss = loss if self.mean_loss is None else 0.98 * self.mean_loss + 0.02 * loss
            state.step += 1
            state.batch = min(state.batch + self.devices.count, len(batches))
            if self.progress and state.seconds - self._reported_at > _REPORT_S:
                self._reported_at = state.seconds
                epochs = state.epoch + state.batch / len(batches)
                self.progress(f"epoch {epochs:.2f}, loss {self.running_loss:.3f}")
        return True

    def _step(
        self, batch: SequenceBatch | None, texts: list[TokenRow], number: int, fraction: float
    ) -> Tensor:
        """One step of all processes after `fraction` of the run -> the mean loss ().

        `batch` is None in a process that has none left; `number` of it in its epoch seeds the dropout.
        """
        self.model.train()
        self.optimizer.clear_gradients()
        loss = None
        if batch is not None:
            # Dropout belongs to the batch: it is the same after a pause, and in whichever process.
            torch.manual_seed(_seed_of(self.settings.seed, self.state.epoch, number))
            loss = batch_loss(
                self.model, batch, texts, self.table, self.scored, self.settings, self.tree, self.teacher
            )
            loss.backward()
        mean_loss = self.devices.average_gradients(self.model, loss)
        own_vectors = self.model.model.items.own.grad
        if self.scored is not None and own_vectors is not None:
            # Titles reach them too: a new item stays its codes and its text.
            own_vectors.mul_(self.scored.is_scored[:, None])
        self.optimizer.apply_gradients(self.settings.lr * learning_rate_share(fraction))
        return mean_loss

    def _end_epoch(self, epochs: float) -> None:
        """Validate after so many epochs, see whether the run is over, and write a checkpoint."""
        state = self.state
        if state.stopped is None:
            state.epoch, state.batch = state.epoch + 1, 0
        self.quality = quality = self._validate()
        state.stale = int(self.devices.broadcast([float(state.stale)])[0])
        if state.stopped is None and state.stale >= self.settings.patience:
            state.stopped = f"no better NDCG@10 for {state.stale} validations"
        self._measure_time()
        state.curve.append(_curve_point(epochs, state, self.running_loss, quality))
        if self.progress:
            ranking = f", HR@10 {quality.hr10:.3f}, NDCG@10 {quality.ndcg10:.3f}" if quality else ""
            self.progress(f"epoch {epochs:.2f}, loss {self.running_loss:.3f}{ranking}, {state.seconds:.0f} s")
        self._save()

    def _validate(self) -> HeldOutQuality | None:
        """The quality of the weights of this moment, which are remembered where they are the best so far."""
        state = self.state
        quality = validate(self.model, self.rows, self.sids, self.settings)
        if quality is None:
            return None
        better = (
            self.best_weights is None
            or quality.ndcg10 > state.best_ndcg
            or spells_more_real_sids(quality, state, self.settings)
        )
        state.stale = 0 if better else state.stale + 1
        # Of equals the later one: the dense head may have nothing left to learn, and the SIDs have.
        if better or quality.ndcg10 == state.best_ndcg:
            state.best_ndcg = max(state.best_ndcg, quality.ndcg10)
            state.validity, self.best_weights = quality.validity, snapshot(self.model)
        return quality

    def _finish(self) -> SftResult:
        """Put the best weights back."""
        quality = self.quality
        if self.best_weights is not None:
            restore(self.model, self.best_weights)
            if self.state.stale or quality is None:
                held_out = self.rows.split.held_out
                quality = evaluate_held_out(self.model, held_out, self.rows.catalogue, self.sids)
        self.model.eval()
        curve = self.state.curve
        epochs = curve[-1]["epoch"] if curve else 0.0
        return self._result(epochs, quality, self.state.stopped or "all epochs done", curve)

    def _result(
        self, epochs: float, quality: HeldOutQuality | None, stopped: str, curve: list[dict[str, float]]
    ) -> SftResult:
        state = self.state
        return SftResult(state.step, epochs, state.seconds, self.running_loss, quality, stopped, curve)

    @property
    def running_loss(self) -> float:
        """The running mean of the steps' losses; NaN before the first one."""
        return math.nan if self.mean_loss is None else float(self.mean_loss)

    def _measure_time(self) -> None:
        self.state.seconds = self._seconds_before + time.monotonic() - self._began

    def _save(self) -> None:
        self.state.loss = None if self.mean_loss is None else float(self.mean_loss)
        if self.checkpoint and self.devices.main:
            self.checkpoint.save(self.model, self.optimizer.optimizer, self.state, self.best_weights)


def validate(
    model: GeneratorForCausalLM, rows: TrainingRows, sids: SidSet, settings: TrainerSettings
) -> HeldOutQuality | None:
    """The quality on held-out items, the strength of the repeat bias fitted first where the settings say so;
    None: nothing is held out."""
    if not len(rows.split.held_out.targets):
        return None
    if settings.fit_strength:
        fit_repeat_strength(model, rows.split.held_out, rows.catalogue, sids)
    return evaluate_held_out(model, rows.split.held_out, rows.catalogue, sids)


def spells_more_real_sids(quality: HeldOutQuality, state: TrainingState, settings: TrainerSettings) -> bool:
    """Whether weights rank as well as the best ones so far, and spell more real SIDs.

    Only as long as the best ones spell too few to be released: the dense head may be done after an epoch, the
    SIDs are not. As well: within one standard error of the best NDCG, which m (1 - m) / n bounds (squared).
    """
    best = min(max(state.best_ndcg, 0.0), 1.0)
    error = math.sqrt(best * (1 - best) / quality.users)
    near = quality.ndcg10 >= state.best_ndcg - error
    return state.validity < settings.min_validity and quality.validity > state.validity and near


def _seed_of(seed: int, epoch: int, batch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch, batch)).generate_state(1)[0])


def _curve_point(
    epoch: float, state: TrainingState, loss: float, quality: HeldOutQuality | None
) -> dict[str, float]:
    point = {"epoch": epoch, "step": float(state.step), "seconds": state.seconds}
    if math.isfinite(loss):
        point["loss"] = loss
    return point | ({"hr10": quality.hr10, "ndcg10": quality.ndcg10} if quality else {})
