"""Generators of the same rows, each from its own seed, merged into one (trainer.generator.merge)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from trainer.generator.constrained import SidSet
from trainer.generator.merge import merge_generators
from trainer.generator.model import GeneratorForCausalLM
from trainer.sequences.rows import TrainingRows
from trainer.settings import TrainerSettings
from trainer.tuning.devices import Devices
from trainer.tuning.next_item import TeacherTargets
from trainer.tuning.pretrain import pretrain_and_tune
from trainer.tuning.resumable import INTERRUPTED
from trainer.tuning.sft import Progress, SftResult, validate

# From a member's seed to the next one's: stages and refreshes count on from `seed` by ones.
_APART = 1000
# Makes the generator that a member starts from, of its settings, rows and folder.
MakeGenerator = Callable[[TrainerSettings, TrainingRows, Path | None], GeneratorForCausalLM]


def train_ensemble(
    make_generator: MakeGenerator, rows: TrainingRows, sids: SidSet, settings: TrainerSettings,
    folder: Path | None = None, *,
    progress: Progress | None = None, stop: Callable[[], bool] | None = None,
    devices: Devices | None = None, teacher: TeacherTargets | None = None,
    first_member: tuple[GeneratorForCausalLM, SftResult] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[GeneratorForCausalLM, SftResult]:  # fmt: skip
    """`trainer.tuning.pretrain.pretrain_and_tune` for each of `settings.members`, and their merged generator.

    Members differ in their initial weights, the order of their rows and their dropout, and are measured
    on the same held-out events. Each has its part of `max_seconds` and, below `folder`, its own checkpoint: a
    resumed run goes on in its member. An interrupted member is the result itself. `first_member`: that member
    and its result, where it is trained already.
    """
    count, members = settings.members, []
    for number, own_settings in enumerate(member_settings(settings)):
        if first_member and not number:
            members.append(first_member)
            continue
        name = f"member {number + 1} of {count}: " if count > 1 else ""

        def report_progress(text: str, name: str = name) -> None:
            if progress:
                progress(name + text)

        member_rows = rows.with_settings(own_settings)
        member_folder = folder / f"member-{number + 1}" if folder and count > 1 else folder
        model = make_generator(own_settings, member_rows, member_folder)
        result = pretrain_and_tune(
            model,
            member_rows,
            sids,
            own_settings,
            folder=member_folder,
            progress=report_progress,
            stop=stop,
            devices=devices,
            teacher=teacher,
            clock=clock,
        )
        if count == 1 or result.stopped == INTERRUPTED:
            return model, result
        members.append((model, result))
    results = [result for _, result in members]
    merged_generator = merge_generators([model for model, _ in members])
    return merged_generator, SftResult(
        steps=sum(member.steps for member in results), epochs=sum(member.epochs for member in results),
        seconds=sum(member.seconds for member in results),
        loss=sum(member.loss for member in results) / count,
        quality=validate(merged_generator, rows, sids, settings), stopped=f"{count} members are one",
        members=results,
    )  # fmt: skip


def member_settings(settings: TrainerSettings) -> list[TrainerSettings]:
    """The settings of each member: the first one's seed is that of a generator without others."""
    seconds = settings.max_seconds and settings.max_seconds / settings.members
    return [
        settings.model_copy(update={"seed": settings.seed + _APART * number, "max_seconds": seconds})
        for number in range(settings.members)
    ]
