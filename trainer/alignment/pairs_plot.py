"""Plots of preference pairs: when they were decided, what their codes share, and how old they are."""

from __future__ import annotations

from matplotlib.figure import Figure

from trainer.alignment.pairs_report import PairsReport
from trainer.plots.png import png

_DAY_MS = 86_400_000


def draw_pairs_report(report: PairsReport) -> dict[str, bytes]:
    """Three PNG files by name: `pairs-over-time`, `shared-prefixes` and `ages`."""
    return {
        "pairs-over-time.png": png(_over_time(report)),
        "shared-prefixes.png": png(_prefixes(report)),
        "ages.png": png(_ages(report)),
    }


def _over_time(report: PairsReport) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    # What matplotlib counts in days since 1970, it writes as dates.
    days = [edge / _DAY_MS for edge in report.timeline.edges]
    for scheme, counts in report.timeline.counts.items():
        axis.stairs(counts, days, label=f"{scheme}: {sum(counts):,}")
    axis.xaxis_date()
    axis.set(xlabel="time of the decision (UTC)", ylabel="pairs", ylim=(0, None))
    axis.set_title(f"{report.pairs:,} preference pairs of {report.users:,} users")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.autofmt_xdate()
    return figure


def _prefixes(report: PairsReport) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(report.groups)
    for at, group in enumerate(report.groups):
        places = [level + (at + 0.5) * width - 0.4 for level in range(1, len(group.shared) + 1)]
        axis.bar(places, group.shared, width, label=f"{group.scheme}, {group.codebook[:8]}")
    levels = max(len(group.shared) for group in report.groups)
    axis.set_xticks(range(1, levels + 1), [f"first {level}" for level in range(1, levels + 1)])
    axis.set(xlabel="codes that the rejected and the chosen SID share", ylabel="share of rejected SIDs")
    axis.legend()
    axis.grid(alpha=0.3, axis="y")
    return figure


def _ages(report: PairsReport) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot([age / _DAY_MS for age in report.ages_ms], [share / 100 for share in range(101)])
    axis.axvline(report.age_ms.median / _DAY_MS, linestyle=":", label="median")
    axis.set(xlabel="age (days)", ylabel="share of pairs that are younger", ylim=(0, 1))
    axis.legend()
    axis.grid(alpha=0.3)
    return figure
