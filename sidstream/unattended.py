"""The unattended cycle: train -> offline checks -> shadow -> canary -> trial -> verdict -> next.

Nothing is remembered here: each turn reads what is in service, what was seen of it, and does the one thing
that follows. A process that dies is replaced by another, which goes on where it stood.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from registry.bundles.store import Registry
from registry.experiment.health import read_health
from registry.experiment.outcomes import cohort_ms, read_all_outcomes
from registry.experiment.trial import Move, Sight, next_move
from registry.releases import release
from sidstream.pictures import keep_picture
from streams.errors import SidstreamError
from streams.events import Rollout

if TYPE_CHECKING:
    from sidstream.settings import Settings
    from trainer.cycle_result import CycleResult

Promoting = Callable[[], contextlib.AbstractContextManager[tuple[Registry, release.Publisher]]]


@dataclass(frozen=True)
class Turn:
    """What one turn did: wait, train, skip, refuse, advance, promote, reject, inconclusive or rollback."""

    did: str
    sentence: str
    trial: str | None = None
    record: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def acted(self) -> bool:
        """Did anything change? If so, the next turn need not wait."""
        return self.did not in ("wait", "skip", "refuse")


class Cycle:
    """One recommender's unattended cycle. Call `turn()` again and again.

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
        """Do the one thing that comes next. Raises SidstreamError where a part does not answer."""
        if release.unfinished(self._registry) is not None:
            with self._promoting() as (registry, client):
                finished = release.finish(registry, client)
            if finished is not None:
                return Turn(
                    finished.action, f"finished the step {finished.action} that was cut short", finished.trial
                )
        rollout = self._current()
        if rollout is None:
            return self._learn("nothing is in service yet")
        sight = self._look(rollout.trial)
        settings = self._settings
        move = next_move(rollout, sight, settings.rollout, settings.guards, settings.gate)
        if move.do == "wait":
            return Turn("wait", move.sentence, rollout.trial, move.record)
        if move.do == "train":
            return self._learn(move.sentence)
        return self._act(rollout, move, sight)

    def _act(self, rollout: Rollout, move: Move, sight: Sight) -> Turn:
        settings = self._settings
        with self._promoting() as (registry, client):
            now = self._current()
            if now is None or now.trial != rollout.trial:
                return Turn("wait", "somebody else took a step meanwhile", rollout.trial)
            if move.do == "advance":
                assert move.step is not None
                made = release.advance(registry, client, move.step, settings.rollout)
                return Turn("advance", move.sentence, made.trial)
            assert move.record is not None
            if move.do == "rollback":
                try:
                    made = release.rollback(registry, client, settings.rollout, move.record)
                except SidstreamError as error:
                    # The first champion has nobody before it: the alarm stands, and people must act.
                    return Turn("refuse", f"{move.sentence}; but {error}", rollout.trial, move.record)
            else:
                made = release.conclude(registry, client, move.record, settings.rollout)
        details = {"picture": keep_picture(registry, move.record, sight.mature, settings.gate)}
        return Turn(made.action, move.sentence, rollout.trial, move.record, details)

    def _learn(self, why: str) -> Turn:
        schedule = self._settings.trainer.schedule
        left = 60 * schedule.every_minutes - (time.monotonic() - self._trained_at)
        if left > 0:
            return Turn("wait", f"{why}; the next training is due in {left / 60:.0f} minutes")
        self._trained_at = time.monotonic()
        try:
            result = self._train()
        except SidstreamError as error:
            return self._noted(Turn("refuse", str(error)))
        if result.skipped:
            return self._noted(Turn("skip", result.summary()))
        turn = Turn("train", result.summary(), result.trial, details=result.as_dict())
        return self._noted(turn) if result.no_dpo else turn

    def _noted(self, turn: Turn) -> Turn:
        """Keep the reason in the journal, once while it stays the same."""
        if turn.sentence != self._journalled:
            self._registry.journal(f"{turn.did}: {turn.sentence}", turn.details)
            self._journalled = turn.sentence
        return turn

    def _look(self, trial: str) -> Sight:
        mature, recent = read_all_outcomes(self._redis, trial)
        return Sight(mature, recent, read_health(self._redis, trial), cohort_ms(self._redis))
