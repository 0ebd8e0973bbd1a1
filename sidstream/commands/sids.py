"""`sidstream sids report`: measures of the semantic IDs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sidstream.console import emit, progress
from streams.errors import SidstreamError

if TYPE_CHECKING:
    from sidstream.settings import Settings
    from streams.events import CatalogItem
    from trainer.codebooks.report import CodebookReport, SharedPrefixes

app = typer.Typer(help="The semantic IDs of the items.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="print one line of JSON")]


@app.callback()
def _group() -> None:
    """The semantic IDs of the items."""


@app.command("report")
def report(
    codebook: Annotated[
        Path | None, typer.Option(help="a codebook's file, with --catalogue; without both: the current one")
    ] = None,
    catalogue: Annotated[
        Path | None,
        typer.Option(help="items, a catalog event in JSON a line; without --codebook it is fitted"),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="a data set of `sidstream evaluate`: its codebook is fitted"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(envvar="SIDSTREAM_DATA", help="folder of the data sets that do not ship"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="also draw it into this PNG file")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the codebook: collisions, evenness, room, error, neighbours; needs the extra `train`.

    Example: sidstream sids report --plot sids.png
    """
    from sidstream.settings import load

    try:
        import trainer.codebooks.report  # noqa: F401
    except ModuleNotFoundError as error:
        raise SidstreamError(f"{error.name} is not installed: pip install 'sidstream[train]'") from error

    if dataset and (codebook or catalogue):
        raise SidstreamError("--dataset and --catalogue both name the items: give one of them")
    for file in (codebook, catalogue):
        if file and not file.is_file():
            raise SidstreamError(f"there is no file {file}")
    if codebook and not catalogue:
        raise SidstreamError("--codebook needs the items as well: --catalogue FILE.jsonl")
    settings = load()
    if dataset:
        sid_report = _report_on_dataset(settings, dataset, data)
    elif catalogue:
        sid_report = _report_on_file(settings, codebook, catalogue)
    else:
        sid_report = _report_on_current(settings)
    if plot:
        from trainer.codebooks.codes_plot import draw_codebook_report

        plot.write_bytes(draw_codebook_report(sid_report))
    emit(sid_report.as_dict(), as_json, _report_text(sid_report))


def _report_on_current(settings: Settings) -> CodebookReport:
    """The current codebook with the SIDs that were given, on Kafka's catalogue and clicks."""
    import numpy as np

    from registry.bundles.embedder import item_text, load_embedder
    from registry.bundles.store import Registry
    from registry.hold_out import HoldOut
    from streams.events import CatalogItem, SidAssignment
    from streams.wire.topic_reader import read_newest_events
    from trainer.codebooks.co_interactions import read_item_sequences
    from trainer.codebooks.embedding_cache import CachedEmbedder
    from trainer.codebooks.report import codebook_report

    registry = Registry(settings.registry)
    codebook = registry.codebook()
    catalogue = {item.item_id: item for item in read_newest_events(settings.kafka, CatalogItem).values()}
    sids = {
        event.item_id: tuple(event.sid)
        for event in read_newest_events(settings.kafka, SidAssignment).values()
        if event.codebook == codebook.id and event.item_id in catalogue
    }
    if not sids:
        raise SidstreamError(f"no item of the catalogue has a SID of codebook {codebook.id} yet")
    names = sorted(sids)
    vectors = None
    # The collaborative part of what it was fitted to is not kept: without it the nearest codes are others.
    if not codebook.collaborative_dims:
        embedder = load_embedder(codebook, registry.encoder)
        cached = CachedEmbedder(embedder, registry.cache / "embeddings")
        vectors = cached.embed([item_text(catalogue[name]) for name in names])
    place = {name: row for row, name in enumerate(names)}
    rows = [
        np.array([place[item] for item in sequence], np.int64)
        for sequence in read_item_sequences(settings.kafka, names, HoldOut(share=0.0))
    ]
    return codebook_report(codebook, [sids[name] for name in names], vectors, rows)


def _report_on_file(settings: Settings, path: Path | None, catalogue: Path) -> CodebookReport:
    """A codebook's file on a file of items; without the codebook, the one that the settings make of them."""
    from registry.bundles.codebook import Codebook
    from registry.bundles.embedder import item_text
    from streams.replay.jsonl import JsonLines
    from trainer.codebooks.embedders import open_embedder
    from trainer.codebooks.report import codebook_report

    items = list(JsonLines(catalogue, "catalog").catalogue())
    if path is None:
        return _report_on_fit(settings, items, ())
    codebook = Codebook.load(path)
    embedder = open_embedder(settings.codebook.embedder, settings.registry.cache_folder)
    if embedder.id != codebook.embedder or codebook.collaborative_dims:
        part = " and what users touched" if codebook.collaborative_dims else ""
        raise SidstreamError(
            f"codebook {codebook.id} was fitted to {codebook.embedder}{part}, and {catalogue} is embedded "
            f"with {embedder.id}: set SIDSTREAM_CODEBOOK__EMBEDDER, or leave --codebook out to fit one"
        )
    ordered = sorted({item.item_id: item for item in items}.values(), key=lambda item: item.item_id)
    if not ordered:
        raise SidstreamError(f"{catalogue} has no items")
    vectors = embedder.embed([item_text(item) for item in ordered])
    return codebook_report(codebook, codebook.assign(vectors), vectors)


def _report_on_dataset(settings: Settings, name: str, folder: Path | None) -> CodebookReport:
    """The codebook that the settings make of a data set; each user's last two items stay unseen."""
    from streams.events import CatalogItem
    from trainer.evaluation.datasets import load_dataset

    data = load_dataset(name, folder)
    items = [
        CatalogItem.new(item_id=item, title=text or item)
        for item, text in zip(data.item_names, data.texts, strict=True)
    ]
    return _report_on_fit(
        settings, items, [[data.item_names[row] for row in rows[:-2]] for rows in data.items]
    )


def _report_on_fit(
    settings: Settings, items: list[CatalogItem], sequences: Sequence[Sequence[str]]
) -> CodebookReport:
    import numpy as np

    from trainer.codebooks.embedders import open_embedder
    from trainer.codebooks.fit import fit_codebook
    from trainer.codebooks.report import codebook_report

    embedder = open_embedder(settings.codebook.embedder, settings.registry.cache_folder)
    with progress("fitting the codebook", settings.codebook.levels) as advance:
        fit = fit_codebook(items, embedder, settings.codebook, advance, sequences=sequences)
    place = {name: row for row, name in enumerate(fit.items)}
    rows = [np.array([place[item] for item in sequence], np.int64) for sequence in sequences]
    return codebook_report(fit.codebook, fit.sids, fit.vectors, rows)


def _report_text(report: CodebookReport) -> str:
    lines = [
        f"codebook {report.codebook}: {report.items} items below {report.prefixes} prefixes; the fullest "
        f"holds {report.largest_prefix}, the last level has {report.headroom:.1f} times as many codes",
        "",
        f"{'level':<6} {'codes':>6} {'used':>6} {'perplexity':>11} {'Gini':>6}",
    ]
    lines += [
        f"{at:<6} {level.size:>6} {level.used:>6} {level.perplexity:>11.1f} {level.gini:>6.3f}"
        for at, level in enumerate(report.levels, start=1)
    ]
    lines.append("")
    greedy = report.greedy
    if greedy is None:
        lines.append(
            "collisions and error: `codebook fit` alone can tell, with what users touched in vectors"
        )
    else:
        lines += [
            f"nearest codes: {greedy.collision_rate:.2%} of SIDs lost to collisions, {greedy.collided:.2%} "
            f"of items in one, at most {greedy.largest_group} on a SID (99 % of SIDs: at most "
            f"{greedy.p99_group:g})",
            f"own slots: {greedy.moved:.2%} of items moved; error {greedy.error:.4f} of the spread before, "
            f"{greedy.moved_error:.4f} after",
        ]
    lines.append(_shared_codes_text("nearest by vector", report.neighbours))
    lines.append(_shared_codes_text("touched together most", report.together))
    return "\n".join(lines)


def _shared_codes_text(what: str, shared: SharedPrefixes | None) -> str:
    if shared is None:
        return f"{what}: not measured"
    return (
        f"{what}: {shared.first:.1%} share the first code, {shared.two:.1%} the first two "
        f"(by chance {shared.chance:.1%}; {shared.items} items)"
    )
