"""`sidstream codebook fit`, `promote`, `rollback`, `models` and `arm`: the codebook and model versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sidstream.console import emit, progress, status
from streams.errors import SidstreamError

if TYPE_CHECKING:
    from registry.bundles.store import Registry
    from registry.settings import RolloutSettings
    from sidstream.settings import Settings
    from streams.events import Rollout
    from streams.wire.client import Client
    from trainer.codebooks.embedding_cache import CachedEmbedder
    from trainer.codebooks.fit import FittedCodebook, ReplacedCodebook
    from trainer.codebooks.report import CodebookReport

AsJson = Annotated[bool, typer.Option("--json", help="print one line of JSON")]


def codebook_fit(
    replace: Annotated[
        bool,
        typer.Option(help="make a new one although one is current; items keep SIDs where they can"),
    ] = False,
    fresh: Annotated[
        bool, typer.Option(help="with --replace: begin anew; no item keeps its SID but by chance")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fit the codebook to the catalogue and publish every item's SID; needs the extra `train`.

    Example: sidstream codebook fit
    """
    from registry.bundles.run_record import flat_metrics
    from registry.bundles.store import Registry
    from sidstream.settings import load

    try:
        from trainer.codebooks.embedders import encoder_folder
        from trainer.codebooks.report import codebook_report
    except ModuleNotFoundError as error:
        raise SidstreamError(f"{error.name} is not installed: pip install 'sidstream[train]'") from error

    settings = load()
    registry = Registry(settings.registry)
    current = registry.current_codebook()
    if current and not replace:
        raise SidstreamError(
            f"codebook {current} is current already, and SIDs made with it are in histories and models; "
            "to put a new one in its place, use --replace"
        )
    old = _old_assignments(settings, registry, current) if current and not fresh else None
    fit, embedder = _fit_to_catalogue(settings, registry, old)
    if fit.codebook.id == current:
        raise SidstreamError(
            f"the catalogue and the settings give codebook {current} again: there is nothing to replace"
        )
    _publish_assignments(settings, fit)
    measures = codebook_report(fit.codebook, fit.sids, fit.vectors)
    # Last: agents that find a current codebook find every item's SID before it.
    registry.publish_codebook(
        fit.codebook,
        encoder_folder(embedder),
        flat_metrics(measures.as_dict()),
        _fit_params(settings, current),
    )
    result = _fit_result(settings, fit, embedder.id, measures)
    text = _fit_text(fit, measures)
    if old is not None:
        items_kept = fit.unchanged_sids(old)
        result |= {"replaced": current, "kept": items_kept, "had": len(old.sids)}
        text += f"; {items_kept} of {len(old.sids)} items keep the SID that they had under {current}"
        if len(old.codebook.sizes) != len(fit.codebook.sizes):
            text += f": they are new, with {len(fit.codebook.sizes)} codes, not {len(old.codebook.sizes)}"
    emit(result, as_json, text)


def _fit_params(settings: Settings, replaced: str | None) -> dict[str, str]:
    """What the registry keeps of a codebook's fit: its settings, the code and the machine."""
    from registry.bundles.code_version import code_version
    from registry.bundles.run_record import flat_params
    from trainer.evaluation.results import machine

    about = {"replaced": replaced, "code": code_version(), "machine": machine()}
    return flat_params(settings.codebook.model_dump(mode="json") | about)


def _old_assignments(settings: Settings, registry: Registry, current: str) -> ReplacedCodebook:
    """The current codebook and the SIDs that items have under it."""
    from streams.events import SidAssignment
    from streams.wire.topic_reader import read_newest_events
    from trainer.codebooks.fit import ReplacedCodebook

    assigned = read_newest_events(settings.kafka, SidAssignment).values()
    sids = {event.item_id: tuple(event.sid) for event in assigned if event.codebook == current}
    return ReplacedCodebook(registry.codebook(current), sids)


def _fit_to_catalogue(
    settings: Settings, registry: Registry, old: ReplacedCodebook | None
) -> tuple[FittedCodebook, CachedEmbedder]:
    """A codebook fitted to Kafka's catalogue, and the embedder that it was fitted with."""
    from registry.hold_out import HoldOut
    from streams.events import CatalogItem
    from streams.wire.topic_reader import read_newest_events
    from trainer.codebooks.co_interactions import read_item_sequences
    from trainer.codebooks.embedders import open_embedder
    from trainer.codebooks.fit import fit_codebook

    items = list(read_newest_events(settings.kafka, CatalogItem).values())
    with status("loading the embedder"):
        embedder = open_embedder(settings.codebook.embedder, registry.cache)
    sequences = (
        read_item_sequences(
            settings.kafka,
            sorted(item.item_id for item in items),
            HoldOut(share=settings.trainer.validation_share),
        )
        if settings.codebook.collaborative
        else []
    )
    with progress("fitting the codebook", settings.codebook.levels) as advance:
        fit = fit_codebook(items, embedder, settings.codebook, advance, sequences=sequences, old=old)
    return fit, embedder


def _publish_assignments(settings: Settings, fit: FittedCodebook) -> None:
    from streams.events import SidAssignment
    from streams.wire.client import Client

    assignments = (
        # The same id for the same SID: a fit that is run again after a crash says nothing new.
        SidAssignment.new(
            event_id=f"sid-{fit.codebook.id}-{number}",
            item_id=item_id,
            sid=list(sid),
            codebook=fit.codebook.id,
        )
        for number, (item_id, sid) in enumerate(zip(fit.items, fit.sids, strict=True))
    )
    with Client(settings.kafka) as client, progress("publishing SIDs", len(fit.sids)) as advance:
        client.publish_all(assignments, advance)


def _fit_result(
    settings: Settings, fit: FittedCodebook, embedder: str, measures: CodebookReport
) -> dict[str, Any]:
    assert measures.greedy is not None, "a report with vectors has the greedy assignment"
    return {
        "codebook": fit.codebook.id, "sizes": fit.codebook.sizes, "items": len(fit.sids),
        "embedder": embedder, "method": settings.codebook.method,
        "collision_rate": round(measures.greedy.collision_rate, 4),
        "largest_prefix": measures.largest_prefix, "prefixes": measures.prefixes,
        "used": [level.used for level in measures.levels],
    }  # fmt: skip


def _fit_text(fit: FittedCodebook, measures: CodebookReport) -> str:
    assert measures.greedy is not None, "a report with vectors has the greedy assignment"
    sizes = fit.codebook.sizes
    return (
        f"codebook {fit.codebook.id}: {len(fit.sids)} items, each with its own SID of "
        f"{len(sizes)} codes ({' x '.join(map(str, sizes))}); "
        f"{measures.greedy.collision_rate:.1%} moved from a taken SID; "
        f"the fullest of {measures.prefixes} prefixes holds {measures.largest_prefix} items"
    )


def promote(
    version: Annotated[str, typer.Argument(help="model version or alias, as `sidstream models` lists it")],
    as_json: AsJson = False,
) -> None:
    """Put a model version in service by hand; a running trial ends.

    Example: sidstream promote 3
    """
    from registry.releases import release

    _change_champion(
        lambda registry, client, shares: release.promote(registry, client, registry.version(version), shares),
        "champion",
        as_json,
    )


def rollback(as_json: AsJson = False) -> None:
    """Put the champion's predecessor back in service; a running trial ends.

    Example: sidstream rollback
    """
    from registry.releases import release

    _change_champion(release.rollback, "champion again", as_json)


def _change_champion(
    change: Callable[[Registry, Client, RolloutSettings], Rollout], what: str, as_json: bool
) -> None:
    """Carry out a release step under the lease, and say which version it put in service."""
    from sidstream.settings import load

    settings = load()
    with promoting(settings) as (registry, client):
        rollout = change(registry, client, settings.rollout)
    arm = rollout.arms[0]
    emit(
        {"version": arm.version, "bundle": arm.bundle, "action": rollout.action}, as_json,
        f"version {arm.version} (bundle {arm.bundle}) is {what} and serves everybody",
    )  # fmt: skip


def arm(
    user: Annotated[str, typer.Argument(help="user_id")],
    as_json: AsJson = False,
) -> None:
    """Say which arm, bundle and model version serve a user.

    Example: sidstream arm 17850
    """
    from registry.releases.current_rollout import current_rollout
    from registry.releases.rollout import arm_of
    from sidstream.settings import load

    settings = load()
    rollout = current_rollout(settings.kafka, settings.registry.name)
    if rollout is None:
        raise SidstreamError("nothing is in service yet: `sidstream train` makes and starts the first model")
    chosen = arm_of(rollout, user)
    emit(
        {"arm": chosen.name, "bundle": chosen.bundle, "version": chosen.version, "trial": rollout.trial},
        as_json,
        f"{chosen.name}: version {chosen.version}, bundle {chosen.bundle} ({chosen.weight:.0%} of users)",
    )


def models(as_json: AsJson = False) -> None:
    """List the model versions: kind, what they are in service as, offline metrics.

    Example: sidstream models
    """
    from registry.bundles.store import Registry
    from sidstream.settings import load

    versions = Registry(load().registry).versions()
    lines = [
        f"{row.version:>4}  {row.kind:<4}  {row.bundle}  {day(row.created)}  "
        f"{','.join(row.aliases) or '-':<24}  "
        + " ".join(f"{key}={value:.4g}" for key, value in sorted(row.metrics.items()))
        for row in versions
    ]
    text = "\n".join(lines) or "no model is registered yet: `sidstream train` makes the first"
    rows = [
        {
            "version": row.version, "kind": row.kind, "bundle": row.bundle, "created": row.created,
            "aliases": row.aliases, "tags": row.tags, "metrics": row.metrics,
        }
        for row in versions
    ]  # fmt: skip
    emit({"models": rows}, as_json, text)


@contextmanager
def promoting(settings: Settings) -> Iterator[tuple[Registry, Client]]:
    """The registry and a client, while this process alone may change what is in service."""
    from registry.bundles.store import Registry
    from registry.releases.lease import promotion_lease
    from streams.state.redisdb import redis_client
    from streams.wire.client import Client

    with (
        redis_client(settings.redis) as redis,
        promotion_lease(redis, settings.registry.name),
        Client(settings.kafka) as client,
    ):
        yield Registry(settings.registry), client


def day(ms: int) -> str:
    import datetime

    return datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M")
