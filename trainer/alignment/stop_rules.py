"""The stop rules of alignment, and the weights to go back to when one of them ends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.offline_checks.probe import HeldOutProbe, ProbeOutcome
from trainer.settings import DpoSettings
from trainer.tuning.checkpoint import restore, trained_weights

# One-sided, 1 %: a stage has several probes of a few hundred users, and none of them may stop it by chance.
_Z_99_ONE_SIDED = 2.326
# A stage of any length has about six probes of held-out users, at least five steps apart.
_PROBES_PER_STAGE, _MIN_STEPS_BETWEEN_PROBES = 6, 5


def _fell_significantly(before: npt.NDArray[np.bool_], now: npt.NDArray[np.bool_], margin: float) -> bool:
    """Whether a share fell by more than `margin`, and not by chance: the paired test, user by user."""
    fall = before.astype(float) - now
    lower_bound = fall.mean() - _Z_99_ONE_SIDED * fall.std() / len(fall) ** 0.5
    return bool(fall.mean() > margin and lower_bound > 0)


class StopRules:
    """Reports progress, and ends a stage of `steps` steps by three rules.

    1. The chosen answer's log-probability is more than `max_drop` nats below the reference.
    2. HR@10 of held-out users fell by more than the share `max_recall_fall` since the start of the stage.
    3. The share of unconstrained answers that are no SID rose by more than `max_invalid_rise`.

    Rules 2 and 3 hold only where the fall is significant. After them the model gets the weights back that
    passed the last probe.
    """

    def __init__(
        self, settings: DpoSettings, probe: HeldOutProbe | None, progress: Callable[[str], None] | None,
        steps: int,
    ) -> None:  # fmt: skip
        self.settings, self.probe, self.progress, self.steps = settings, probe, progress, steps
        self.last_log: dict[str, float] = {}
        self.curve: list[dict[str, float]] = []
        self.outcome_at_start: ProbeOutcome | None = None
        self.kept_weights: dict[str, Tensor] = {}  # those that passed the last probe
        self._saved_step = 0
        self._failed = False
        self._probed_step = 0

    def state(self) -> dict[str, Any]:
        """All but the kept weights, as JSON for a checkpoint."""
        start = self.outcome_at_start
        return {
            "last_log": self.last_log, "curve": self.curve, "saved_step": self._saved_step,
            "failed": self._failed, "probed_step": self._probed_step,
            "start": start and {"hits": start.hits.tolist(), "valid": start.valid.tolist()},
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any], kept_weights: dict[str, Tensor]) -> None:
        """Put back what `state` gave, and the kept weights."""
        self.last_log, self.curve, self.kept_weights = state["last_log"], state["curve"], kept_weights
        self._saved_step, self._failed = state["saved_step"], state["failed"]
        self._probed_step = state["probed_step"]
        if (start := state["start"]) is not None:
            self.outcome_at_start = ProbeOutcome(
                np.array(start["hits"], bool), np.array(start["valid"], bool)
            )

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
        if self.probe is not None:
            self.outcome_at_start = self._run_probe(model)
            self._save_weights(model, 0)

    def end(self, model: Any, step: int) -> str | None:
        """Probe the last step's weights, unless a probe failed before; why they are not kept, or None."""
        if self.outcome_at_start is None or self._probed_step >= step or self._failed:
            return None
        return self._probe_failure(model, step)

    def after_log(self, step: int, figures: dict[str, float]) -> str | None:
        """Keep the mean figures since the last log; why the stage ends here, None: it goes on."""
        self.last_log = figures
        if self.progress:
            self.progress(f"step {step} of {self.steps}, margin {self.margin:.3f}")
        self.curve.append({
            "step": float(step), "loss": figures["loss"], "drop": self.drop, "margin": self.margin,
            "accuracy": figures["accuracy"], "beta": figures["beta"],
        })  # fmt: skip
        if self.drop > self.settings.max_drop:
            return f"the chosen SID's log-probability fell {self.drop:.2f} nats below the reference"
        return None

    def after_step(self, model: Any, step: int) -> str | None:
        """Probe held-out users every `probe_steps` steps; why the stage ends here, None: it goes on."""
        if self.outcome_at_start is None or step % self._steps_between_probes():
            return None
        return self._probe_failure(model, step)

    def _steps_between_probes(self) -> int:
        """Steps between two probes; a short stage has several, too, so that it has weights to go back to."""
        return min(self.settings.probe_steps, max(_MIN_STEPS_BETWEEN_PROBES, self.steps // _PROBES_PER_STAGE))

    def _probe_failure(self, model: Any, step: int) -> str | None:
        """Probe the policy; where it fails, restore the weights that passed the last probe, and say why."""
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
            return None
        self._failed = True
        restore(model, self.kept_weights)
        return f"{failure}; the weights of step {self._saved_step} are kept"

    @torch.no_grad()
    def _run_probe(self, model: Any) -> ProbeOutcome:
        assert self.probe is not None, "called only where there is a probe"
        training = model.training
        outcome = self.probe(model)
        model.train(training)
        return outcome

    def _save_weights(self, model: Any, step: int) -> None:
        self._saved_step = step
        self.kept_weights = {name: value.cpu() for name, value in trained_weights(model).items()}
