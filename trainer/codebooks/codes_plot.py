"""A plot of a codebook report: how many items each code has, level by level, and what neighbours share."""

from __future__ import annotations

from matplotlib.figure import Figure

from trainer.codebooks.report import CodebookReport
from trainer.plots.png import png


def draw_codebook_report(report: CodebookReport) -> bytes:
    """A PNG: a curve of items a code for each level, fullest code first, and bars of the shares."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    spread, shares = figure.subplots(1, 2)
    for number, level in enumerate(report.levels, start=1):
        label = (
            f"level {number}: {level.used} of {level.size} codes, perplexity {level.perplexity:.0f}, "
            f"Gini {level.gini:.2f}"
        )
        spread.plot([code / level.size for code in range(level.size)], level.counts, label=label)
    spread.set(xlabel="codes, fullest first (share of all)", ylabel="items", yscale="symlog", ylim=(0, None))
    spread.legend(loc="lower left", fontsize="small")
    bars: dict[str, float] = {}
    if report.greedy:
        bars |= {
            "SIDs lost to collisions": report.greedy.collision_rate,
            "items in a collision": report.greedy.collided, "items moved": report.greedy.moved,
        }  # fmt: skip
    for name, shared in (("nearest", report.neighbours), ("touched together", report.together)):
        if shared:
            bars |= {f"{name}: first code": shared.first, f"{name}: first two": shared.two}
    shares.barh(list(bars), list(bars.values()))
    shares.set(xlim=(0, 1), xlabel="share of items")
    shares.invert_yaxis()
    figure.suptitle(
        f"codebook {report.codebook}: {report.items} items, "
        f"{report.largest_prefix} below the fullest prefix, "
        f"{report.headroom:.1f} times as many codes in the last level"
    )
    return png(figure)
