"""A plot of a stage of training: each of its figures over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from trainer.plots.png import png

# The figures of a point that are drawn where they are present, each in its own plot.
_TITLES = {
    "loss": "loss",
    "ndcg10": "NDCG@10, held out",
    "margin": "reward margin",
    "drop": "nats below the reference",
}


def draw_training_curve(stage: str, curve: Sequence[Mapping[str, float]]) -> bytes:
    """A PNG of the points of a stage, in order of `step`; a figure that no point has is left out."""
    names = [name for name in _TITLES if any(name in point for point in curve)]
    figure = Figure(figsize=(4.5 * max(1, len(names)), 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, max(1, len(names)), squeeze=False)[0], names, strict=False):
        points = [(point["step"], point[name]) for point in curve if name in point]
        axis.plot(*zip(*points, strict=True), marker=".", linewidth=1)
        axis.set_title(f"{stage}: {_TITLES[name]}", fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    return png(figure)
