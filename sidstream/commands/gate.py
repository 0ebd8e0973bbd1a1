"""The gate: judge the running trial, plan one, recompute a decision."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sidstream.console import emit
from streams.errors import SidstreamError

if TYPE_CHECKING:
    from registry.settings import RolloutSettings

app = typer.Typer()

AsJson = Annotated[bool, typer.Option("--json", help="print one line of JSON")]
Conclude = Annotated[bool, typer.Option(help="end the trial as the verdict says")]
End = Annotated[bool, typer.Option(help="with --conclude: end it also when inconclusive")]
Mode = Annotated[
    str | None,
    typer.Option(
        help="sequential (evidence, any number of looks), fixed (evidence, one look) or point (the published "
        "rule); default: settings"
    ),
]


# Measured by benchmarks/gate.py, for models without effect; docs/results/gate.md has the intervals.
ERROR_RATES = {
    "fixed": "made for one look, at the end: looked at 20 times it promotes a model without effect several "
    "times as often as at one (docs/results/gate.md)",
    "point": "it promotes a model without effect about 50 % of the time, more than 90 % when looked at 20 "
    "times (docs/results/gate.md)",
}


@app.callback(invoke_without_command=True)
def _bare(
    context: typer.Context,
    conclude: Conclude = False,
    end: End = False,
    mode: Mode = None,
    as_json: AsJson = False,
) -> None:
    """Judge the running trial: conversion and orders per impression must rise, click-through must not suffer.

    Example: sidstream gate --conclude
    """
    if context.invoked_subcommand is None:
        gate(conclude, end, mode, as_json)


def gate(conclude: bool = False, end: bool = False, mode: str | None = None, as_json: bool = False) -> None:
    """Judge the running trial, and end it with `conclude`."""
    from registry.experiment.decision import decide
    from registry.experiment.outcomes import read_outcomes
    from registry.releases import release
    from registry.releases.current_rollout import current_rollout
    from sidstream.commands.registry import promoting
    from sidstream.decision_plot import store_decision_plot
    from sidstream.settings import load
    from streams.state.redisdb import redis_client

    _check_mode(mode)
    settings = load()
    rollout = current_rollout(settings.kafka, settings.registry.name)
    if rollout is None or rollout.action != "trial":
        what = "nothing is in service" if rollout is None else f"the last step was {rollout.action}"
        raise SidstreamError(f"no trial is running ({what}); `sidstream train` starts one")
    if rollout.step not in (None, 1.0):
        raise SidstreamError(
            f"trial {rollout.trial} is at {rollout.step:.0%} of its ramp, too few users to be judged: "
            "`sidstream cycle` takes it on, `sidstream promote champion` ends it"
        )
    with redis_client(settings.redis) as redis:
        outcomes = read_outcomes(redis, rollout.trial, settings.gate.value)
    record = decide(rollout.trial, rollout.arms, outcomes, settings.gate, mode)
    concluded = conclude and (record["verdict"] != "inconclusive" or end)
    if concluded:
        with promoting(settings) as (registry, client):
            release.conclude(registry, client, record, settings.rollout)
            store_decision_plot(registry, record, outcomes, settings.gate)
    caution = ERROR_RATES.get(record["mode"])
    emit(
        record | {"concluded": concluded, "caution": caution},
        as_json,
        decision_text(record, conclude, concluded),
    )


@app.command()
def aa(as_json: AsJson = False) -> None:
    """Put the champion on trial against itself: whatever `sidstream gate` then finds is chance, or a fault.

    Run one before the first real trial, and after every change of arms, serving or counting.

    Example: sidstream gate aa
    """
    from registry.arms import CHAMPION
    from registry.releases import release
    from sidstream.commands.registry import promoting
    from sidstream.settings import load

    settings = load()
    with promoting(settings) as (registry, client):
        if (running := registry.alias("challenger-sft")) is not None:
            raise SidstreamError(f"version {running} is on trial: end that with `sidstream gate --conclude`")
        rollout = release.start_trial(registry, client, registry.version(CHAMPION), None, settings.rollout)
    emit(
        {"trial": rollout.trial, "arms": {arm.name: arm.weight for arm in rollout.arms}}, as_json,
        f"A/A trial {rollout.trial} of version {rollout.arms[0].version}; `sidstream gate` says what it finds"
        ", `sidstream gate --conclude --end` ends it",
    )  # fmt: skip


@app.command()
def plan(
    cvr: Annotated[float, typer.Option(help="orders per click of the champion")],
    lift: Annotated[float, typer.Option(help="relative rise of it that is hoped for: .08 is 8 %")],
    ctr: Annotated[float, typer.Option(help="clicks per impression of the champion")] = 0.05,
    ctr_change: Annotated[
        float, typer.Option(help="relative change of it that is expected: -.02 is -2 %")
    ] = 0.0,
    impressions_per_user: Annotated[float, typer.Option(help="of one user within the trial")] = 7.0,
    design_effect: Annotated[
        float, typer.Option(help="variance clustered by user over that of independent events")
    ] = 1.2,
    challengers: Annotated[int, typer.Option(min=1, max=2, help="2: SFT and DPO; 1: SFT alone")] = 2,
    power: Annotated[float, typer.Option(help="chance that such a model is promoted")] = 0.9,
    users_per_day: Annotated[float | None, typer.Option(help="new users a day, over all arms")] = None,
    share: Annotated[
        float | None, typer.Option(help="share of users of the smallest compared arm; default: settings")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="sequential or fixed: whose curve is drawn; default: settings")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how many users a trial needs before it promotes a model that is that much better.

    Planned for the whole judgement: each test against the other challenger (as good as the champion) and
    against the champion, and the hold-out's estimate.

    Example: sidstream gate plan --cvr .04 --lift .08 --users-per-day 20000
    """
    from registry.experiment import sample_size
    from sidstream.gate_plan import plan_text, plan_trial
    from sidstream.settings import read

    settings = read()
    mode = _planned_mode(mode, settings.gate.mode)
    share = _smallest_share(settings.rollout, challengers) if share is None else share
    if not 0 < share <= 1:
        raise SidstreamError(f"share is {share}: it must be above 0, 1 at most")
    if users_per_day is not None and users_per_day <= 0:
        raise SidstreamError(f"users-per-day is {users_per_day}: it must be above 0")
    expected = sample_size.ExpectedRates(cvr, lift, ctr, impressions_per_user, design_effect, ctr_change)
    arms = sample_size.TrialArms(challengers, settings.rollout.anchor / share)
    planned = plan_trial(expected, arms, power, mode, share, users_per_day, settings.gate, settings.rollout)
    emit(planned, as_json, plan_text(planned))


def _planned_mode(mode: str | None, settings_mode: str) -> str:
    """The mode whose curve is drawn: --mode, else the settings' mode, else sequential."""
    _check_mode(mode)
    if mode == "point":
        raise SidstreamError(
            "mode point wants no evidence, so no number of users gives it any: use --mode fixed"
        )
    if mode is None:
        return "sequential" if settings_mode == "point" else settings_mode
    return mode


def _smallest_share(rollout: RolloutSettings, challengers: int) -> float:
    """The share of users of the smallest compared arm, by the settings."""
    weights = (rollout.champion, rollout.sft, rollout.dpo)[: challengers + 1]
    return (1 - rollout.anchor) * min(weights) / sum(weights)


@app.command()
def recompute(
    record: Annotated[
        str, typer.Argument(help="a JSON file, - for standard input, or a model version or alias")
    ],
    as_json: AsJson = False,
) -> None:
    """Compute a decision record's verdict again from its own sums; an error where it does not follow.

    Example: sidstream gate recompute 3
    """
    from registry.experiment.decision import rejudge

    stored = _read_record(record)
    verdict = rejudge(stored)
    recorded = (stored.get("verdict"), stored.get("winner"))
    if recorded != (verdict.verdict, verdict.winner):
        raise SidstreamError(
            f"decision {stored['decision']} says {recorded[0]}, winner {recorded[1]}; "
            f"its sums say {verdict.verdict}, winner {verdict.winner}"
        )
    emit(
        {"decision": stored["decision"]} | verdict.as_dict(), as_json,
        f"decision {stored['decision']} follows from its sums\nverdict: {verdict.sentence}",
    )  # fmt: skip


def _read_record(record: str) -> dict[str, Any]:
    import json
    import sys

    path = Path(record)
    if record == "-":
        text = sys.stdin.read()
    elif path.is_file():
        text = path.read_text()
    elif path.suffix == ".json" or path.parent != Path("."):
        raise SidstreamError(f"there is no file {record}; name a decision record or a model version")
    else:
        from registry.bundles.store import Registry
        from sidstream.settings import load

        return Registry(load().registry).decision(record)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SidstreamError(f"{record} is no JSON ({error}); name a decision record") from error
    # An event on the topic `rollout` holds the record within.
    if isinstance(parsed, dict) and isinstance(parsed.get("decision"), dict):
        parsed = parsed["decision"]
    if not isinstance(parsed, dict):
        raise SidstreamError(f"{record} holds no JSON object; name a decision record")
    return parsed


def _check_mode(mode: str | None) -> None:
    from registry.experiment.gate import MODES

    if mode not in (None, *MODES):
        raise SidstreamError(f"mode is {mode!r}: use {', '.join(MODES[:-1])} or {MODES[-1]}")


def decision_text(record: dict[str, Any], conclude: bool = False, concluded: bool = False) -> str:
    """A decision as text: sums, differences with their intervals, verdict."""
    from registry.experiment.gate import METRIC_NAMES

    lines = [f"trial {record['trial']}, mode {record['mode']}, decision {record['decision']}"]
    for name, arm in record["arms"].items():
        sums = record["inputs"][name]
        counts = ", ".join(f"{sums[field]} {field}" for field in ("users", "impressions", "clicks", "orders"))
        lines.append(f"  {name} (version {arm['version']}, {arm['weight']:.0%} of users): {counts}")
    always = ", always valid" if record["mode"] == "sequential" else ""
    lines.append("differences with their intervals:")
    for comparison in record["comparisons"]:
        lines.append(f"  {comparison['sentence']} (intervals of {1 - 2 * comparison['alpha']:.0%}{always})")
        for metric, name in METRIC_NAMES.items():
            lines.extend(_difference_lines(name, comparison[metric]))
    if record["anchor"]:
        lines.append(f"  {record['anchor']['sentence']}")
        for metric in ("ctr", "opm"):
            lines.extend(_difference_lines(METRIC_NAMES[metric], record["anchor"][metric]))
    lines.append(f"verdict: {record['sentence']}")
    if record["mode"] in ERROR_RATES:
        lines.append(f"mode {record['mode']}: {ERROR_RATES[record['mode']]}")
    if concluded:
        lines.append("concluded: the rollout is published")
    elif conclude:
        lines.append("not concluded: the trial goes on; --end ends it with the champion in service")
    return "\n".join(lines)


def _difference_lines(name: str, figures: dict[str, Any] | None) -> Iterator[str]:
    if figures is None or figures["p_above"] is None or figures["difference_interval"] is None:
        return
    low, high = figures["difference_interval"]
    # Money is no share; orders per impression are a few thousandths.
    form = ".2f" if name == "value per user" else ".3%"
    yield (
        f"    {name} {figures['target']:{form}} against {figures['control']:{form}}: difference "
        f"{figures['difference']:+{form}} [{low:+{form}}, {high:+{form}}], must be above "
        f"{0.0 - figures['margin'] * figures['control']:+{form}}: p {figures['p_above']:.3g}"
    )
