"""What an update cycle did, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from registry.bundles.ranking import Ranking
from trainer.offline_checks.offpolicy import OffPolicyVerdict
from trainer.offline_checks.quality import HeldOutQuality, for_json
from trainer.rewards.online import OnlineResult
from trainer.tuning.sft import SftResult

if TYPE_CHECKING:
    from trainer.alignment.dpo import DpoResult

# progress(stage, text, last): `last` marks the one line that stays of a stage.
ReportStage = Callable[[str, str, bool], None]


@dataclass
class CycleResult:
    """What a cycle did. `skipped` says why nothing was registered."""

    skipped: str | None = None
    versions: dict[str, str] = field(default_factory=dict)  # kind -> version
    bundles: dict[str, str] = field(default_factory=dict)  # kind -> bundle id
    action: str | None = None  # "start" or "trial"
    trial: str | None = None
    events: int = 0
    pairs: int = 0
    withdrawn: int = 0  # rejected items of new pairs that late purchases and clicks contradict
    no_dpo: str | None = None  # why there is no DPO model
    sft: SftResult | None = None
    dpo: DpoResult | None = None
    dpo_quality: HeldOutQuality | None = None  # of the aligned model; None: there is none, or nobody held out
    offpolicy: dict[str, OffPolicyVerdict] = field(default_factory=dict)  # kind -> what explored answers say
    metrics: dict[str, float] = field(default_factory=dict)
    rewards: OnlineResult | None = None  # of the online stage; None: there was none
    seconds: dict[str, float] = field(default_factory=dict)

    def record_quality(self, stage: str, quality: HeldOutQuality) -> None:
        """Put the figures of held-out users into the metrics of a stage."""
        numbers = {
            "users": quality.users, "hr10": quality.hr10, "ndcg10": quality.ndcg10,
            "validity": quality.validity, "dense_weight": quality.ranking.dense_weight,
        }  # fmt: skip
        if quality.purchases:
            numbers["purchase_hr10"] = quality.purchase_hr10
        self.metrics |= {f"{stage}/{name}": float(value) for name, value in numbers.items()}

    def ranking(self) -> Ranking:
        """How the two heads of the cycle's models are mixed."""
        return self.sft.quality.ranking if self.sft and self.sft.quality else Ranking()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return for_json(self)

    def summary(self) -> str:
        """What the cycle did, in a sentence."""
        if self.skipped:
            return f"nothing trained: {self.skipped}"
        shown = ", ".join(f"{kind} as version {version}" for kind, version in self.versions.items())
        where = "in service" if self.action == "start" else f"on trial {self.trial}"
        reason = f"; no DPO model: {self.no_dpo}" if self.no_dpo else ""
        return f"registered {shown}, {where}{reason}"


class StageReporter:
    """One line a stage, and its seconds."""

    def __init__(self, progress: ReportStage | None, seconds: dict[str, float]) -> None:
        self._progress, self._seconds = progress, seconds
        self._began = time.monotonic()

    def report(self, stage: str, text: str) -> None:
        """Say how far the stage is."""
        if self._progress:
            self._progress(stage, text, False)

    def finish(self, stage: str, text: str) -> None:
        """End the stage."""
        now = time.monotonic()
        self._seconds[stage] = now - self._began
        if self._progress:
            self._progress(stage, f"{text} ({now - self._began:.1f} s)", True)
        self._began = now
