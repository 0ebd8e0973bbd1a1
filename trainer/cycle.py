"""One update cycle: window -> SFT -> DPO -> offline check -> export -> bundles in the registry -> rollout."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from registry.arms import CHAMPION, SFT
from registry.bundles.bundle import Bundle, BundleKind
from registry.bundles.ranking import read as read_ranking
from registry.bundles.store import Registry
from registry.decoding.list_rules import ListLimits
from registry.releases import release
from registry.settings import RolloutSettings
from streams.errors import SidstreamError
from streams.settings import KafkaSettings
from trainer.alignment.cycle_stage import align_to_window
from trainer.cycle_bundles import BundleWriter
from trainer.cycle_inputs import CycleInputs, cycle_lock, read_cycle_inputs
from trainer.cycle_result import CycleResult, ReportStage, StageReporter
from trainer.generator.build import fresh_generator, load_model
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.offline_check import check_finite, reason_to_refuse, reason_to_refuse_first
from trainer.offline_checks.offpolicy import judge_by_explorations
from trainer.offline_checks.quality import evaluate_held_out, hr_ndcg
from trainer.plots.training_curve import draw_training_curve
from trainer.rewards.online import RewardEvidence, learn_from_own_answers
from trainer.sequences.interactions import items_by_popularity
from trainer.sequences.rows import TrainingRows
from trainer.settings import TrainerSettings
from trainer.tuning.broadcast import write_training_inputs
from trainer.tuning.devices import Devices
from trainer.tuning.ensemble import train_ensemble
from trainer.tuning.sft import SftResult

Promoting = Callable[[], contextlib.AbstractContextManager[release.Publisher]]


@dataclass
class UpdateCycle:
    """One update cycle, which puts its bundles in service (the first cycle) or on trial (later ones).

    `promoting()` gives a publisher while this process alone may change what is in service; `horizon_ms` is
    how long after an answer its clicks may come, `window_ms` the attribution window of preference pairs,
    `step` the share of their full weights that challengers get at first, `limits` those of serving's lists,
    which the offline figures are of. With several `devices` this is their
    main process, and all of them train SFT. `stop()` says whether the cycle shall end, its checkpoint kept.
    """

    settings: TrainerSettings
    kafka: KafkaSettings
    registry: Registry
    rollout: RolloutSettings
    promoting: Promoting
    horizon_ms: int = field(kw_only=True)
    window_ms: int = field(kw_only=True)
    step: float = field(default=1.0, kw_only=True)
    limits: ListLimits = field(default_factory=ListLimits, kw_only=True)
    from_scratch: bool = field(default=False, kw_only=True)
    progress: ReportStage | None = field(default=None, kw_only=True)
    stop: Callable[[], bool] | None = field(default=None, kw_only=True)
    devices: Devices = field(default_factory=Devices, kw_only=True)
    result: CycleResult = field(init=False, default_factory=CycleResult)
    stages: StageReporter = field(init=False)
    inputs: CycleInputs = field(init=False)
    run_folder: Path = field(init=False)  # of checkpoints and exports, until the cycle is done

    def run(self) -> CycleResult:
        """Run the cycle. Raises SidstreamError where there is nothing to train on, another cycle runs in the
        same home, or the offline check fails."""
        self.stages = StageReporter(self.progress, self.result.seconds)
        torch.set_num_threads(self.settings.threads or torch.get_num_threads())
        with cycle_lock(self.settings.home):
            self.result.skipped = self._reason_to_wait() or self._read_inputs()
            if self.result.skipped:
                return self.result
            self._prepare_run_folder()
            model, rows = self._fine_tune()
            if self.result.sft is not None and self.result.sft.stopped == "interrupted":
                self.result.skipped = (
                    "interrupted: the checkpoint is kept, and the next cycle goes on from it"
                )
                return self.result
            self._learn_rewards(model, rows)
            self._check(model)
            aligned_model = self._align(model, rows)
            self._publish(model, aligned_model)
            shutil.rmtree(self.run_folder, ignore_errors=True)
        return self.result

    def _reason_to_wait(self) -> str | None:
        """Why there is no cycle now; None where there may be one."""
        on_trial = self.registry.alias(SFT)
        if on_trial is None:
            return None
        return f"version {on_trial} is still on trial: end it with `sidstream gate --conclude`"

    def _read_inputs(self) -> str | None:
        """Read the window; why it is too small for a cycle, None where it is not."""
        self.inputs = inputs = read_cycle_inputs(
            self.settings, self.kafka, self.registry, self.limits, from_scratch=self.from_scratch,
            horizon_ms=self.horizon_ms, window_ms=self.window_ms,
            reading=lambda count: self.stages.report("window", f"{count:,} records"),
        )  # fmt: skip
        self.result.events = inputs.window.count_new()
        self.stages.finish(
            "window",
            f"{len(inputs.log):,} interactions of {len(inputs.log.users):,} users, "
            f"{len(inputs.catalogue.item_ids):,} items; {self.result.events:,} events are new",
        )
        least = self.settings.schedule.min_events
        if self.result.events >= least:
            return None
        return (
            f"{self.result.events} new clicks and purchases since the champion's window; "
            f"a cycle takes at least {least}"
        )

    def _prepare_run_folder(self) -> None:
        """Name the run by its inputs, so that the same inputs find its checkpoint; remove others."""
        inputs = self.inputs
        about = {
            "window": {topic: sorted(parts.items()) for topic, parts in inputs.window.ranges.items()},
            "parent": inputs.parent.id if inputs.parent else None, "codebook": inputs.codebook.id,
            "settings": self.settings.model_dump(mode="json", exclude={"home", "schedule"}),
        }  # fmt: skip
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.run_folder = self.settings.home / "runs" / name
        for folder in self.run_folder.parent.glob("*"):
            if folder != self.run_folder:
                shutil.rmtree(folder, ignore_errors=True)

    def _fine_tune(self) -> tuple[GeneratorForCausalLM, TrainingRows]:
        """The fine-tuned model, and the rows that it learned from."""
        inputs, tokenizer = self.inputs, self.inputs.tokenizer
        settings, start_model = self._refresh_settings(), self._start_model()
        rows = TrainingRows(
            inputs.split, inputs.catalogue, tokenizer, inputs.prompt, settings, inputs.negative_feedback
        )  # fmt: skip

        def begin(own: TrainerSettings, part: TrainingRows, folder: Path | None) -> GeneratorForCausalLM:
            model = start_model
            if model is None:
                model = fresh_generator(
                    inputs.catalogue, inputs.text_vectors, inputs.prompt, len(tokenizer), own,
                    inputs.context.size,
                )  # fmt: skip
            if folder and self.devices.count > 1:
                write_training_inputs(folder, model, tokenizer, part, own)
                self.devices.send(folder)
            return model

        model, self.result.sft = train_ensemble(
            begin, rows, inputs.sids, settings, self.run_folder, stop=self.stop, devices=self.devices,
            progress=lambda text: self.stages.report("sft", text),
        )  # fmt: skip
        self.devices.leave()
        model.to("cpu")
        self._report_fine_tuning(self.result.sft)
        return model, rows

    def _refresh_settings(self) -> TrainerSettings:
        """The settings of SFT: where there is a model to go on from, those of a refresh."""
        settings = self.settings
        if self.inputs.start_bundle is None:
            return settings
        return settings.model_copy(
            update={
                "lr": settings.refresh_lr,
                "max_items": self.inputs.prompt.max_items,
                "members": 1,
                # A champion has seen the whole log: a refresh is the stage after pretraining.
                "pretrain": settings.pretrain.model_copy(update={"share": 0.0}),
            }
        )

    def _start_model(self) -> GeneratorForCausalLM | None:
        """The model that SFT goes on from, with the whole catalogue, and measured; None: fresh weights."""
        inputs = self.inputs
        if inputs.start_bundle is None:
            return None
        model, _ = load_model(inputs.start_bundle.model)
        text_vectors = None if inputs.text_vectors is None else torch.from_numpy(inputs.text_vectors)
        model.set_items(torch.from_numpy(inputs.catalogue.codes), text_vectors)
        if len(inputs.split.held_out.targets):
            quality = evaluate_held_out(
                model, inputs.split.held_out, inputs.catalogue, inputs.sids,
                read_ranking(inputs.start_bundle.path),
            )  # fmt: skip
            self.result.record_quality("parent", quality)
        return model

    def _report_fine_tuning(self, sft: SftResult) -> None:
        metrics = self.result.metrics
        metrics["sft/steps"] = float(sft.steps)
        # A run whose budget ended before its first step has no loss, and JSON no number for that.
        if math.isfinite(sft.loss):
            metrics["sft/loss"] = sft.loss
        before, ranking = "", ""
        if sft.pretraining:
            pretraining = sft.pretraining
            metrics["pretrain/steps"] = float(pretraining.steps)
            if pretraining.quality:
                self.result.record_quality("pretrain", pretraining.quality)
            before = f"{pretraining.epochs:.1f} epochs of pretraining ({pretraining.stopped}), then "
        if sft.quality:
            self.result.record_quality("sft", sft.quality)
            popularity_hr, popularity_ndcg = hr_ndcg(self._popularity_ranks())
            metrics |= {"popularity/hr10": popularity_hr, "popularity/ndcg10": popularity_ndcg}
            ranking = f", HR@10 {sft.quality.hr10:.3f} (popularity {popularity_hr:.3f})"
        self.stages.finish(
            "sft", f"{before}{sft.epochs:.1f} epochs, {sft.steps} steps{ranking}; {sft.stopped}"
        )

    def _popularity_ranks(self) -> torch.Tensor:
        """Ranks (B,) from 0 of the held-out targets where active items are ranked by popularity, without the
        item of the page."""
        inputs, held_out = self.inputs, self.inputs.split.held_out
        by_popularity = np.array(list(items_by_popularity(inputs.log, inputs.catalogue)), dtype=np.int64)
        if inputs.catalogue.active is not None:
            by_popularity = by_popularity[inputs.catalogue.active[by_popularity]]
        rank = np.full(len(inputs.catalogue.item_ids), len(inputs.catalogue.item_ids), dtype=np.int64)
        rank[by_popularity] = np.arange(len(by_popularity))
        targets = rank[held_out.targets]
        pages = np.array([rank[history[-1]] for history in held_out.histories], dtype=np.int64)
        return torch.from_numpy(targets - (pages < targets))

    def _learn_rewards(self, model: GeneratorForCausalLM, rows: TrainingRows) -> None:
        """The online stage of rewards, where there is one. Its model replaces the one that SFT left."""
        inputs, rewards, sft = self.inputs, self.inputs.rewards, self.result.sft
        if not rows.settings.rewards.online.rounds or rewards is None or not rewards.mass or sft is None:
            return
        evidence = RewardEvidence(
            rewards, inputs.context, inputs.offers, inputs.led_to_purchase, inputs.explorations
        )
        online = learn_from_own_answers(
            model, rows, inputs.sids, evidence, sft.quality,
            lambda text: self.stages.report("rewards", text), self.stop,
        )  # fmt: skip
        self.result.rewards = online
        if online.quality and not online.refused:
            sft.quality = online.quality
            self.result.record_quality("rewards", online.quality)
        self.stages.finish("rewards", online.summary())

    def _check(self, model: GeneratorForCausalLM) -> None:
        """The offline check of the fine-tuned model. Raises SidstreamError where it fails."""
        check_finite(model)
        reason = self._quality_failure() or self._offpolicy_veto("sft", model)
        if reason:
            self._refuse(reason)

    def _refuse(self, reason: str) -> NoReturn:
        """Raise SidstreamError: the fine-tuned model is not released."""
        # A refused model has no bundle id: its run and the bundle that it was trained from name it.
        start = self.inputs.start_bundle
        origin = f"bundle {start.id}" if start else "scratch"
        raise SidstreamError(
            f"candidate {self.run_folder.name} (from {origin}) failed its offline check and was not "
            f"registered: {reason}"
        )

    def _quality_failure(self) -> str | None:
        """Why the held-out users' figures refuse the model; None where they do not, or nobody is held out."""
        quality = self.result.sft.quality if self.result.sft else None
        if quality is None:
            return None
        if self.inputs.parent is None:
            return reason_to_refuse_first(quality, self.result.metrics["popularity/hr10"], self.settings)
        return reason_to_refuse(quality, self.result.metrics.get("parent/hr10"), self.settings)

    def _offpolicy_veto(self, kind: str, model: GeneratorForCausalLM) -> str:
        """Why explored answers refuse the model; empty where they do not, or there are none."""
        explorations = self.inputs.judging_explorations
        if explorations is None:
            return ""
        verdict = judge_by_explorations(
            model, explorations, self.settings.offpolicy, self.result.ranking().dense_weight
        )
        self.result.offpolicy[kind] = verdict
        self.result.metrics |= {f"{kind}/{name}": value for name, value in verdict.metrics().items()}
        self.stages.finish(f"{kind}-offpolicy", verdict.summary())
        return verdict.sentence if verdict.vetoed else ""

    def _align(self, model: GeneratorForCausalLM, rows: TrainingRows) -> GeneratorForCausalLM | None:
        """The aligned model; None where there is none, and `result.no_dpo` says why."""
        inputs, result = self.inputs, self.result
        if inputs.parent is None and self.registry.alias(CHAMPION) is None:
            result.no_dpo = "the first model is aligned when pairs about its answers are there"
            return None
        alignment = align_to_window(
            inputs, self.settings, self.window_ms, model, result.sft.quality if result.sft else None,
            self.run_folder / "dpo", sequences=rows, stop=self.stop,
            report_progress=lambda text: self.stages.report("dpo", text),
        )  # fmt: skip
        result.pairs, result.withdrawn = alignment.pairs, alignment.withdrawn
        result.dpo, result.no_dpo = alignment.dpo, alignment.refused
        result.metrics |= alignment.metrics
        result.dpo_quality = alignment.quality
        if alignment.quality:
            result.record_quality("dpo", alignment.quality)
        self.stages.finish("dpo", alignment.summary)
        if alignment.model is None:
            return None
        if veto := self._offpolicy_veto("dpo", alignment.model):
            result.no_dpo = f"it failed its offline check: {veto}"
            return None
        return alignment.model

    def _publish(self, model: GeneratorForCausalLM, aligned_model: GeneratorForCausalLM | None) -> None:
        """Export the models, register their bundles, and put them in service or on trial."""
        result, registry = self.result, self.registry
        first = registry.alias(CHAMPION) is None
        kind: BundleKind = "base" if first else "sft"
        writer = BundleWriter(self.inputs, self._refresh_settings(), self.result, self.run_folder)
        models: dict[BundleKind, GeneratorForCausalLM] = {kind: model}
        bundles = {kind: self._write_tuned(writer, kind, model)}
        aligned_bundle = aligned_model and self._write_aligned(writer, aligned_model, bundles[kind].id)
        if aligned_model is not None and aligned_bundle is not None:
            models["dpo"], bundles["dpo"] = aligned_model, aligned_bundle
        worst = max(result.metrics[f"{name}/parity"] for name in bundles)
        self.stages.finish("export", f"{len(bundles)} bundle(s), parity {worst:.1g}")
        for name, bundle in bundles.items():
            result.bundles[name] = bundle.id
            params = writer.params(name, models[name])
            result.versions[name] = registry.register(bundle, result.metrics, params)
        self._store_curves(kind)
        with self.promoting() as publisher:
            if first:
                event = release.start(registry, publisher, result.versions[kind])
            else:
                event = release.start_trial(
                    registry, publisher, result.versions[kind], result.versions.get("dpo"), self.rollout,
                    self.step,
                )  # fmt: skip
        result.action, result.trial = event.action, event.trial
        versions = ", ".join(f"{name} is version {version}" for name, version in result.versions.items())
        self.stages.finish("register", f"{versions}; {'in service' if first else 'on trial'}")

    def _write_tuned(self, writer: BundleWriter, kind: BundleKind, model: GeneratorForCausalLM) -> Bundle:
        """The bundle of the fine-tuned model. Raises SidstreamError where its files fail the offline check:
        what is judged last is what is served."""
        sft = self.result.sft
        bundle, served = writer.write(kind, model, sft.quality if sft else None)
        if sft is not None and served is not None:
            sft.quality = served
            if reason := self._quality_failure():
                self._refuse(reason)
        return bundle

    def _write_aligned(
        self, writer: BundleWriter, model: GeneratorForCausalLM, reference: str
    ) -> Bundle | None:
        """The bundle of the aligned model; None where its files fail the offline check."""
        result = self.result
        bundle, served = writer.write("dpo", model, result.dpo_quality, reference)
        if served is None or result.sft is None or result.sft.quality is None:
            return bundle
        result.dpo_quality = served
        if reason := reason_to_refuse(served, result.sft.quality.hr10, self.settings):
            result.no_dpo = f"it failed its offline check: {reason}"
            return None
        return bundle

    def _store_curves(self, kind: BundleKind) -> None:
        """Keep the learning curves of all stages beside the versions that they led to."""
        result = self.result
        curves: list[tuple[str, str, list[dict[str, float]]]] = []
        if result.sft is not None:
            if result.sft.pretraining is not None:
                curves.append(("pretrain", kind, result.sft.pretraining.curve))
            curves.append((kind, kind, result.sft.curve))
            curves += [
                (f"{kind}-member-{number}", kind, member.curve)
                for number, member in enumerate(result.sft.members, 1)
            ]
        if result.dpo is not None:
            curves.append(("dpo", "dpo", result.dpo.curve))
        for stage, name, curve in curves:
            if name in result.versions and curve:
                self.registry.store_training(
                    result.versions[name], stage, curve, draw_training_curve(stage, curve)
                )
