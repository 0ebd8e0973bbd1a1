"""What each variant of `benchmarks.lineages` trains in a cycle: SFT, and what is tried beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from benchmarks.lineage_models import CODEBOOK_ID, ModelVersion, ShopItems, log_purchase_rates
from benchmarks.lineage_shop import WINDOW_MS, LineageShop
from registry.arms import CHAMPION, DPO, SFT
from registry.bundles.context import Context
from registry.bundles.rewards import Rewards, reward_fields, with_reward_fields
from registry.hold_out import HoldOut
from trainer.alignment.dpo import align
from trainer.alignment.rows import preference_rows
from trainer.generator.build import fresh_generator
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.offline_check import held_out_probe, reason_to_refuse
from trainer.offline_checks.quality import HeldOutQuality, evaluate_held_out
from trainer.rewards.labels import (
    UNKNOWN,
    extend_rewards,
    learn_rewards,
    purchase_labels,
    with_reward_labels,
)
from trainer.sequences.held_out import split_log, without_validation_users
from trainer.sequences.interactions import user_sequences
from trainer.sequences.rows import TrainingRows
from trainer.settings import TrainerSettings
from trainer.tuning.sft import train


@dataclass(frozen=True)
class Variant:
    """One way to choose what is tried beside the fine-tuned model, in the place of the aligned one."""

    beside: Literal["none", "aligned", "rates", "heavy", "asked"] = "none"
    dpo: dict[str, Any] = field(default_factory=dict)  # settings of `trainer.dpo`, for "aligned"
    strength: float = 0.0  # of the log rates in "rates"; weight of purchases in "heavy"


# Provisional, of trials on seeds 1 and 2: most orders of those that cost less than 2 % of the clicks.
RATE_STRENGTH, PURCHASE_WEIGHT = 0.5, 20.0
VARIANTS = {
    "sft": Variant(),
    "softmax_dpo": Variant("aligned"),
    "dpo": Variant("aligned", {"loss": "dpo"}),
    "beta_dpo": Variant("aligned", {"loss": "dpo", "dynamic_beta": True}),
    "rates": Variant("rates", strength=RATE_STRENGTH),
    "heavy": Variant("heavy", strength=PURCHASE_WEIGHT),
    "ric": Variant("asked"),
}


@dataclass(frozen=True)
class FineTuning:
    """A fine-tuned model, what it learned from, and its quality on validation users."""

    version: ModelVersion
    rows: TrainingRows
    quality: HeldOutQuality


class CycleTrainer:
    """Trains the candidates of a shop's cycles by the product's functions and a fixed number of steps."""

    def __init__(self, items: ShopItems, settings: TrainerSettings, report: Callable[[str], None]) -> None:
        self.items, self.settings, self.report = items, settings, report
        # The validation users of every generation, as the update cycle deals them.
        self.hold_out = HoldOut(share=settings.validation_share)
        self.context = Context()
        self.rewards: Rewards | None = None
        self.versions = 0

    def copy(self) -> CycleTrainer:
        """A trainer that goes on from here on its own."""
        return copy.copy(self)

    def first_version(self, shop: LineageShop, steps: int) -> ModelVersion:
        """A model from scratch, which learns from the shop's year."""
        settings = self.settings.model_copy(update={"max_steps": steps})
        rows = self._rows(shop, settings)
        model = fresh_generator(
            self.items.catalogue, self.items.text_vectors, self.items.prompt, len(self.items.tokenizer),
            settings, self.context.size,
        )  # fmt: skip
        self._train(model, rows, settings, "first")
        return self._version("first", model, model)

    def fine_tune(self, shop: LineageShop, steps: int) -> FineTuning:
        """A model that goes on from what the champion was tuned from, on the shop's log."""
        settings = self.settings.model_copy(update={"max_steps": steps, "lr": self.settings.refresh_lr})
        rows = self._rows(shop, settings)
        model = copy.deepcopy(shop.arms[CHAMPION].tuned)
        quality = self._train(model, rows, settings, "sft")
        return FineTuning(self._version("sft", model, model), rows, quality)

    def beside(self, shop: LineageShop, tuning: FineTuning, variant: Variant) -> ModelVersion | None:
        """What a variant tries beside the fine-tuned model; None where that is nothing."""
        match variant.beside:
            case "none":
                return None
            case "aligned":
                return self._aligned(shop, tuning, variant)
            case "rates":
                return self._moved_by_rates(shop, tuning.version, variant.strength)
            case "heavy":
                return self._heavy(shop.arms[CHAMPION], tuning, variant.strength)
            case "asked":
                return self._asked(tuning.version)

    def candidates(self, shop: LineageShop, variant: Variant, steps: int) -> dict[str, ModelVersion]:
        """The candidates of a cycle by arm: fine-tuned from the champion, and what the variant adds."""
        tuning = self.fine_tune(shop, steps)
        beside = self.beside(shop, tuning, variant)
        return {SFT: tuning.version} | ({DPO: beside} if beside else {})

    def _rows(self, shop: LineageShop, settings: TrainerSettings) -> TrainingRows:
        """The training rows of a shop's log, with the rewards that its events brought."""
        log, items = shop.log, self.items
        fresh = np.arange(len(log.users)) >= shop.rows_seen_by_champion
        sequences = user_sequences(log.users, log.ts, log.items, items.catalogue, fresh, log.bought)
        labels = purchase_labels(sequences, WINDOW_MS)
        # The shop's clock is past the windows of its newest clicks (`LineageShop.visit`): none is open.
        labels = np.where(labels == UNKNOWN, 0, labels)
        if self.rewards is None:
            self.rewards = learn_rewards(items.records, sequences, labels, 0, settings.rewards)
            self.context = with_reward_fields(Context(len(items.tokenizer)), self.rewards)
        else:
            self.rewards = extend_rewards(self.rewards, labels, 0, settings.rewards, self.context)
        sequences = with_reward_labels(sequences, items.records, labels, self.rewards, self.context)
        split = split_log(sequences, self.hold_out, settings)
        return TrainingRows(split, items.catalogue, items.tokenizer, items.prompt, settings)

    def _train(
        self, model: GeneratorForCausalLM, rows: TrainingRows, settings: TrainerSettings, name: str
    ) -> HeldOutQuality:
        result = train(model, rows, self.items.sids, settings)
        assert result.quality is not None, "somebody is held out"
        self.report(
            f"{name}: {result.steps} steps, {result.epochs:.2f} epochs, HR@10 {result.quality.hr10:.3f}"
        )
        return result.quality

    def _version(
        self, kind: str, model: GeneratorForCausalLM, tuned: GeneratorForCausalLM, **more: Any
    ) -> ModelVersion:  # fmt: skip
        self.versions += 1
        return ModelVersion(self.versions, kind, model, tuned, self.items, **more)

    def _aligned(self, shop: LineageShop, tuning: FineTuning, variant: Variant) -> ModelVersion | None:
        """The tuned model aligned to the shop's pairs; None where a check refuses it."""
        tuned, rows, quality = tuning.version, tuning.rows, tuning.quality
        dpo = rows.settings.dpo.model_copy(update=variant.dpo)
        settings = rows.settings.model_copy(update={"dpo": dpo})
        held_out = rows.split.held_out
        learned, _ = without_validation_users(shop.preference_pairs, lambda pair: pair.user_id, self.hold_out)
        pairs = preference_rows(learned, CODEBOOK_ID, self.items.prompt, dpo)
        probe = held_out_probe(held_out, self.items.catalogue, self.items.sids, settings, quality.ranking)
        model, result = align(tuned.model, self.items.tokenizer, pairs, settings, sequences=rows, probe=probe)
        after = evaluate_held_out(model, held_out, self.items.catalogue, self.items.sids, quality.ranking)
        refused = reason_to_refuse(after, quality.hr10, settings) or result.failed(dpo.max_drop)
        self.report(
            f"aligned: {len(pairs)} pairs, {result.steps} steps, HR@10 {after.hr10:.3f}, {result.stopped}"
            f"{f', refused: {refused}' if refused else ''}"
        )
        return None if refused else self._version("dpo", model, tuned.model)

    def _moved_by_rates(self, shop: LineageShop, tuned: ModelVersion, strength: float) -> ModelVersion:
        """The tuned model's list, moved by how often a click on an item led to a purchase."""
        log, begin = shop.log, shop.first_visit
        events = zip(log.users[begin:], log.items[begin:], log.bought[begin:], strict=True)
        # Of the users that models learn from: no rate knows more than they do.
        learned, _ = without_validation_users(events, lambda event: event[0], self.hold_out)
        _, names, bought = zip(*learned, strict=True)
        rates = log_purchase_rates(names, bought, self.items.row_of)
        return self._derived("rates", tuned, addend=strength * rates)

    def _heavy(self, champion: ModelVersion, tuning: FineTuning, weight: float) -> ModelVersion:
        """A model that learns with a greater weight of purchases, from the champion where that is one."""
        settings = tuning.rows.settings
        weights = settings.weights.model_copy(update={"purchase": weight})
        rows = tuning.rows.with_settings(settings.model_copy(update={"weights": weights}))
        model = copy.deepcopy(champion.model if champion.kind == "heavy" else champion.tuned)
        self._train(model, rows, rows.settings, f"purchases x{weight:g}")
        return self._version("heavy", model, tuning.version.model)

    def _asked(self, tuned: ModelVersion) -> ModelVersion:
        """The tuned model, asked for purchases as a request's preferences ask."""
        rewards = self.rewards or Rewards({}, {})
        fields = reward_fields(rewards.requested_rewards({"purchase": 1.0}))
        return self._derived("asked", tuned, request=np.array(self.context.row(fields), dtype=np.int32))

    def _derived(self, kind: str, tuned: ModelVersion, **more: Any) -> ModelVersion:
        self.versions += 1
        return ModelVersion(self.versions, kind, tuned.model, tuned.model, self.items, **more)
