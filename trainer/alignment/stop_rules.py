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
        self.began = time.monotonic()
        self.last: dict[str, float] = {}
        self.curve: list[dict[str, float]] = []
        self.stopped = "all pairs seen"
        self.before: ProbeOutcome | None = None
        self._good: dict[str, Tensor] = {}
        self._good_at = 0
        self._failed = False
        self._probed = 0

    @property
    def drop(self) -> float:
        """Nats that the chosen answer lost against the reference, at the last look."""
        return -self.last.get("risen", 0.0)

    @property
    def margin(self) -> float:
        """The mean margin at the last look, times beta."""
        return self.settings.beta * self.last.get("margin", 0.0)

    def kept_step(self, steps: int) -> int:
        """The step whose weights the stage of so many steps ends with."""
        return self._good_at if self._failed else steps

    def begin(self, model: Any) -> None:
        """Probe the model that the stage starts from."""
        self.began = time.monotonic()
        if self.probe is not None:
            self.before = self._ask(model)
            self._keep(model, 0)

    def end(self, model: Any, step: int) -> None:
        """A last probe, of the weights that the stage ended with, unless one has failed already."""
        if self.before is not None and self._probed < step and not self._failed:
            self._look(model, step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kw: Any
    ) -> None:
        """Remember what TRL averaged; stop where the chosen answer fell too far."""
        # The last log of a run sums it up, and has no figures of its own.
        if not logs or "risen" not in logs:
            return
        self.last = {key: float(value) for key, value in logs.items()}
        if self.progress:
            self.progress(f"step {state.global_step} of {state.max_steps}, margin {self.margin:.3f}")
        if "loss" in self.last:
            self.curve.append({
                "step": float(state.global_step), "loss": self.last["loss"], "drop": self.drop,
                "margin": self.margin, "accuracy": self.last["accuracy"], "beta": self.last["beta"],
            })  # fmt: skip
        if self.drop > self.settings.max_drop:
            self.stopped = f"the chosen SID's log-probability fell {self.drop:.2f} nats below the reference"
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
        """Look at time, at the wish to stop and, every `probe_steps`, at held-out users."""
        budget = self.settings.max_seconds
        if budget is not None and time.monotonic() - self.began > budget:
            self.stopped = "time budget spent"
            control.should_training_stop = True
        elif self.stop is not None and self.stop():
            self.stopped = "interrupted"
            control.should_training_stop = True
        elif self.before is not None and state.global_step % self._every(state.max_steps) == 0:
            control.should_training_stop = not self._look(model, state.global_step)

    def _every(self, steps: int) -> int:
        """Steps between two looks: a short stage has several, too, or there is nothing to go back to."""
        return min(self.settings.probe_steps, max(_MIN_STEPS_BETWEEN_PROBES, steps // _PROBES_PER_STAGE))

    def _look(self, model: Any, step: int) -> bool:
        """Whether the policy passes; where it does not, it gets the weights of the last look back."""
        assert self.before is not None, "a probe was made at the beginning"
        found, before = self._ask(model), self.before
        self._probed = step
        self.curve.append({"step": float(step), "hr10": found.hr10, "validity": found.validity})
        said = ""
        if _fell_significantly(before.hits, found.hits, self.settings.max_recall_fall * before.hr10):
            said = f"HR@10 of held-out users fell from {before.hr10:.3f} to {found.hr10:.3f}"
        elif _fell_significantly(before.valid, found.valid, self.settings.max_invalid_rise):
            said = f"the share of real SIDs fell from {before.validity:.3f} to {found.validity:.3f}"
        if not said:
            self._keep(model, step)
            return True
        self.stopped = f"{said}; the weights of step {self._good_at} are kept"
        self._failed = True
        self._give_back(model)
        return False

    @torch.no_grad()
    def _ask(self, model: Any) -> ProbeOutcome:
        assert self.probe is not None, "only asked where there is a probe"
        training = model.training
        found = self.probe(model)
        model.train(training)
        return found

    @torch.no_grad()
    def _keep(self, model: Any, step: int) -> None:
        self._good_at = step
        self._good = {
            name: value.detach().cpu().clone()
            for name, value in model.named_parameters()
            if value.requires_grad
        }

    @torch.no_grad()
    def _give_back(self, model: Any) -> None:
        for name, value in model.named_parameters():
            if name in self._good:
                value.copy_(self._good[name])
