"""Continuous delivery of models, and its history: `sidstream cycle` and `sidstream history`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sidstream.console import emit, err
from streams.errors import SidstreamError

if TYPE_CHECKING:
    import threading

    from registry.bundles.store import Version
    from sidstream.continuous_delivery import ContinuousDelivery, Turn
    from sidstream.settings import Settings

AsJson = Annotated[bool, typer.Option("--json", help="print one line of JSON")]
_VERDICTS = ("promote", "reject", "inconclusive")


def cycle(
    verdicts: Annotated[int | None, typer.Option(help="end after so many verdicts; default: never")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one line of JSON a turn")] = False,
) -> None:
    """Train, try out, decide, and begin again, until SIGTERM; a bad promotion is taken back.

    Each cycle trains from what happened since the champion was made, gives the candidates a shadow, a canary
    and a trial, looks at the trial as often as `cycle.look_s` says, and ends it by the gate. A process that
    is killed is replaced by another that goes on where it stood.

    Example: sidstream cycle
    """
    from sidstream.commands.train import set_thread_environment
    from sidstream.settings import load
    from trainer.schedule import on_signal

    set_thread_environment()
    settings = load()
    if settings.gate.mode == "point":
        raise SidstreamError(
            "gate.mode is point: looked at again and again it promotes a model without effect more than 90 % "
            "of the time (docs/results/gate.md); use sequential or fixed"
        )
    ended = on_signal()
    verdicts_left = verdicts
    last_sentence = ""
    with _open_delivery(settings, ended) as delivery:
        while not ended.is_set() and verdicts_left != 0:
            turn = _take_turn(delivery)
            if as_json:
                sys.stdout.write(json.dumps(vars(turn)) + "\n")
                sys.stdout.flush()
            elif turn.sentence != last_sentence:
                err.print(_turn_text(turn), markup=False)
            last_sentence = turn.sentence
            if verdicts_left is not None and turn.did in _VERDICTS:
                verdicts_left -= 1
            if not turn.acted:
                ended.wait(settings.cycle.look_s)


@contextmanager
def _open_delivery(settings: Settings, ended: threading.Event) -> Iterator[ContinuousDelivery]:
    from registry.bundles.store import Registry
    from registry.releases.current_rollout import current_rollout
    from sidstream.commands.registry import promoting
    from sidstream.commands.train import one_cycle, stage_lines
    from sidstream.continuous_delivery import ContinuousDelivery
    from streams.state.redisdb import redis_client

    with redis_client(settings.redis) as redis, stage_lines() as report:
        yield ContinuousDelivery(
            settings, Registry(settings.registry), redis,
            current=lambda: current_rollout(settings.kafka, settings.registry.name),
            train=lambda: one_cycle(
                settings, settings.trainer, report, stop=ended.is_set, step=settings.rollout.steps[0]
            ),
            promoting=lambda: promoting(settings),
        )  # fmt: skip


def _take_turn(delivery: ContinuousDelivery) -> Turn:
    from sidstream.continuous_delivery import Turn

    try:
        return delivery.turn()
    except SidstreamError as error:
        # What does not answer now may answer later; nothing is in doubt, the next turn reads anew.
        return Turn("wait", f"error: {error}")


def history(
    limit: Annotated[int, typer.Option(help="newest entries shown")] = 20, as_json: AsJson = False
) -> None:
    """Show what was trained, tried, promoted, refused and rolled back, newest first, and why.

    Example: sidstream history
    """
    from registry.bundles.store import Registry
    from registry.releases import release
    from registry.releases.current_rollout import current_rollout
    from sidstream.settings import load

    settings = load()
    registry = Registry(settings.registry)
    versions = registry.versions()
    entries = [_version(row, registry.decisions(row.version)) for row in versions[:limit]]
    by_bundle = {row.bundle: row.version for row in versions}
    for entry in entries:
        entry["parent"] = by_bundle.get(entry["parent"])
    entries += [{"ts": ts, "version": None, "sentence": sentence} for ts, sentence in registry.cycle_log()]
    entries = sorted(entries, key=lambda entry: -entry["ts"])[:limit]
    doubt = release.unfinished(registry) or release.disagreement(
        registry, current_rollout(settings.kafka, settings.registry.name)
    )
    lines = [line for entry in entries for line in _lines(entry)] or ["nothing was trained yet"]
    if doubt:
        lines.insert(0, f"attention: {doubt}")
    emit({"entries": entries, "attention": doubt}, as_json, "\n".join(lines))


def _version(row: Version, decisions: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "ts": row.created, "version": row.version, "kind": row.kind, "bundle": row.bundle,
        "parent": row.tags.get("parent") or None, "state": row.tags.get("state", ""),
        "aliases": list(row.aliases),
        "decisions": [
            {key: record.get(key) for key in ("decision", "ts", "mode", "verdict", "winner", "sentence")}
            for record in decisions
        ],
    }  # fmt: skip


def _lines(entry: dict[str, Any]) -> list[str]:
    from sidstream.commands.registry import day

    if entry["version"] is None:
        return [f"{day(entry['ts'])}  {entry['sentence']}"]
    aliases = f" ({', '.join(entry['aliases'])})" if entry["aliases"] else ""
    parent = f" from version {entry['parent']}" if entry["parent"] else ""
    lines = [
        f"{day(entry['ts'])}  version {entry['version']}  {entry['kind']}{parent}: {entry['state']}{aliases}"
    ]
    lines += [
        f"    {day(record['ts'])}  {record['decision']}: {record['sentence']}"
        for record in entry["decisions"]
    ]
    return lines


def _turn_text(turn: Turn) -> str:
    from sidstream.commands.gate import decision_text

    if turn.record is None or turn.record["mode"] == "guard":
        return f"{turn.did}: {turn.sentence}"
    return f"{turn.did}: {decision_text(turn.record)}"
