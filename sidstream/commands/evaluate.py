"""`sidstream evaluate`: models and baselines on a public data set, the same targets for all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from sidstream.console import emit, err, status
from streams.errors import SidstreamError

if TYPE_CHECKING:
    from trainer.evaluation.ranker import Mask
    from trainer.evaluation.run import MeasuredRun
    from trainer.evaluation.sequences import SequenceDataset
    from trainer.evaluation.splits import EvaluationSplit
    from trainer.rankers import Options
    from trainer.settings import Arithmetic


def evaluate(
    dataset: Annotated[
        str, typer.Argument(help="amazon14-beauty, amazon14-toys, online-retail, rees46 or tmall2014")
    ],
    models: Annotated[
        str | None,
        typer.Option(help="names with commas between; a wrong one shows them all"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each trained model")] = 1,
    mask: Annotated[
        str, typer.Option(help="none: all items; seen: without the user's own past items; both")
    ] = "both",
    split: Annotated[
        str | None, typer.Option(help="leave-one-out or time; default: what suits the data set")
    ] = None,
    shards: Annotated[
        int, typer.Option(min=0, help="cut the test in so many stretches; learn each after scoring it")
    ] = 0,
    against: Annotated[
        str | None, typer.Option(help="also the difference of every model to this one")
    ] = None,
    max_seconds: Annotated[float | None, typer.Option(help="time budget of one training, in seconds")] = None,
    arithmetic: Annotated[
        str | None,
        typer.Option(
            help="of every training of the table: auto, float32 or bfloat16; default: trainer.arithmetic"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="write one line of JSON a figure to this file")] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="put the figures into docs/results of this checkout")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(envvar="SIDSTREAM_DATA", help="folder of the data sets that do not ship"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one line of JSON")] = False,
) -> None:
    """Measure how well models rank what users did next: the whole catalogue, intervals over users.

    Example: sidstream evaluate amazon14-beauty --models popularity,itemknn --data /data
    """
    from trainer.evaluation import datasets, report
    from trainer.evaluation.results import RESULTS, commit
    from trainer.rankers import DEFAULT, Options, checked_names

    names = checked_names(models.split(",") if models else DEFAULT)
    masks = _masks(mask)
    computed = _arithmetic(arithmetic)
    if against is not None and against not in names:
        raise SidstreamError(
            f"--against is {against!r}, but the models are {', '.join(names)}: name one of them"
        )
    kind = split or datasets.dataset_source(dataset).splits[0]
    cut = _cut(kind)
    commit()
    with status(f"reading {dataset}") as show:
        prepared = cut(datasets.load_dataset(dataset, data))
        measured = _measured(
            names, prepared, seeds, masks, shards, Options(max_seconds, arithmetic=computed), show
        )
    protocol = f"{kind}, {shards} shards" if shards else kind
    command = f"sidstream evaluate {dataset} --models {','.join(names)} --seeds {seeds} --mask {mask}"
    command += f" --split {kind}"
    if shards:
        command += f" --shards {shards}"
    if max_seconds:
        command += f" --max-seconds {max_seconds:g}"
    if computed != "auto":
        command += f" --arithmetic {computed}"
    lines = report.lines(measured, dataset, protocol, command, computed)
    shown = report.table(lines)
    differences = report.compared(measured, against, dataset, protocol, command, computed) if against else []
    if out:
        out.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *differences]))
    if publish:
        report.publish([*lines, *differences], RESULTS)
    about = f"{dataset}, {protocol}: {len(prepared.test):,} targets among {prepared.dataset.size:,} items"
    text = [about, report.as_text(shown), *_told(differences)]
    emit(
        {"dataset": dataset, "protocol": protocol, "lines": [*lines, *differences]}, as_json, "\n".join(text)
    )


def _masks(named: str) -> list[Mask]:
    """The masks that --mask names."""
    from trainer.evaluation.ranker import MASKS

    masks = [mask for mask in MASKS if named in (mask, "both")]
    if not masks:
        raise SidstreamError(f"--mask is {named!r}: give none, seen or both")
    return masks


def _arithmetic(named: str | None) -> Arithmetic:
    """What --arithmetic names; None: the setting."""
    from sidstream.settings import read
    from trainer.settings import Arithmetic

    if named is None:
        return read().trainer.arithmetic
    for one in get_args(Arithmetic):
        if named == one:
            return cast("Arithmetic", one)
    raise SidstreamError(f"--arithmetic is {named!r}: give {', '.join(get_args(Arithmetic))}")


def _cut(kind: str) -> Callable[[SequenceDataset], EvaluationSplit]:
    """The split that --split names."""
    from trainer.evaluation.splits import LEAVE_ONE_OUT, TIME, leave_one_out, split_by_time

    cuts: dict[str, Callable[[SequenceDataset], EvaluationSplit]] = {
        LEAVE_ONE_OUT: leave_one_out,
        TIME: split_by_time,
    }
    if kind not in cuts:
        raise SidstreamError(f"--split is {kind!r}: give {' or '.join(cuts)}")
    return cuts[kind]


def _measured(
    names: Sequence[str], split: EvaluationSplit, seeds: int, masks: Sequence[Mask], shards: int,
    options: Options, show: Callable[[str], None],
) -> list[MeasuredRun]:  # fmt: skip
    """Every model's runs; a seed's models together, so that models which share a training do."""
    from trainer.evaluation.run import evaluate_ranker, with_means
    from trainer.rankers import MODELS

    found: list[MeasuredRun] = []
    for seed in range(1, seeds + 1):
        for name in names:
            started = time.monotonic()

            def progress(text: str, name: str = name, seed: int = seed) -> None:
                show(f"{name}, seed {seed}: {text}")

            try:
                ranker = MODELS[name](options)
                if seed > 1 and not getattr(ranker, "seeded", True):
                    continue
                found += evaluate_ranker(split, ranker, seed, masks, progress, shards)
            except ModuleNotFoundError as error:
                raise SidstreamError(f"{name} needs {error.name}: pip install 'sidstream[train]'") from error
            err.print(f"{name}, seed {seed}: measured in {time.monotonic() - started:.0f} s", markup=False)
    return with_means(found)


def _told(differences: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The differences of the two metrics that the table has intervals of."""
    for line in differences:
        if line["metric"].startswith(("HR@10 minus", "NDCG@10 minus")):
            yield (
                f"{line['model']}, mask {line['mask']}: {line['metric']} {line['value']:+.4f} "
                f"({line['low']:+.4f} to {line['high']:+.4f})"
            )
