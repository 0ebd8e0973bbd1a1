"""The update cycle's alignment: its window's pairs -> an aligned model, or why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from registry.bundles.context import Context
from registry.bundles.prompt import Sid
from streams.events import PreferencePair
from trainer.alignment.hard_negatives import Siblings
from trainer.alignment.rows import Fill, PreferenceRow, preference_rows
from trainer.cycle_inputs import CycleInputs
from trainer.generator.model import GeneratorForCausalLM
from trainer.log.pair_filter import FilteredPairs
from trainer.offline.offline_check import failing, held_probe
from trainer.offline.quality import Quality, evaluate, told_change
from trainer.sequences.interactions import Interactions, TrainingCatalogue
from trainer.sequences.rows import TrainingRows
from trainer.settings import DpoSettings, TrainerSettings

if TYPE_CHECKING:
    from trainer.alignment.dpo import DpoResult


@dataclass
class Alignment:
    """What the stage made. `model`: None where there is none, and `refused` says why."""

    pairs: int = 0
    withdrawn: int = 0  # rejected items that late purchases and clicks contradict
    model: GeneratorForCausalLM | None = None
    refused: str | None = None
    told: str = ""  # the stage in a line
    dpo: DpoResult | None = None
    quality: Quality | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def refuse(self, reason: str, told: str) -> Alignment:
        """No model, for a reason."""
        self.refused, self.told = reason, f"left out: {told}"
        return self


def hard_negatives(known: TrainingCatalogue, log: Interactions, settings: DpoSettings) -> Fill | None:
    """What fills pairs that have fewer than `max_rejected`; None where nothing is to be filled.

    Nothing that the user touched, before the pair or since, nor the item that opened the page: what was never
    shown is only a guess, and the log must not contradict it.
    """
    if not settings.hard_negatives:
        return None
    siblings = Siblings(known.sids)
    group = {user: at for at, user in enumerate(log.users)}

    def fill(pair: PreferencePair, rejected: list[Sid]) -> list[Sid]:
        most = min(settings.max_rejected, len(rejected) + settings.hard_negatives)
        never = [tuple(sid) for sid in (*pair.history, *([pair.trigger] if pair.trigger else []))]
        if (at := group.get(pair.user_id)) is not None:
            never += [known.sids[item] for item in log.items[log.starts[at] : log.starts[at + 1]]]
        return siblings.fill(rejected, tuple(pair.chosen), never, pair.event_id, most)

    return fill


def window_rows(
    material: CycleInputs, settings: DpoSettings, window_ms: int, context: Context
) -> tuple[list[PreferenceRow], FilteredPairs]:
    """The rows of a window's pairs, filled with hard negatives, and what was withdrawn of the pairs.

    `window_ms` is the attribution window of the pairs; `context`: what of it the prompts may say.
    """
    book = material.codebook.id
    found = material.window.preference_pairs(window_ms, book, settings.schemes, settings.max_pairs)
    fill = hard_negatives(material.catalogue, material.log, settings)
    rows = preference_rows(
        found.pairs, book, material.prompt, settings, context, material.profiles, fill
    )  # fmt: skip
    return rows, found


def aligned(
    material: CycleInputs, settings: TrainerSettings, window_ms: int, model: GeneratorForCausalLM,
    tuned: Quality | None, folder: Path, *, sequences: TrainingRows, tell: Callable[[str], None],
    stop: Callable[[], bool] | None = None,
) -> Alignment:  # fmt: skip
    """Align `model`, which was just fine-tuned to the quality `tuned` (None: nobody is held out).

    `window_ms` is the attribution window of the pairs; `sequences` are what it was fine-tuned on; `tell` gets
    the progress.
    """
    # Here: TRL takes seconds to import, and a cycle without pairs has nothing to align.
    from trainer.alignment.dpo import align

    dpo, made = settings.dpo, Alignment()
    rows, found = window_rows(material, dpo, window_ms, material.context)
    made.withdrawn = found.bought + found.clicked
    said = f"; {found.summary()}" if found.summary() else ""
    made.pairs = len(rows)
    if made.pairs < dpo.min_pairs:
        reason = f"{made.pairs} preference pairs, at least {dpo.min_pairs} are needed"
        if found.of_other_schemes:
            reason += (
                f" ({found.of_other_schemes:,} are of schemes that "
                "SIDSTREAM_TRAINER__DPO__SCHEMES leaves out)"
            )
        return made.refuse(reason, reason + said)
    held = material.split.held_out
    probe = None
    if tuned is not None:
        probe = held_probe(held, material.catalogue, material.sids, settings, tuned.ranking)
    better, result = align(
        model, material.tokenizer, rows, settings, folder, sequences=sequences, probe=probe, progress=tell,
        stop=stop,
    )  # fmt: skip
    made.dpo = result
    made.metrics = {
        "dpo/margin": result.margin, "dpo/accuracy": result.accuracy, "dpo/drop": result.drop,
        "dpo/loss": result.loss, "dpo/rejected": float(result.rejected), "dpo/beta": result.beta,
        "dpo/withdrawn": float(made.withdrawn), "dpo/kept_step": float(result.kept),
    }  # fmt: skip
    shown, failed = "", None
    if tuned is not None and len(held.targets):
        # Mixed as the reference is: the weight belongs to the two heads, and the pairs say nothing of it.
        made.quality = evaluate(better, held, material.catalogue, material.sids, settings, tuned.ranking)
        if change := told_change(tuned, made.quality):
            shown = f"; {change}"
        failed = failing(made.quality, tuned.hr10, settings)
    failed = result.failed(dpo.max_drop) or failed
    if failed:
        return made.refuse(f"it failed its offline check: {failed}", failed + said)
    made.model = better
    made.told = (
        f"{made.pairs:,} pairs, {result.rejected:,} rejected, margin {result.margin:.3f}{shown}; "
        f"{result.stopped}{said}"
    )
    return made
