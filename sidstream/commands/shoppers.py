"""`sidstream shoppers`: simulated shoppers who click and buy what is recommended."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sidstream.console import emit, progress
from streams.errors import SidstreamError


def shoppers(
    sessions: Annotated[int, typer.Option(help="pages to open")] = 1000,
    start: Annotated[
        int | None, typer.Option(help="event time of the first session, ms since 1970; default: now")
    ] = None,
    source: Annotated[
        str, typer.Option(help="whose past makes the shoppers' tastes: online-retail or rees46")
    ] = "online-retail",
    seed: Annotated[int | None, typer.Option(help="seed of tastes, values and decisions")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one line of JSON")] = False,
) -> None:
    """Let simulated shoppers open pages, look at the answers, click and buy; print CTR and CVR by arm.

    Example: sidstream shoppers --sessions 2000
    """
    import time

    from sidstream.settings import load
    from streams.replay import source_of, user_item_sequences
    from streams.simulation.shoppers import Truth, population
    from streams.simulation.shopping import ShoppingTrip
    from streams.wire.client import Client

    settings = load()
    if seed is not None:
        settings.shoppers.seed = seed
    log = source_of(source)
    catalogue = list(log.catalogue())
    if not catalogue:
        raise SidstreamError(f"source {source!r} has no items; replay one that has a catalogue")
    truth = Truth(catalogue, settings.shoppers)
    visitors = population(truth, user_item_sequences(log))
    prices = {item.item_id: item.price or 0.0 for item in catalogue}
    with Client(settings.kafka) as client, progress("shopping", sessions) as advance:
        begin = start if start is not None else time.time_ns() // 1_000_000
        trip = ShoppingTrip(client, truth, visitors, settings.shoppers, begin)
        result = trip.run(sessions, prices, advance)
    arms: dict[str, dict[str, Any]] = {
        name: {
            "sessions": tally.sessions, "shown": tally.shown, "clicks": tally.clicks,
            "purchases": tally.purchases, "ctr": round(tally.ctr, 4), "cvr": round(tally.cvr, 4),
            "true_ctr": round(tally.expected_clicks / max(tally.shown, 1), 4),
            "true_cvr": round(tally.expected_purchases / max(tally.expected_clicks, 1e-9), 4),
        }
        for name, tally in sorted(result.arms.items())
    }  # fmt: skip
    text = "\n".join(
        f"{name}: {arm['sessions']} sessions, {arm['shown']} shown, {arm['clicks']} clicks "
        f"(CTR {arm['ctr']:.2%}), {arm['purchases']} purchases (CVR {arm['cvr']:.2%})"
        for name, arm in arms.items()
    )
    if result.unanswered:
        text += f"\n{result.unanswered} sessions got no answer"
    emit(
        {"arms": arms, "end_ts": result.end_ts, "unanswered": result.unanswered},
        as_json,
        text or "no session got an answer: is a serving agent running? (`sidstream status`)",
    )
