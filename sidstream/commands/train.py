"""One update cycle, and the service that runs it periodically."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from sidstream.console import emit, err, status
from streams.errors import SidstreamError

if TYPE_CHECKING:
    from registry.releases.release import Publisher
    from sidstream.settings import Settings
    from trainer.cycle_result import CycleResult
    from trainer.settings import TrainerSettings
    from trainer.tuning.devices import Devices

AsJson = Annotated[bool, typer.Option("--json", help="print one line of JSON")]


def train(
    max_seconds: Annotated[float | None, typer.Option(help="time budget of SFT, in seconds")] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="steps of SFT at most: the same work on any machine")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of weights, order and dropout")] = None,
    from_scratch: Annotated[bool, typer.Option(help="fresh weights instead of the champion's")] = False,
    hf_model: Annotated[
        str | None, typer.Option(help="tune this Hugging Face causal LM (id or folder) instead, by LoRA")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run one update cycle: the new events become a model in service (the first) or on trial (later ones).

    Several GPUs train it together: torchrun --nproc-per-node 4 -m sidstream train

    Example: sidstream train --max-seconds 60
    """
    from sidstream.settings import load

    set_thread_environment()
    from trainer.tuning.devices import launched_devices

    devices = launched_devices()
    if not devices.main:
        from trainer.tuning.broadcast import follow_main_process

        follow_main_process(devices)
        return
    settings = load()
    options = {"max_seconds": max_seconds, "max_steps": max_steps, "seed": seed, "hf_model": hf_model}
    chosen = settings.trainer.model_copy(update={k: v for k, v in options.items() if v is not None})
    with stage_lines() as report:
        if chosen.hf_model:
            # peft's adapters are trained in one process.
            devices.leave()
            _tune_language_model(settings, chosen, report, as_json)
            return
        result = one_cycle(settings, chosen, report, from_scratch, devices=devices)
        devices.leave()
    emit(result.as_dict(), as_json, result.summary())


def trainer() -> None:
    """Run an update cycle periodically (SIDSTREAM_TRAINER__SCHEDULE__EVERY_MINUTES) until SIGTERM.

    Example: sidstream trainer
    """
    from sidstream.settings import load

    set_thread_environment()
    from trainer.schedule import run_periodically

    settings = load()

    def report_outcome(outcome: CycleResult | SidstreamError) -> None:
        text = f"error: {outcome}" if isinstance(outcome, SidstreamError) else outcome.summary()
        err.print(text, markup=False)

    with stage_lines() as report:
        run_periodically(
            lambda stop: one_cycle(settings, settings.trainer, report, stop=stop),
            settings.trainer.schedule,
            report_outcome,
        )


def set_thread_environment() -> None:
    """Before torch is imported: threads that wait must not spin, beside Kafka and the agents on few cores."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise SidstreamError("torch is not installed: pip install 'sidstream[train]'")


def one_cycle(
    settings: Settings, chosen: TrainerSettings, report: Callable[[str, str, bool], None],
    from_scratch: bool = False, stop: Callable[[], bool] | None = None, step: float = 1.0,
    devices: Devices | None = None,
) -> CycleResult:  # fmt: skip
    """Run one update cycle; its trial begins at `step` of the challengers' full weights."""
    from registry.bundles.store import Registry
    from sidstream.commands.registry import promoting
    from trainer.cycle import UpdateCycle
    from trainer.tuning.devices import Devices

    @contextmanager
    def publisher() -> Iterator[Publisher]:
        with promoting(settings) as (_, client):
            yield client

    return UpdateCycle(
        chosen, settings.kafka, Registry(settings.registry), settings.rollout, publisher,
        limits=settings.serving.limits,
        horizon_ms=settings.agents.horizon_ms, window_ms=settings.agents.window_ms, step=step,
        from_scratch=from_scratch, progress=report, stop=stop, devices=devices or Devices(),
    ).run()  # fmt: skip


def _tune_language_model(
    settings: Settings, chosen: TrainerSettings, report: Callable[[str, str, bool], None], as_json: bool
) -> None:
    from registry.bundles.store import Registry
    from trainer.language_model.lora import tune_window

    result = tune_window(
        chosen, settings.kafka, Registry(settings.registry), horizon_ms=settings.agents.horizon_ms,
        window_ms=settings.agents.window_ms, progress=report,
    )  # fmt: skip
    text = f"{result.folder}: HR@10 {result.quality.hr10:.3f} on {result.quality.users} users"
    if result.aligned_quality:
        text += f"; {result.aligned}: HR@10 {result.aligned_quality.hr10:.3f}"
    elif result.dpo:
        text += f"; no aligned model: {result.dpo.stopped}"
    emit(result.as_dict(), as_json, f"{text}; the serving agent answers from the small generator only")


@contextmanager
def stage_lines() -> Iterator[Callable[[str, str, bool], None]]:
    """`line(stage, text, last)`: the last text of a stage stays, the others are shown while it runs."""
    with status("starting") as show:

        def report(stage: str, text: str, last: bool) -> None:
            if last:
                err.print(f"{stage}: {text}", markup=False)
            else:
                show(f"{stage}: {text}")

        yield report
