"""Supervised fine-tuning: the next SID at every position, and texts, in a time budget, resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from trainer.generator.constrained import SidSet
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline.quality import Quality, evaluate
from trainer.offline.ranking import Ranker
from trainer.offline.repeat_bias import strengthen
from trainer.sequences.rows import TrainingRows
from trainer.settings import TrainerSettings
from trainer.tuning.checkpoint import Checkpoint, TrainingState, restore, snapshot
from trainer.tuning.devices import Devices, device
from trainer.tuning.next_item import Teacher, batch_loss, catalogue_table_rows
from trainer.tuning.soft_targets import code_tree

_WARMUP = 0.05
_CLIP = 1.0
# Seconds between two lines of progress.
_TELL_S = 2.0
Progress = Callable[[str], None]


@dataclass
class SftResult:
    """What a run did. `quality` is of the weights that were kept."""

    steps: int
    epochs: float
    seconds: float
    loss: float
    quality: Quality | None
    stopped: str
    # A point for each validation: epoch, step, seconds, loss; hr10 and ndcg10 where somebody was held out.
    curve: list[dict[str, float]] = field(default_factory=list)
    pretraining: SftResult | None = None  # what the stage before this one did (trainer.pretrain)
    members: list[SftResult] = field(default_factory=list)  # of a merged generator (trainer.members)


def _learning_rate(fraction: float) -> float:
    """Share of the peak rate after `fraction` of the run: a short linear rise, then half a cosine to 0."""
    if fraction < _WARMUP:
        return max(fraction / _WARMUP, 0.01)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - _WARMUP) / (1 - _WARMUP))))


def train(
    model: GeneratorForCausalLM,
    rows: TrainingRows,
    sids: SidSet,
    settings: TrainerSettings,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    teacher: Teacher | None = None,
    devices: Devices | None = None,
) -> SftResult:
    """Train `model` in place and leave in it the weights that ranked the held-out items best.

    With `folder` the run writes a checkpoint after each epoch and when `stop()` says so, and goes on from the
    one it finds there; without a time budget the resumed run ends in the very weights of an unbroken one.
    `teacher` says what is likely at the learned positions of a batch, in rows of what the dense head scores.

    With several `devices` every process calls this with the same rows, settings and folder; a step takes one
    batch in each. Time, `stop`, validation and the kept weights are the main process's: the others come back
    with the weights of their last step.
    """
    devices = devices or Devices()
    where = device()
    model.to(where)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.999), fused=True
    )
    saved = Checkpoint(folder) if folder else None
    place = saved.load(model, optimizer) if saved else None
    place = place or TrainingState()
    best = saved.best if saved else None
    devices.spread(model)
    began, before = time.monotonic(), place.seconds
    running = math.nan if place.loss is None else place.loss
    told = before
    quality: Quality | None = None

    def look() -> Quality | None:
        nonlocal best
        measured = validate(model, rows, sids, settings)
        if measured is None:
            return None
        better = (
            best is None
            or measured.ndcg10 > place.best_ndcg
            or spells_more_real_sids(measured, place, settings)
        )
        place.stale = 0 if better else place.stale + 1
        # Of equals the later one: the dense head may have nothing left to learn, and the SIDs have.
        if better or measured.ndcg10 == place.best_ndcg:
            place.best_ndcg = max(place.best_ndcg, measured.ndcg10)
            place.validity, best = measured.validity, snapshot(model)
        return measured

    def save() -> None:
        if saved and devices.main:
            saved.save(model, optimizer, place, best)

    table, among = catalogue_table_rows(model, rows)
    tree = code_tree(model.model.items.codes) if settings.smoothing else ()
    while place.stopped is None and place.epoch < settings.epochs:
        batches = rows.sequence_batches(place.epoch)
        texts = rows.text_rows(place.epoch)
        each = -(-len(texts) // max(1, len(batches)))
        while place.batch < len(batches):
            place.seconds = before + time.monotonic() - began
            share = place.seconds / settings.max_seconds if settings.max_seconds else 0.0
            asked = stop is not None and stop()
            spent, interrupted = devices.told([share, float(asked)])
            if spent >= 1:
                place.stopped = "time budget spent"
                break
            done = place.epoch + place.batch / len(batches)
            if interrupted:
                save()
                return SftResult(place.step, done, place.seconds, running, None, "interrupted")
            model.train()
            optimizer.zero_grad(set_to_none=True)
            # Where batches run out before processes do, the last step has no batch for some.
            at = place.batch + devices.rank
            loss = None
            if at < len(batches):
                # Dropout belongs to the batch: it is the same after a pause, and in whichever process.
                torch.manual_seed(_seed_of(settings.seed, place.epoch, at))
                titles = texts[at * each : (at + 1) * each]
                loss = batch_loss(model, batches[at], titles, table, among, settings, tree, teacher)
                loss.backward()
            value = devices.average(model, loss)
            own = model.model.items.own.grad
            if among is not None and own is not None:
                # Titles reach them too: a new item stays its codes and its text.
                own.mul_(among.is_scored[:, None])
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            rate = settings.lr * _learning_rate(max(spent, done / settings.epochs))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            running = value if math.isnan(running) else 0.98 * running + 0.02 * value
            place.loss = running
            place.step += 1
            place.batch = min(place.batch + devices.count, len(batches))
            if progress and place.seconds - told > _TELL_S:
                told = place.seconds
                progress(f"epoch {place.epoch + place.batch / len(batches):.2f}, loss {running:.3f}")
        done = place.epoch + place.batch / max(1, len(batches))
        if place.stopped is None:
            place.epoch, place.batch = place.epoch + 1, 0
        quality = look()
        place.stale = int(devices.told([float(place.stale)])[0])
        if place.stopped is None and place.stale >= settings.patience:
            place.stopped = f"no better NDCG@10 for {place.stale} validations"
        place.seconds = before + time.monotonic() - began
        place.curve.append(_point(done, place, running, quality))
        if progress:
            shown = f", HR@10 {quality.hr10:.3f}, NDCG@10 {quality.ndcg10:.3f}" if quality else ""
            progress(f"epoch {done:.2f}, loss {running:.3f}{shown}, {place.seconds:.0f} s")
        save()
    if best is not None:
        restore(model, best)
        if place.stale or quality is None:
            quality = evaluate(model, rows.split.held_out, rows.catalogue, sids, settings)
    model.eval()
    return SftResult(
        place.step, place.curve[-1]["epoch"] if place.curve else 0.0, place.seconds, running, quality,
        place.stopped or "all epochs done", place.curve,
    )  # fmt: skip


def validate(
    model: GeneratorForCausalLM, rows: TrainingRows, sids: SidSet, settings: TrainerSettings
) -> Quality | None:
    """How the model ranks what is held out, its strength fitted where that is asked; None: nothing is."""
    if not len(rows.split.held_out.targets):
        return None
    if settings.fit_strength:
        strengthen(model, Ranker(model, rows.catalogue.codes, sids, settings.beam), rows.split.held_out)
    return evaluate(model, rows.split.held_out, rows.catalogue, sids, settings)


def spells_more_real_sids(measured: Quality, place: TrainingState, settings: TrainerSettings) -> bool:
    """Whether weights rank as well as the best, and spell more real SIDs than those that are kept do.

    Asked as long as what is kept could not be released: where the dense head is done after an epoch, the SIDs
    are not. As well: within one standard error of the best NDCG, which m (1 - m) / n bounds (squared).
    """
    best = min(max(place.best_ndcg, 0.0), 1.0)
    error = math.sqrt(best * (1 - best) / measured.users)
    near = measured.ndcg10 >= place.best_ndcg - error
    return place.validity < settings.min_validity and measured.validity > place.validity and near


def _seed_of(seed: int, epoch: int, batch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch, batch)).generate_state(1)[0])


def _point(epoch: float, place: TrainingState, loss: float, quality: Quality | None) -> dict[str, float]:
    made = {"epoch": epoch, "step": float(place.step), "seconds": place.seconds}
    if math.isfinite(loss):
        made["loss"] = loss
    return made | ({"hr10": quality.hr10, "ndcg10": quality.ndcg10} if quality else {})
