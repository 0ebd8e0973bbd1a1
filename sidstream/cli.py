"""The `sidstream` command: every verb of the product; its function is in a module under commands/."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Annotated

import typer

from sidstream.commands import (
    agents,
    cycle,
    evaluate,
    gate,
    pairs,
    registry,
    serving,
    shoppers,
    sids,
    stack,
    train,
    wire,
)
from sidstream.commands import demo as demo_command
from sidstream.console import err
from streams.errors import SidstreamError

app = typer.Typer(
    name="sidstream",
    help="An event-driven streaming recommender that learns while it runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"sidstream {importlib.metadata.version('sidstream')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version and exit", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """An event-driven streaming recommender that learns while it runs."""


ONE_MACHINE = "One machine"
EVENTS = "Events"
MODELS = "Models"
SERVICES = "Services"

for function, panel in (
    (demo_command.demo, ONE_MACHINE),
    (stack.up, ONE_MACHINE),
    (stack.down, ONE_MACHINE),
    (stack.status, ONE_MACHINE),
    (stack.doctor, ONE_MACHINE),
    (wire.replay, EVENTS),
    (wire.publish, EVENTS),
    (wire.contract, EVENTS),
    (shoppers.shoppers, EVENTS),
    (serving.recommend, EVENTS),
    (train.train, MODELS),
    (evaluate.evaluate, MODELS),
    (cycle.history, MODELS),
    (registry.promote, MODELS),
    (registry.rollback, MODELS),
    (registry.models, MODELS),
    (registry.arm, MODELS),
    (agents.agents, SERVICES),
    (serving.serving, SERVICES),
    (serving.gateway, SERVICES),
    (train.trainer, SERVICES),
    (cycle.cycle, SERVICES),
):
    app.command(rich_help_panel=panel)(function)

codebook = typer.Typer(help="The codebook that turns items into semantic IDs.", no_args_is_help=True)
codebook.command("fit")(registry.codebook_fit)
app.add_typer(codebook, name="codebook", rich_help_panel=MODELS)

app.add_typer(sids.app, name="sids", rich_help_panel=MODELS)

app.add_typer(pairs.app, name="pairs", rich_help_panel=MODELS)

app.add_typer(gate.app, name="gate", rich_help_panel=MODELS)

topics = typer.Typer(help="The Kafka topics that events travel on.", no_args_is_help=True)
topics.command("create")(wire.topics_create)
topics.command("list")(wire.topics_list)
topics.command("delete")(wire.topics_delete)
app.add_typer(topics, name="topics", rich_help_panel=EVENTS)


def main() -> None:
    """Run the command line; a SidstreamError ends it with one line and exit code 1."""
    try:
        app(standalone_mode=True)
    except SidstreamError as error:
        err.print(f"error: {error}", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
