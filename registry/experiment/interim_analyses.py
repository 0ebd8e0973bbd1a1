"""The intervals of a trial over time: what each look would have said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from registry.arms import CHAMPION, DPO, SFT
from registry.experiment.gate import compare
from registry.experiment.outcomes import ArmOutcomes
from registry.experiment.statistics import ArmSums, arm_sums
from registry.settings import GateSettings

# Points of a curve: more are not told apart in a picture.
_MOST: Final = 40
COMPARED_ARMS: Final = ((DPO, SFT), (DPO, CHAMPION), (SFT, CHAMPION))


def interim_analyses(
    seen: Mapping[str, ArmOutcomes], settings: GateSettings, mode: str
) -> list[dict[str, Any]]:
    """Cumulative figures after each cohort (at most 40 of them, evenly chosen, the last always).

    One entry a look: `cohort`, and under "target against control" the figures of `cvr` and `ctr` as a
    decision record has them. Pairs of which an arm saw nobody are left out.
    """
    cohorts = sorted({cohort for rows in seen.values() for cohort in rows.cohorts})
    if len(cohorts) > _MOST:
        cohorts = [cohorts[(n + 1) * len(cohorts) // _MOST - 1] for n in range(_MOST)]
    found = []
    for cohort in cohorts:
        arms = {name: arm_sums(rows.up_to(cohort).total()) for name, rows in seen.items()}
        entry: dict[str, Any] = {"cohort": cohort}
        for target, control in COMPARED_ARMS:
            if arms.get(target, ArmSums()).users and arms.get(control, ArmSums()).users:
                made = compare(target, control, arms, settings, mode)
                entry[f"{target} against {control}"] = {"cvr": made.cvr, "ctr": made.ctr}
        found.append(entry)
    return found
