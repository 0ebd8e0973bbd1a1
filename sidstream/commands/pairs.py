"""`sidstream pairs report`: measures of the preference pairs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sidstream.console import emit
from streams.errors import SidstreamError

if TYPE_CHECKING:
    from sidstream.settings import Settings
    from streams.events import PreferencePair
    from trainer.alignment.pairs_report import Distribution, PairGroup, PairsReport
    from trainer.log.pair_filter import FilteredPairs

app = typer.Typer(help="The preference pairs that alignment learns from.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="print one line of JSON")]
_UNITS = (("days", 86_400_000), ("hours", 3_600_000), ("minutes", 60_000), ("seconds", 1000))


@app.callback()
def _group() -> None:
    """The preference pairs that alignment learns from."""


@app.command("report")
def report(
    plots: Annotated[
        Path | None, typer.Option(help="also draw it, as PNG files in this folder; needs the extra `train`")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the pairs on `preferences`: schemes, ages, codes shared, contradictions, what was withdrawn.

    Example: sidstream pairs report --plots pairs
    """
    from sidstream.settings import load
    from streams.events import PreferencePair
    from streams.wire.topic_reader import read_events
    from trainer.alignment.pairs_report import pairs_report

    settings = load()
    pairs = [pair for _, pair in read_events(settings.kafka, PreferencePair) if pair is not None]
    pair_report = pairs_report(pairs, time.time_ns() // 1_000_000, _withdrawn_by_the_log(settings, pairs))
    if plots:
        _write_plots(pair_report, plots)
    emit(pair_report.as_dict(), as_json, _report_text(pair_report))


def _withdrawn_by_the_log(settings: Settings, pairs: list[PreferencePair]) -> FilteredPairs | None:
    """The pairs that the trainer's log contradicts; None where this machine has no such log."""
    from trainer.log.interaction_log import InteractionLog
    from trainer.log.pair_filter import withdraw_contradicted

    log = InteractionLog.open(settings.trainer.home / "log")
    if not {"purchases", "clicks"} & {file.topic for file in log.files}:
        return None
    purchases, clicks = (log.read(topic, {}, 0)[0] for topic in ("purchases", "clicks"))
    return withdraw_contradicted(pairs, purchases, clicks, settings.agents.window_ms)


def _write_plots(pair_report: PairsReport, folder: Path) -> None:
    try:
        from trainer.alignment.pairs_plot import draw_pairs_report
    except ModuleNotFoundError as error:
        raise SidstreamError(f"{error.name} is not installed: pip install 'sidstream[train]'") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SidstreamError(f"--plots {folder}: {error.strerror}; name a folder that can be made") from error
    for name, content in draw_pairs_report(pair_report).items():
        (folder / name).write_bytes(content)


def _report_text(report: PairsReport) -> str:
    ages = report.age_ms
    lines = [
        f"{report.pairs:,} pairs of {report.users:,} users, {report.repeats:,} repeats left out",
        f"age: newest {_duration_text(ages.newest)}, median {_duration_text(ages.median)}, "
        f"oldest {_duration_text(ages.oldest)}",
        "",
    ]
    for group in report.groups:
        lines += _group_lines(group)
    lines += [
        f"items: {report.chosen_items:,} chosen ({report.chosen_also_rejected:.1%} of them also rejected), "
        f"{report.rejected_items:,} rejected ({report.rejected_also_chosen:.1%} of them also chosen)",
        f"chosen most (Gini {report.gini:.3f}): " + ", ".join(f"{item} {n:,}" for item, n in report.top),
    ]
    if (withdrawn := report.withdrawn) is None:
        lines.append("withdrawn: not measured; the trainer's log on this machine has no clicks or purchases")
    else:
        lines.append(
            f"withdrawn by the trainer's log: {withdrawn.bought:,} rejected items that were bought, "
            f"{withdrawn.clicked:,} that were clicked, {withdrawn.same:,} that are the chosen one; "
            f"{withdrawn.gone:,} whole pairs"
        )
    return "\n".join(lines)


def _group_lines(group: PairGroup) -> list[str]:
    shared = ", ".join(f"first {level} {share:.1%}" for level, share in enumerate(group.shared, start=1))
    return [
        f"{group.scheme}, codebook {group.codebook}: {group.pairs:,} pairs of {group.users:,} users",
        f"  rejected a pair  {_spread(group.rejected)}",
        f"  history          {_spread(group.history)}",
        f"  codes shared     {shared}",
        "",
    ]


def _spread(counts: Distribution) -> str:
    return (
        f"mean {counts.mean:.1f}, median {counts.median:g}, 90 % at most {counts.p90:g}, most {counts.most}"
    )


def _duration_text(ms: float) -> str:
    name, unit = next(((name, unit) for name, unit in _UNITS if abs(ms) >= 2 * unit), _UNITS[-1])
    return f"{ms / unit:,.1f} {name}"
