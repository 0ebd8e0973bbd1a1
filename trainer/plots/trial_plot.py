"""A plot of a trial: each metric's interval over time, for each comparison that its decision rests on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from registry.arms import ANCHOR
from registry.bundles.store import Registry
from registry.experiment.gate import METRIC_NAMES
from registry.experiment.interim_analyses import interim_analyses
from registry.experiment.outcomes import ArmOutcomes
from registry.settings import GateSettings
from streams.errors import SidstreamError
from trainer.plots.png import png


def draw_trial(record: Mapping[str, Any], path: list[dict[str, Any]]) -> bytes:
    """A PNG of the metrics' intervals over time, one row for each comparison that the decision rests on.

    Raises SidstreamError where nothing was compared.
    """
    pairs = [
        f"{comparison['target']} against {comparison['control']}"
        for comparison in record.get("comparisons", [])
    ]
    pairs = [pair for pair in pairs if any(entry.get(pair) for entry in path)]
    if not pairs:
        raise SidstreamError("there is nothing to draw: no two arms have users in a mature cohort")
    metrics = [
        (metric, name)
        for metric, name in METRIC_NAMES.items()
        if any(entry[pair][metric] for pair in pairs for entry in path if entry.get(pair))
    ]
    figure = Figure(figsize=(5.5 * len(metrics), 3.2 * len(pairs)), layout="constrained")
    axes = figure.subplots(len(pairs), max(len(metrics), 1), squeeze=False)
    for row, pair in enumerate(pairs):
        for column, (metric, name) in enumerate(metrics):
            _draw_difference(axes[row][column], f"{pair}: {name}", [(entry["cohort"], entry[pair][metric])
                   for entry in path if entry.get(pair) and entry[pair][metric]])  # fmt: skip
    figure.suptitle(f"trial {record['trial']}, decision {record['decision']}: {record['verdict']}")
    return png(figure)


def save_trial_plot(
    registry: Registry,
    record: Mapping[str, Any],
    outcomes_by_arm: Mapping[str, ArmOutcomes],
    settings: GateSettings,
) -> str:
    """Draw a decision and store it beside its record, with every version that it is about; its path there.

    Raises SidstreamError as `draw_trial` does, and where MLflow does not answer.
    """
    image = draw_trial(record, interim_analyses(outcomes_by_arm, settings, record["mode"]))
    for name, arm in record["arms"].items():
        if name != ANCHOR:
            registry.store_decision_plot(arm["version"], record["decision"], image)
    return f"decisions/{record['decision']}.png"


def _draw_difference(axis: Any, title: str, points: list[tuple[int, dict[str, Any]]]) -> None:
    """One metric's difference with its interval, zero, and the bound that it must be above."""
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("cohorts since the first", fontsize=8)
    axis.set_ylabel("difference", fontsize=8)
    axis.axhline(0, color="grey", linewidth=0.8)
    with_interval = [(cohort, figures) for cohort, figures in points if figures["difference_interval"]]
    if not with_interval:
        return
    first = points[0][0]
    cohorts = [cohort - first + 1 for cohort, _ in with_interval]
    axis.plot(
        cohorts, [figures["difference"] for _, figures in with_interval], color="C0", marker=".", markersize=3
    )
    low, high = zip(*(figures["difference_interval"] for _, figures in with_interval), strict=True)
    axis.fill_between(cohorts, low, high, color="C0", alpha=0.2)
    bound = [-figures["margin"] * figures["control"] for _, figures in with_interval]
    if any(bound):
        axis.plot(cohorts, bound, color="C3", linestyle="--", linewidth=0.9, label="margin")
        axis.legend(fontsize=7)
    # The first intervals are wide beyond reading: the scale is that of the later half.
    half = with_interval[len(with_interval) // 2 :]
    edges = [edge for _, figures in half for edge in figures["difference_interval"]] + [0.0, min(bound)]
    span = max(edges) - min(edges) or 1.0
    axis.set_ylim(min(edges) - 0.1 * span, max(edges) + 0.1 * span)
