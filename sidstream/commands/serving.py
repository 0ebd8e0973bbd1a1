"""`sidstream serving`, `sidstream gateway` and `sidstream recommend`: answers, over Kafka and over HTTP."""

from __future__ import annotations

import uuid
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sidstream.console import emit, out
from streams.errors import SidstreamError

if TYPE_CHECKING:
    from streams.events import CatalogItem, Recommendation
    from streams.settings import KafkaSettings


def serving() -> None:
    """Run one serving agent until SIGTERM; start more of them to share the triggers.

    Example: sidstream serving
    """
    from registry.bundles.store import Registry
    from serving.agent import ServingAgent
    from serving.worker import run_worker
    from sidstream.settings import load

    settings = load()
    source = Registry(settings.registry)
    name = settings.serving.rollout or settings.registry.name
    run_worker(lambda: ServingAgent(settings.kafka, settings.redis, settings.serving, source, name))


def gateway() -> None:
    """Serve POST /v1/recommend over HTTP until SIGTERM.

    Example: sidstream gateway
    """
    import logging
    from functools import partial

    import uvicorn

    from serving.gateway import create_app
    from serving.readiness import waiting_for
    from sidstream.settings import load
    from streams.wire.client import Client

    settings = load()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kafka").setLevel(logging.WARNING)
    app = create_app(
        settings.gateway,
        partial(Client, settings.kafka),
        partial(waiting_for, settings.kafka, settings.serving.group),
    )
    host, port = settings.gateway.host, settings.gateway.port
    server = uvicorn.Server(
        uvicorn.Config(app, host, port, loop="uvloop", log_config=None, log_level="warning", access_log=False)
    )
    try:
        server.run()
    except SystemExit as error:
        # uvicorn has logged why; what is missing is the remedy.
        raise SidstreamError(
            f"the gateway cannot listen on {host}:{port}; set SIDSTREAM_GATEWAY__PORT to a free port"
        ) from error


def recommend(
    user: Annotated[str, typer.Option(help="whom to recommend to")],
    item: Annotated[str | None, typer.Option(help="the item whose page the user is on")] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=100, help="how many items")] = 10,
    scene: Annotated[str | None, typer.Option(help="where on the site")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="an item to leave out; may be repeated")] = None,
    prefer: Annotated[
        list[str] | None,
        typer.Option(help="click, purchase, price or commission, or one with a weight: price=2; repeatable"),
    ] = None,
    timeout: Annotated[float, typer.Option(help="seconds to wait for the answer")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="print one line of JSON")] = False,
) -> None:
    """Ask for recommendations over Kafka and print them with titles and prices.

    Example: sidstream recommend --user 17850 --item 85123A -k 5 --prefer commission
    """
    from sidstream.settings import load
    from streams.events import EventError, Trigger
    from streams.wire.client import Client

    settings = load()
    try:
        trigger = Trigger.new(
            request_id=uuid.uuid4().hex, user_id=user, item_id=item, k=k, scene=scene, exclude=exclude or [],
            preferences=_weights(prefer or []) or None,
        )  # fmt: skip
    except EventError as error:
        raise SidstreamError(str(error)) from error
    with Client(settings.kafka) as client:
        answer = client.ask(trigger, timeout)
    item_ids = {ranked.item_id for ranked in answer.items} | ({item} if item else set())
    catalogue = _catalog_records(settings.kafka, item_ids)
    if as_json:
        emit(_result(answer, catalogue), True, "")
    else:
        _print_table(answer, catalogue)


def _weights(options: Collection[str]) -> dict[str, float]:
    """Preferences as they are given on the command line, weight 1 by default. Raises SidstreamError."""
    weights = {}
    for option in options:
        name, _, weight = option.partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError as error:
            raise SidstreamError(f"--prefer is {option!r}: its weight is no number; give {name}=2") from error
    return weights


def _catalog_records(kafka: KafkaSettings, item_ids: Collection[str]) -> dict[str, CatalogItem]:
    """The catalogue's newest records of the wanted items; only theirs are decoded."""
    from streams.events import CatalogItem
    from streams.wire.topic_reader import read_events

    # Not the newest record only: a deleted item still has a title.
    return {key: event for key, event in read_events(kafka, CatalogItem, item_ids) if event is not None}


def _result(answer: Recommendation, catalogue: dict[str, CatalogItem]) -> dict[str, Any]:
    return {
        "request_id": answer.request_id,
        "user_id": answer.user_id,
        "bundle": answer.bundle,
        "arm": answer.arm,
        "trial": answer.trial,
        "fallback": answer.fallback,
        "conditions": answer.conditions,
        "items": [
            {
                "item_id": ranked.item_id,
                "title": catalogue[ranked.item_id].title if ranked.item_id in catalogue else None,
                "price": catalogue[ranked.item_id].price if ranked.item_id in catalogue else None,
                "commission_rate": (
                    catalogue[ranked.item_id].commission_rate if ranked.item_id in catalogue else None
                ),
                "score": ranked.score,
                "sid": ranked.sid,
            }
            for ranked in answer.items
        ],
    }


def _print_table(answer: Recommendation, catalogue: dict[str, CatalogItem]) -> None:
    from rich.markup import escape
    from rich.table import Table

    trigger_item = catalogue.get(answer.trigger_item_id or "")
    page = f" on the page of {trigger_item.title!r}" if trigger_item else ""
    model_text = f"bundle {answer.bundle}, arm {answer.arm}" if answer.bundle else "no model in service"
    out.print(
        f"user {answer.user_id}{page}: {model_text}, fallback {answer.fallback or 'none'}", markup=False
    )
    if answer.conditions:
        conditions = ", ".join(f"{name} {value}" for name, value in answer.conditions.items())
        out.print(f"asked of the model: {conditions} (bins of prices and commissions from 0)", markup=False)
    if not answer.items:
        out.print("nothing may be recommended: send items to topic catalog, or exclude fewer", markup=False)
        return
    table = Table("", "item", "title", "price", "score", box=None, pad_edge=False)
    table.columns[0].justify = table.columns[3].justify = table.columns[4].justify = "right"
    for place, row in enumerate(_result(answer, catalogue)["items"], start=1):
        price = "" if row["price"] is None else f"{row['price']:.2f}"
        # Titles are a shop's own text: a bracket in one is no markup.
        title, name = escape(row["title"] or ""), escape(row["item_id"])
        table.add_row(str(place), name, title, price, f"{row['score']:.2f}")
    out.print(table)
