"""The update cycle's alignment: its window's pairs -> an aligned model, or why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from registry.bundles.context import Context
from registry.bundles.prompt import Sid
from streams.events import PreferencePair
from trainer.alignment.hard_negatives import SiblingSids
from trainer.alignment.held_out_pairs import judge_pairs
from trainer.alignment.rows import PreferenceRow, RejectedFiller, preference_rows
from trainer.cycle_inputs import CycleInputs
from trainer.generator.model import GeneratorForCausalLM
from trainer.log.pair_filter import FilteredPairs
from trainer.offline_checks.offline_check import held_out_probe, reason_to_refuse
from trainer.offline_checks.quality import HeldOutQuality, describe_change, evaluate_held_out
from trainer.sequences.interactions import Interactions, TrainingCatalogue
from trainer.sequences.rows import TrainingRows
from trainer.settings import DpoSettings, TrainerSettings

if TYPE_CHECKING:
    from trainer.alignment.dpo import DpoResult


@dataclass
class Alignment:
    """The outcome of the stage. `model`: None where there is no aligned model; `refused` is the reason."""

    pairs: int = 0
    withdrawn: int = 0  # rejected items that late purchases and clicks contradict
    model: GeneratorForCausalLM | None = None
    refused: str | None = None
    summary: str = ""  # the stage in a line
    dpo: DpoResult | None = None
    quality: HeldOutQuality | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def refuse(self, reason: str, summary: str) -> Alignment:
        """No model, for a reason."""
        self.refused, self.summary = reason, f"left out: {summary}"
        return self


def hard_negative_filler(
    catalogue: TrainingCatalogue, log: Interactions, settings: DpoSettings
) -> RejectedFiller | None:
    """The function that adds hard negatives to pairs with fewer than `max_rejected`; None where they are off.

    It adds no item that the user clicked or bought, before the pair or since, nor the item that opened the
    page. An item that was never shown is only presumed to be rejected, and the log must not contradict that.
    """
    if not settings.hard_negatives:
        return None
    siblings = SiblingSids(catalogue.sids)
    user_index = {user: index for index, user in enumerate(log.users)}

    def fill_rejected(pair: PreferencePair, rejected: list[Sid]) -> list[Sid]:
        max_rejected = min(settings.max_rejected, len(rejected) + settings.hard_negatives)
        excluded = [tuple(sid) for sid in (*pair.history, *([pair.trigger] if pair.trigger else []))]
        if (index := user_index.get(pair.user_id)) is not None:
            excluded += [
                catalogue.sids[item] for item in log.items[log.starts[index] : log.starts[index + 1]]
            ]
        return siblings.add_negatives(rejected, tuple(pair.chosen), excluded, pair.event_id, max_rejected)

    return fill_rejected


@dataclass(frozen=True)
class WindowRows:
    """The rows of a window's pairs: those to learn from, and those of validation users, which judge."""

    learned: list[PreferenceRow]  # with hard negatives
    validation: list[PreferenceRow]  # as they were shown
    withdrawal: FilteredPairs  # what was withdrawn of the pairs to learn from


def window_rows(
    inputs: CycleInputs, settings: DpoSettings, window_ms: int, context: Context, max_validation: int = 0
) -> WindowRows:
    """The rows of a window's pairs, `max_validation` of those of validation users.

    `window_ms` is the attribution window of the pairs; `context`: the context fields of the prompts.
    """
    codebook_id, prompt, profiles = inputs.codebook.id, inputs.prompt, inputs.profiles
    withdrawal, validation = inputs.window.preference_pairs(
        window_ms, codebook_id, settings.schemes, settings.max_pairs, inputs.hold_out, max_validation
    )
    fill_rejected = hard_negative_filler(inputs.catalogue, inputs.log, settings)
    return WindowRows(
        preference_rows(withdrawal.pairs, codebook_id, prompt, settings, context, profiles, fill_rejected),
        preference_rows(validation.pairs, codebook_id, prompt, settings, context, profiles),
        withdrawal,
    )


def align_to_window(
    inputs: CycleInputs, settings: TrainerSettings, window_ms: int, model: GeneratorForCausalLM,
    tuned: HeldOutQuality | None, folder: Path, *, sequences: TrainingRows,
    report_progress: Callable[[str], None], stop: Callable[[], bool] | None = None,
) -> Alignment:  # fmt: skip
    """Align `model`, whose fine-tuning ended with the quality `tuned` (None: no users are held out).

    `window_ms` is the attribution window of the pairs; `sequences` are the rows that it was fine-tuned on;
    `report_progress` gets a line of text at each log.
    """
    # Here: TRL takes seconds to import, and a cycle without pairs has nothing to align.
    from trainer.alignment.dpo import align

    dpo, alignment = settings.dpo, Alignment()
    window = window_rows(inputs, dpo, window_ms, inputs.context, settings.validation_users)
    rows, withdrawal = window.learned, window.withdrawal
    alignment.withdrawn = withdrawal.bought + withdrawal.clicked
    withdrawn_note = f"; {withdrawal.summary()}" if withdrawal.summary() else ""
    alignment.pairs = len(rows)
    if alignment.pairs < dpo.min_pairs:
        reason = f"{alignment.pairs} preference pairs, at least {dpo.min_pairs} are needed"
        if withdrawal.of_other_schemes:
            reason += (
                f" ({withdrawal.of_other_schemes:,} are of schemes that "
                "SIDSTREAM_TRAINER__DPO__SCHEMES leaves out)"
            )
        return alignment.refuse(reason, reason + withdrawn_note)
    held_out = inputs.split.held_out
    probe = None
    if tuned is not None:
        probe = held_out_probe(held_out, inputs.catalogue, inputs.sids, settings, tuned.ranking)
    aligned_model, result = align(
        model, inputs.tokenizer, rows, settings, folder, sequences=sequences, probe=probe,
        progress=report_progress, stop=stop,
    )  # fmt: skip
    alignment.dpo = result
    alignment.metrics = {
        "dpo/margin": result.margin, "dpo/accuracy": result.accuracy, "dpo/drop": result.drop,
        "dpo/loss": result.loss, "dpo/rejected": float(result.rejected), "dpo/beta": result.beta,
        "dpo/withdrawn": float(alignment.withdrawn), "dpo/kept_step": float(result.kept),
    }  # fmt: skip
    pairs_note, change_note, failure = "", "", None
    if window.validation:
        dense_weight = tuned.ranking.dense_weight if tuned else 0.0
        held_out_pairs = judge_pairs(
            aligned_model, model, window.validation, inputs.tokenizer.pad_token_id, dense_weight, dpo.batch
        )
        alignment.metrics |= held_out_pairs.metrics()
        pairs_note = f"; {held_out_pairs.summary()}"
    if tuned is not None and len(held_out.targets):
        # Under the reference's ranking: its dense weight is fitted to the two heads, not to the pairs.
        alignment.quality = evaluate_held_out(
            aligned_model, held_out, inputs.catalogue, inputs.sids, tuned.ranking
        )
        if change := describe_change(tuned, alignment.quality):
            change_note = f"; {change}"
        failure = reason_to_refuse(alignment.quality, tuned.hr10, settings)
    failure = result.failed(dpo.max_drop) or failure
    if failure:
        return alignment.refuse(f"it failed its offline check: {failure}", failure + withdrawn_note)
    alignment.model = aligned_model
    alignment.summary = (
        f"{alignment.pairs:,} pairs, {result.rejected:,} rejected, margin {result.margin:.3f}"
        f"{pairs_note}{change_note}; {result.stopped}{withdrawn_note}"
    )
    return alignment
