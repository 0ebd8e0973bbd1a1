"""The loop of a stage that takes one step for each batch, and goes on where it was cut off."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trainer.tuning.checkpoint import (
    Checkpoint,
    Saved,
    optimizer_tensors,
    restore,
    restore_optimizer,
    seed_of,
    trained_weights,
)
from trainer.tuning.optimization import ClippedAdamW

Batch = TypeVar("Batch")
INTERRUPTED = "interrupted"
TIME_SPENT = "time budget spent"
ALL_STEPS = "all steps done"


@dataclass
class StepState:
    """How far a stage is. The fields are keys of its checkpoint's state."""

    step: int = 0
    seconds: float = 0.0
    loss: float | None = None  # of the last step
    stopped: str | None = None  # why the stage ended; None: it has not
    about: dict[str, Any] = field(default_factory=dict)  # what the stage itself remembers


@dataclass
class StepLoop:
    """A stage of one step for each batch, with a checkpoint every `checkpoint_seconds` and where it ends.

    What is drawn in a step belongs to the stage's `seed` and the number of the step, so that a stage that
    goes on ends in the very weights of an unbroken one. A time budget is shared by all its parts.
    """

    model: nn.Module
    optimizer: ClippedAdamW
    seed: int
    folder: Path | None = None  # None: no checkpoint
    checkpoint_seconds: float = 0.0
    max_seconds: float | None = None
    stop: Callable[[], bool] | None = None
    state: StepState = field(default_factory=StepState)
    # Tensors of the stage itself that a checkpoint holds beside weights and optimizer.
    extra: Callable[[], Mapping[str, Mapping[str, Tensor]]] = dict

    def __post_init__(self) -> None:
        self._loss: Tensor | float = math.nan
        self._checkpoint = Checkpoint(self.folder) if self.folder else None
        self._began = time.monotonic()
        self._saved_at = self._began
        self._seconds_before = 0.0

    def load(self) -> Saved | None:
        """Put the checkpoint into model, optimizer and state; None where there is none."""
        saved = self._checkpoint.load() if self._checkpoint else None
        if saved is not None:
            restore(self.model, saved.tensors["weights"])
            restore_optimizer(self.optimizer.optimizer, saved.tensors["optimizer"])
            self.state = StepState(**saved.state)
        self._seconds_before = self.state.seconds
        self._loss = math.nan if self.state.loss is None else self.state.loss
        return saved

    def run(
        self,
        batches: Iterable[Batch],
        loss_of: Callable[[Batch], Tensor],
        *,
        learning_rate: Callable[[float], float] | None = None,
        after_step: Callable[[int], str | None] | None = None,
    ) -> None:
        """Steps from the state's own number on; `batches` are those from the first step.

        `learning_rate(share)` is the rate after this share of the time budget; None: the optimizer's own.
        `after_step(step)` says why the stage ends after so many steps, or None. `state.stopped` is then the
        reason: a stage that is `INTERRUPTED` goes on in the next call, whose `stop` says so no more.
        """
        state = self.state
        if state.stopped not in (None, INTERRUPTED):
            return
        state.stopped = None
        for batch in islice(batches, state.step, None):
            share = self._spent_share()
            if share >= 1 or (self.stop is not None and self.stop()):
                state.stopped = TIME_SPENT if share >= 1 else INTERRUPTED
                break
            torch.manual_seed(seed_of(self.seed, state.step))
            self._loss = self.optimizer.minimise(loss_of(batch), learning_rate and learning_rate(share))
            state.step += 1
            state.stopped = after_step(state.step) if after_step else None
            if state.stopped is not None:
                break
            if time.monotonic() - self._saved_at >= self.checkpoint_seconds:
                self.save()
        state.stopped = state.stopped or ALL_STEPS
        self.save()

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        self._spent_share()
        self._saved_at = time.monotonic()
        self.state.loss = self.loss if math.isfinite(self.loss) else None
        if self._checkpoint is not None:
            tensors = {
                "weights": trained_weights(self.model),
                "optimizer": optimizer_tensors(self.optimizer.optimizer),
            }
            self._checkpoint.save({**tensors, **self.extra()}, asdict(self.state))

    @property
    def loss(self) -> float:
        """Of the last step; NaN before the first one."""
        return float(self._loss)

    def _spent_share(self) -> float:
        """The share of the time budget that is spent, 0 where there is none; the state's seconds are set."""
        self.state.seconds = self._seconds_before + time.monotonic() - self._began
        return self.state.seconds / self.max_seconds if self.max_seconds else 0.0
