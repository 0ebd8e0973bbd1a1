"""The stop rules of alignment, and the weights to go back to when one of them ends it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import TrainerCallback

from trainer.offline.probe import HeldOutProbe, ProbeOutcome
from trainer.settings import DpoSettings

# One-sided, 1 %: a look at some hundred users must not take noise for a collapse, and there are several.
_Z_99_ONE_SIDED = 2.326
# A stage of any length has about so many looks at held-out users, so many steps apart at least.
_PROBES_PER_STAGE, _MIN_STEPS_BETWEEN_PROBES = 6, 5


def _fell_significantly(before: npt.NDArray[np.bool_], now: npt.NDArray[np.bool_], margin: float) -> bool:
    """Whether a share fell by more than `margin`, and not by chance: the paired test, user by user."""
    fall = before.astype(float) - now
    least = fall.mean() - _Z_99_ONE_SIDED * fall.std() / len(fall) ** 0.5
    return bool(fall.mean() > margin and least > 0)


class StopRules(TrainerCallback):
    """Progress, the time budget, and three rules that end the stage.

    The chosen answer's log-probability fell more than `max_drop` below the reference; HR@10 of held-out
    users fell by more than `max_recall_fall` of what it was; `max_invalid_rise` more of the unconstrained
    answers are no SID. The last two must be more than noise, and the weights go back to the last probe that
    passed.
    """

    def __init__(
        self,
        settings: DpoSettings,
        probe: HeldOutProbe | None,
        progress: Callable[[str], None] | None,
        stop: Callable[[], bool] | None,
    ) -> None:
        self.settings, self.probe, self.progress, self.stop = settings, probe, progress, stop
        self.started_at = time.monotonic()
        self.last_log: dict[str, float] = {}
        self.curve: list[dict[str, float]] = []
        self.stopped = "all pairs seen"
        self.outcome_at_start: ProbeOutcome | None = None
        self._saved_weights: dict[str, Tensor] = {}
        self._saved_step = 0
        self._failed = False
        self._probed_step = 0

    @property
    def drop(self) -> float:
        """Nats that the chosen answer lost against the reference, at the last look."""
        return -self.last_log.get("risen", 0.0)

    @property
    def margin(self) -> float:
        """The mean margin at the last look, times beta."""
        return self.settings.beta * self.last_log.get("margin", 0.0)

    def kept_step(self, steps: int) -> int:
        """The step whose weights the stage of so many steps ends with."""
        return self._saved_step if self._failed else steps

    def begin(self, model: Any) -> None:
        """Probe the model that the stage starts from."""
        self.started_at = time.monotonic()
        if self.probe is not None:
            self.outcome_at_start = self._run_probe(model)
            self._save_weights(model, 0)

    def end(self, model: Any, step: int) -> None:
        """A last probe, of the weights that the stage ended with, unless one has failed already."""
        if self.outcome_at_start is not None and self._probed_step < step and not self._failed:
            self._passes_probe(model, step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kw: Any
    ) -> None:
        """Remember what TRL averaged; stop where the chosen answer fell too far."""
        # The last log of a run sums it up, and has no figures of its own.
        if not logs or "risen" not in logs:
            return
        self.last_log = {key: float(value) for key, value in logs.items()}
        if self.progress:
            self.progress(f"step {state.global_step} of {state.max_steps}, margin {self.margin:.3f}")
        if "loss" in self.last_log:
            self.curve.append({
                "step": float(state.global_step), "loss": self.last_log["loss"], "drop": self.drop,
                "margin": self.margin, "accuracy": self.last_log["accuracy"], "beta": self.last_log["beta"],
            })  # fmt: skip
        if self.drop > self.settings.max_drop:
            self.stopped = f"the chosen SID's log-probability fell {self.drop:.2f} nats below the reference"
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
        """Look at time, at the wish to stop and, every `probe_steps`, at held-out users."""
        budget = self.settings.max_seconds
        if budget is not None and time.monotonic() - self.started_at > budget:
            self.stopped = "time budget spent"
            control.should_training_stop = True
        elif self.stop is not None and self.stop():
            self.stopped = "interrupted"
            control.should_training_stop = True
        elif (
            self.outcome_at_start is not None
            and state.global_step % self._steps_between_probes(state.max_steps) == 0
        ):
            control.should_training_stop = not self._passes_probe(model, state.global_step)

    def _steps_between_probes(self, steps: int) -> int:
        """Steps between two looks: a short stage has several, too, or there is nothing to go back to."""
        return min(self.settings.probe_steps, max(_MIN_STEPS_BETWEEN_PROBES, steps // _PROBES_PER_STAGE))

    def _passes_probe(self, model: Any, step: int) -> bool:
        """Whether the policy passes; where it does not, it gets the weights of the last look back."""
        assert self.outcome_at_start is not None, "a probe was made at the beginning"
        outcome, before = self._run_probe(model), self.outcome_at_start
        self._probed_step = step
        self.curve.append({"step": float(step), "hr10": outcome.hr10, "validity": outcome.validity})
        failure = ""
        if _fell_significantly(before.hits, outcome.hits, self.settings.max_recall_fall * before.hr10):
            failure = f"HR@10 of held-out users fell from {before.hr10:.3f} to {outcome.hr10:.3f}"
        elif _fell_significantly(before.valid, outcome.valid, self.settings.max_invalid_rise):
            failure = f"the share of real SIDs fell from {before.validity:.3f} to {outcome.validity:.3f}"
        if not failure:
            self._save_weights(model, step)
            return True
        self.stopped = f"{failure}; the weights of step {self._saved_step} are kept"
        self._failed = True
        self._restore_weights(model)
        return False

    @torch.no_grad()
    def _run_probe(self, model: Any) -> ProbeOutcome:
        assert self.probe is not None, "only asked where there is a probe"
        training = model.training
        outcome = self.probe(model)
        model.train(training)
        return outcome

    @torch.no_grad()
    def _save_weights(self, model: Any, step: int) -> None:
        self._saved_step = step
        self._saved_weights = {
            name: value.detach().cpu().clone()
            for name, value in model.named_parameters()
            if value.requires_grad
        }

    @torch.no_grad()
    def _restore_weights(self, model: Any) -> None:
        for name, value in model.named_parameters():
            if name in self._saved_weights:
                value.copy_(self._saved_weights[name])
