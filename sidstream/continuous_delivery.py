"""Continuous delivery of models, unattended: train -> offline checks -> shadow -> canary -> trial -> verdict.

The process keeps no state: each turn reads what is in service and its outcomes so far, and takes the one step
that follows. A process that dies is replaced by another, which goes on where the first stopped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from registry.bundles.store import Registry
from registry.experiment.health import read_health
from registry.experiment.next_move import Evidence, Move, next_move
from registry.experiment.outcomes import cohort_ms, read_all_outcomes
from registry.releases import release
from sidstream.decision_plot import store_decision_plot
from streams.errors import SidstreamError
from streams.events import Rollout

if TYPE_CHECKING:
    from sidstream.settings import Settings
    from trainer.cycle_result import CycleResult

Promoting = Callable[[], contextlib.AbstractContextManager[tuple[Registry, release.Publisher]]]


@dataclass(frozen=True)
class Turn:
    """The result of one turn.

    `did`: wait, train, skip, refuse, advance, promote, reject, inconclusive or rollback.
    """

    did: str
    sentence: str
    trial: str | None = None
    record: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def acted(self) -> bool:
        """Did anything change? If so, the next turn need not wait."""
        return self.did not in ("wait", "skip", "refuse")


class ContinuousDelivery:
    """Trains and releases one recommender's models. Call `turn()` repeatedly.

    `current()` reads the rollout in service, `train()` runs one update cycle that starts its trial at the
    first step of the ramp, `promoting()` gives registry and publisher under the lease.
    """

    def __init__(
        self, settings: Settings, registry: Registry, redis: Any, current: Callable[[], Rollout | None],
        train: Callable[[], CycleResult], promoting: Promoting,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._registry = registry
        self._redis = redis
        self._current = current
        self._train = train
        self._promoting = promoting
        self._trained_at = -float("inf")
        self._journalled = ""

    def turn(self) -> Turn:
        """Take the one step that comes next. Raises SidstreamError where a server does not answer."""
        if release.unfinished(self._registry) is not None:
            with self._promoting() as (registry, client):
                finished = release.finish_step(registry, client)
            if finished is not None:
                return Turn(
                    finished.action, f"finished the step {finished.action} that was cut short", finished.trial
                )
        rollout = self._current()
        if rollout is None:
            return self._train_when_due("nothing is in service yet")
        sight = self._read_trial(rollout.trial)
        settings = self._settings
        move = next_move(rollout, sight, settings.rollout, settings.guards, settings.gate)
        if move.do == "wait":
            return Turn("wait", move.sentence, rollout.trial, move.record)
        if move.do == "train":
            return self._train_when_due(move.sentence)
        return self._take_step(rollout, move, sight)

    def _take_step(self, rollout: Rollout, move: Move, sight: Evidence) -> Turn:
        settings = self._settings
        with self._promoting() as (registry, client):
            now = self._current()
            if now is None or now.trial != rollout.trial:
                return Turn("wait", "somebody else took a step meanwhile", rollout.trial)
            if move.do == "advance":
                assert move.step is not None
                rollout_event = release.advance(registry, client, move.step, settings.rollout)
                return Turn("advance", move.sentence, rollout_event.trial)
            assert move.record is not None
            if move.do == "rollback":
                try:
                    rollout_event = release.rollback(registry, client, settings.rollout, move.record)
                except SidstreamError as error:
                    # The first champion has no predecessor: the alarm stays, and people must act.
                    return Turn("refuse", f"{move.sentence}; but {error}", rollout.trial, move.record)
            else:
                rollout_event = release.conclude(registry, client, move.record, settings.rollout)
        details = {"picture": store_decision_plot(registry, move.record, sight.mature, settings.gate)}
        return Turn(rollout_event.action, move.sentence, rollout.trial, move.record, details)

    def _train_when_due(self, why: str) -> Turn:
        schedule = self._settings.trainer.schedule
        seconds_left = 60 * schedule.every_minutes - (time.monotonic() - self._trained_at)
        if seconds_left > 0:
            return Turn("wait", f"{why}; the next training is due in {seconds_left / 60:.0f} minutes")
        self._trained_at = time.monotonic()
        try:
            result = self._train()
        except SidstreamError as error:
            return self._journal_once(Turn("refuse", str(error)))
        if result.skipped:
            return self._journal_once(Turn("skip", result.summary()))
        turn = Turn("train", result.summary(), result.trial, details=result.as_dict())
        return self._journal_once(turn) if result.no_dpo else turn

    def _journal_once(self, turn: Turn) -> Turn:
        """Write the reason into the journal, once as long as it stays the same."""
        if turn.sentence != self._journalled:
            self._registry.log_cycle(f"{turn.did}: {turn.sentence}", turn.details)
            self._journalled = turn.sentence
        return turn

    def _read_trial(self, trial: str) -> Evidence:
        mature, recent = read_all_outcomes(self._redis, trial, self._settings.gate.value)
        return Evidence(mature, recent, read_health(self._redis, trial), cohort_ms(self._redis))
