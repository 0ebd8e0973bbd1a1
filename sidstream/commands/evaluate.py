"""`sidstream evaluate`: models and baselines on a public data set, the same targets for all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    from registry.bundles.code_version import commit
    from trainer.evaluation import datasets

    names = _model_names(models, against)
    masks = _masks(mask)
    kind = split or datasets.dataset_source(dataset).splits[0]
    table = _Table(dataset, names, seeds, mask, kind, shards, max_seconds, _arithmetic(arithmetic))
    splitter = _splitter(kind)
    commit()
    with status(f"reading {dataset}") as show:
        split_data = splitter(datasets.load_dataset(dataset, data))
        measured = _measure(table, split_data, masks, show)
    figures, differences = table.lines(measured, against)
    lines = [*figures, *differences]
    _write_lines(lines, out, publish)
    text = _text(table, split_data, figures, differences)
    emit({"dataset": dataset, "protocol": table.protocol, "lines": lines}, as_json, text)


@dataclass(frozen=True)
class _Table:
    """The options that a table's figures depend on."""

    dataset: str
    names: Sequence[str]
    seeds: int
    mask: str
    split: str
    shards: int
    max_seconds: float | None
    arithmetic: Arithmetic

    @property
    def protocol(self) -> str:
        """The split, and in how many shards its test is learned."""
        return f"{self.split}, {self.shards} shards" if self.shards else self.split

    @property
    def command(self) -> str:
        """The command that measures the same figures again; it is written beside each of them."""
        command = f"sidstream evaluate {self.dataset} --models {','.join(self.names)} --seeds {self.seeds}"
        command += f" --mask {self.mask} --split {self.split}"
        if self.shards:
            command += f" --shards {self.shards}"
        if self.max_seconds:
            command += f" --max-seconds {self.max_seconds:g}"
        if self.arithmetic != "auto":
            command += f" --arithmetic {self.arithmetic}"
        return command

    def lines(
        self, measured: list[MeasuredRun], against: str | None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The figures of all models, and their differences to the model `against`."""
        from trainer.evaluation import report

        about = (self.dataset, self.protocol, self.command, self.arithmetic)
        differences = report.compared(measured, against, *about) if against else []
        return report.lines(measured, *about), differences


def _model_names(models: str | None, against: str | None) -> Sequence[str]:
    """The models that --models names; --against must be one of them."""
    from trainer.rankers import DEFAULT, checked_names

    names = checked_names(models.split(",") if models else DEFAULT)
    if against is not None and against not in names:
        raise SidstreamError(
            f"--against is {against!r}, but the models are {', '.join(names)}: name one of them"
        )
    return names


def _write_lines(lines: Sequence[dict[str, Any]], out: Path | None, publish: bool) -> None:
    """Write the figures to the file `out`, and into docs/results where `publish` asks for it."""
    from trainer.evaluation import report
    from trainer.evaluation.results import RESULTS

    if out:
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if publish:
        report.publish(lines, RESULTS)


def _text(
    table: _Table,
    split: EvaluationSplit,
    figures: Sequence[dict[str, Any]],
    differences: Sequence[dict[str, Any]],
) -> str:
    from trainer.evaluation import report

    targets = f"{len(split.test):,} targets among {split.dataset.size:,} items"
    about = f"{table.dataset}, {table.protocol}: {targets}"
    return "\n".join([about, report.as_text(report.table(figures)), *_difference_lines(differences)])


def _masks(named: str) -> list[Mask]:
    """The masks that --mask names."""
    from trainer.evaluation.ranker import MASKS

    masks = [mask for mask in MASKS if named in (mask, "both")]
    if not masks:
        raise SidstreamError(f"--mask is {named!r}: give none, seen or both")
    return masks


def _arithmetic(named: str | None) -> Arithmetic:
    """The arithmetic that --arithmetic names; None: the setting."""
    from sidstream.settings import read
    from trainer.settings import Arithmetic

    if named is None:
        return read().trainer.arithmetic
    for arithmetic in get_args(Arithmetic):
        if named == arithmetic:
            return cast("Arithmetic", arithmetic)
    raise SidstreamError(f"--arithmetic is {named!r}: give {', '.join(get_args(Arithmetic))}")


def _splitter(kind: str) -> Callable[[SequenceDataset], EvaluationSplit]:
    """The function that makes the split which --split names."""
    from trainer.evaluation.splits import LEAVE_ONE_OUT, TIME, leave_one_out, split_by_time

    splitters: dict[str, Callable[[SequenceDataset], EvaluationSplit]] = {
        LEAVE_ONE_OUT: leave_one_out,
        TIME: split_by_time,
    }
    if kind not in splitters:
        raise SidstreamError(f"--split is {kind!r}: give {' or '.join(splitters)}")
    return splitters[kind]


def _measure(
    table: _Table, split: EvaluationSplit, masks: Sequence[Mask], show: Callable[[str], None]
) -> list[MeasuredRun]:
    """Every model's runs; a seed's models together, so that models which share a training do."""
    from trainer.evaluation.run import evaluate_ranker, with_means
    from trainer.rankers import MODELS, Options

    options = Options(table.max_seconds, arithmetic=table.arithmetic)
    measured: list[MeasuredRun] = []
    for seed in range(1, table.seeds + 1):
        for name in table.names:
            started = time.monotonic()

            def progress(text: str, name: str = name, seed: int = seed) -> None:
                show(f"{name}, seed {seed}: {text}")

            try:
                ranker = MODELS[name](options)
                if seed > 1 and not getattr(ranker, "seeded", True):
                    continue
                measured += evaluate_ranker(split, ranker, seed, masks, progress, table.shards)
            except ModuleNotFoundError as error:
                raise SidstreamError(f"{name} needs {error.name}: pip install 'sidstream[train]'") from error
            err.print(f"{name}, seed {seed}: measured in {time.monotonic() - started:.0f} s", markup=False)
    return with_means(measured)


def _difference_lines(differences: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The differences of the two metrics that the table has intervals of."""
    for line in differences:
        if line["metric"].startswith(("HR@10 minus", "NDCG@10 minus")):
            yield (
                f"{line['model']}, mask {line['mask']}: {line['metric']} {line['value']:+.4f} "
                f"({line['low']:+.4f} to {line['high']:+.4f})"
            )
