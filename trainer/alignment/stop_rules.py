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

from trainer.offline_checks.probe import HeldOutProbe, ProbeOutcome
from trainer.settings import DpoSettings

# One-sided, 1 %: a stage has several probes of a few hundred users, and none of them may stop it by chance.
_Z_99_ONE_SIDED = 2.326
# A stage of any length has about six probes of held-out users, at least five steps apart.
_PROBES_PER_STAGE, _MIN_STEPS_BETWEEN_PROBES = 6, 5


def _fell_significantly(before: npt.NDArray[np.bool_], now: npt.NDArray[np.bool_], margin: float) -> bool:
    """Whether a share fell by more than `margin`, and not by chance: the paired test, user by user."""
    fall = before.astype(float) - now
    lower_bound = fall.mean() - _Z_99_ONE_SIDED * fall.std() / len(fall) ** 0.5
    return bool(fall.mean() > margin and lower_bound > 0)


class StopRules(TrainerCallback):
    """Reports progress, holds the time budget, and ends the stage by three rules.

    1. The chosen answer's log-probability is more than `max_drop` nats below the reference.
    2. HR@10 of held-out users fell by more than the share `max_recall_fall` since the start of the stage.
    3. The share of unconstrained answers that are no SID rose by more than `max_invalid_rise`.

    Rules 2 and 3 hold only where the fall is significant. After them the model gets the weights back that
    passed the last probe.
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
        """Nats that the chosen answer lost against the reference, at the last log."""
        return -self.last_log.get("risen", 0.0)

    @property
    def margin(self) -> float:
        """The mean margin at the last log, times beta."""
        return self.settings.beta * self.last_log.get("margin", 0.0)

    def kept_step(self, steps: int) -> int:
        """The step whose weights are kept after a stage of `steps` steps."""
        return self._saved_step if self._failed else steps

    def begin(self, model: Any) -> None:
        """Probe the model that the stage starts from."""
        self.started_at = time.monotonic()
        if self.probe is not None:
            self.outcome_at_start = self._run_probe(model)
            self._save_weights(model, 0)

    def end(self, model: Any, step: int) -> None:
        """Probe the weights of the last step, unless a probe failed before."""
        if self.outcome_at_start is not None and self._probed_step < step and not self._failed:
            self._passes_probe(model, step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kw: Any
    ) -> None:
        """Keep the figures that TRL averaged; stop where the chosen answer fell too far."""
        # The last log of a run is a summary without these figures.
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
        """Stop at the time budget or on request; probe held-out users every `probe_steps` steps."""
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
        """Steps between two probes; a short stage has several, too, so that it has weights to go back to."""
        return min(self.settings.probe_steps, max(_MIN_STEPS_BETWEEN_PROBES, steps // _PROBES_PER_STAGE))

    def _passes_probe(self, model: Any, step: int) -> bool:
        """Probe the policy; where it fails, restore the weights that passed the last probe."""
        assert self.outcome_at_start is not None, "`begin` sets the first outcome"
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
        assert self.probe is not None, "called only where there is a probe"
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
