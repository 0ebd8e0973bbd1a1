"""Interim analyses of a trial: the figures and intervals that a look after each cohort would have shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from registry.arms import CHAMPION, DPO, SFT
from registry.experiment.gate import METRIC_NAMES, compare, settings_against
from registry.experiment.outcomes import ArmOutcomes
from registry.experiment.statistics import ArmSums, arm_sums
from registry.settings import GateSettings

# Points of a curve: a plot cannot show more.
_MAX_LOOKS: Final = 40
COMPARED_ARMS: Final = ((DPO, SFT), (DPO, CHAMPION), (SFT, CHAMPION))


def interim_analyses(
    outcomes: Mapping[str, ArmOutcomes], settings: GateSettings, mode: str
) -> list[dict[str, Any]]:
    """Cumulative figures after each cohort (at most 40 of them, evenly chosen, the last always).

    One entry a look: `cohort`, and under "target against control" the figures of `cvr`, `ctr`, `opm` and
    `value` as in a decision record. Pairs with an arm without users are left out.
    """
    cohorts = sorted({cohort for rows in outcomes.values() for cohort in rows.cohorts})
    if len(cohorts) > _MAX_LOOKS:
        cohorts = [cohorts[(n + 1) * len(cohorts) // _MAX_LOOKS - 1] for n in range(_MAX_LOOKS)]
    outcomes = {name: rows.capped(settings.max_impressions_per_user) for name, rows in outcomes.items()}
    challengers = max(sum(name in outcomes for name in (DPO, SFT)), 1)
    looks = []
    for cohort in cohorts:
        arms = {name: arm_sums(rows.up_to(cohort).total()) for name, rows in outcomes.items()}
        entry: dict[str, Any] = {"cohort": cohort}
        for target, control in COMPARED_ARMS:
            if arms.get(target, ArmSums()).users and arms.get(control, ArmSums()).users:
                of_pair = settings_against(control, challengers, settings)
                comparison = compare(target, control, arms, of_pair, mode)
                entry[f"{target} against {control}"] = {
                    metric: getattr(comparison, metric) for metric in METRIC_NAMES
                }
        looks.append(entry)
    return looks
