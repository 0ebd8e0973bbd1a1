"""One update cycle: window -> SFT -> DPO -> offline check -> export -> bundles in the registry -> rollout."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from registry.bundles.bundle import Bundle, Kind, write_bundle
from registry.bundles.context import write as write_context
from registry.bundles.prompt import Sid
from registry.bundles.ranking import Ranking
from registry.bundles.ranking import read as read_ranking
from registry.bundles.ranking import write as write_ranking
from registry.bundles.rewards import write as write_rewards
from registry.bundles.store import CHAMPION, SFT, Registry
from registry.releases import release
from registry.settings import RolloutSettings
from streams.errors import SidstreamError
from streams.settings import KafkaSettings
from trainer.alignment.stage import align_to_window
from trainer.cycle_inputs import Material, only_one, read_material
from trainer.cycle_result import CycleResult, Progress, Stages
from trainer.generator.build import fresh_generator, load_model
from trainer.generator.export import check_parity, export_generator
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline.offline_check import check_finite, reason_to_refuse, reason_to_refuse_first
from trainer.offline.offpolicy import LoggedExplorations, judge_by_explorations
from trainer.offline.quality import HeldOutQuality, evaluate_held_out, hr_ndcg
from trainer.plots.training_curve import draw_training_curve
from trainer.rewards.online import RewardEvidence, learn_from_own_answers
from trainer.sequences.interactions import popular
from trainer.sequences.rows import Rows
from trainer.settings import TrainerSettings
from trainer.tuning.broadcast import write
from trainer.tuning.devices import Devices
from trainer.tuning.ensemble import learn_members

Promoting = Callable[[], contextlib.AbstractContextManager[release.Publisher]]
# Real histories in the parity check, beside the random ones.
_PARITY_HISTORIES = 32


def run_cycle(
    settings: TrainerSettings,
    kafka: KafkaSettings,
    registry: Registry,
    rollout: RolloutSettings,
    promoting: Promoting,
    *,
    horizon_ms: int,
    window_ms: int,
    step: float = 1.0,
    from_scratch: bool = False,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    devices: Devices | None = None,
) -> CycleResult:
    """Run one update cycle and put its bundles in service (the first) or on trial (later ones).

    `promoting()` gives a publisher while this process alone may change what is in service; `horizon_ms` is
    how long after an answer its clicks may come, `window_ms` the attribution window of preference pairs,
    `step` the share of their full weights that challengers get at first. With several `devices` this is their
    main process, and all of them train SFT. Raises SidstreamError where there is nothing to train on, another
    cycle runs in the same home, or the offline check fails.
    """
    result = CycleResult()
    stages = Stages(progress, result.seconds)
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    with only_one(settings.home):
        running = registry.alias(SFT)
        if running is not None:
            result.skipped = f"version {running} is still on trial: end it with `sidstream gate --conclude`"
            return result
        material = read_material(
            settings, kafka, registry, from_scratch=from_scratch, horizon_ms=horizon_ms, window_ms=window_ms,
            reading=lambda count: stages.tell("window", f"{count:,} records"),
        )  # fmt: skip
        result.events = material.window.count()
        log = material.log
        stages.done(
            "window",
            f"{len(log):,} interactions of {len(log.users):,} users, {len(material.known.items):,} items; "
            f"{result.events:,} events are new",
        )
        if result.events < settings.schedule.min_events:
            result.skipped = (
                f"{result.events} new clicks and purchases since the champion's window; "
                f"a cycle takes at least {settings.schedule.min_events}"
            )
            return result
        run = settings.home / "runs" / _run_id(material, settings)
        for older in (settings.home / "runs").glob("*"):
            # A run of another window is never gone on from.
            if older != run:
                shutil.rmtree(older, ignore_errors=True)
        model, rows = _sft(material, settings, run, result, stages, stop, devices or Devices())
        if result.sft is not None and result.sft.stopped == "interrupted":
            result.skipped = "interrupted: the checkpoint is kept, and the next cycle goes on from it"
            return result
        _online(material, model, rows, result, stages, stop)
        # Named by what it was made of: a model that is refused has no bundle to be named by.
        origin = f"bundle {material.start.id}" if material.start else "scratch"
        candidate = f"candidate {run.name} (from {origin})"
        check_finite(model)
        refused = f"{candidate} failed its offline check and was not registered"
        if failed := _sft_failing(material, settings, result):
            raise SidstreamError(f"{refused}: {failed}")
        ranking = result.sft.quality.ranking if result.sft and result.sft.quality else Ranking()
        veto = _veto("sft", model, material.explored, settings, ranking, result, stages)
        if veto:
            raise SidstreamError(f"{refused}: {veto}")
        better = None
        if material.parent is None and registry.alias(CHAMPION) is None:
            result.no_dpo = "the first model is aligned when pairs about its answers are there"
        else:
            better = _dpo(material, settings, window_ms, model, rows, run, result, stages, stop)
        if better is not None:
            veto = _veto("dpo", better, material.explored, settings, ranking, result, stages)
            if veto:
                result.no_dpo, better = f"it failed its offline check: {veto}", None
        _publish(
            material, settings, model, better, run, registry, rollout, step, promoting, result, stages,
        )  # fmt: skip
        shutil.rmtree(run, ignore_errors=True)
    return result


def _run_id(material: Material, settings: TrainerSettings) -> str:
    about = {
        "window": {topic: sorted(parts.items()) for topic, parts in material.window.ranges.items()},
        "parent": material.parent.id if material.parent else None, "codebook": material.codebook.id,
        "settings": settings.model_dump(mode="json", exclude={"home", "schedule"}),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _sft(
    material: Material, settings: TrainerSettings, run: Path, result: CycleResult, stages: Stages,
    stop: Callable[[], bool] | None, devices: Devices,
) -> tuple[GeneratorForCausalLM, Rows]:  # fmt: skip
    """The fine-tuned model, and the rows that it learned from."""
    tokenizer, start = material.tokenizer, None
    if material.start is not None:
        start, _ = load_model(material.start.model)
        text = None if material.text is None else torch.from_numpy(material.text)
        start.set_items(torch.from_numpy(material.known.codes), text)
        settings = settings.model_copy(
            update={
                "lr": settings.refresh_lr, "max_items": material.prompt.max_items,
                "members": 1,
                # A champion has seen the whole log: a refresh is the stage after pretraining.
                "pretrain": settings.pretrain.model_copy(update={"share": 0.0}),
            }
        )  # fmt: skip
        if len(material.split.held.targets):
            ranking = read_ranking(material.start.path)
            before = evaluate_held_out(
                start, material.split.held, material.known, material.sids, settings, ranking
            )
            result.metrics |= _named("parent", before)
    rows = Rows(
        material.log, material.split, material.known, tokenizer, material.prompt, settings, material.ignored
    )

    def begin(own: TrainerSettings, part: Rows, folder: Path | None) -> GeneratorForCausalLM:
        model = start
        if model is None:
            model = fresh_generator(
                material.known, material.text, material.prompt, len(tokenizer), own, material.context.size
            )
        if folder and devices.count > 1:
            write(folder, model, tokenizer, part, own)
            devices.send(folder)
        return model

    model, result.sft = learn_members(
        begin, rows, material.sids, settings, run, stop=stop, devices=devices,
        progress=lambda text: stages.tell("sft", text),
    )  # fmt: skip
    devices.leave()
    model.to("cpu")
    result.metrics["sft/steps"] = float(result.sft.steps)
    # A run whose budget ended before its first step has no loss, and JSON no number for that.
    if math.isfinite(result.sft.loss):
        result.metrics["sft/loss"] = result.sft.loss
    told, shown = "", ""
    if result.sft.pretraining:
        first = result.sft.pretraining
        result.metrics["pretrain/steps"] = float(first.steps)
        result.metrics |= _named("pretrain", first.quality) if first.quality else {}
        told = f"{first.epochs:.1f} epochs of pretraining ({first.stopped}), then "
    if result.sft.quality:
        result.metrics |= _named("sft", result.sft.quality)
        rank = _popularity_ranks(material)
        hr, ndcg = hr_ndcg(rank)
        result.metrics |= {"popularity/hr10": hr, "popularity/ndcg10": ndcg}
        shown = f", HR@10 {result.sft.quality.hr10:.3f} (popularity {hr:.3f})"
    stages.done(
        "sft", f"{told}{result.sft.epochs:.1f} epochs, {result.sft.steps} steps{shown}; {result.sft.stopped}"
    )
    return model, rows


def _online(
    material: Material, model: GeneratorForCausalLM, rows: Rows, result: CycleResult, stages: Stages,
    stop: Callable[[], bool] | None,
) -> None:  # fmt: skip
    """The online stage of rewards, where there is one; what it makes is what SFT made from here on."""
    rewards, tuned = material.rewards, result.sft
    if not rows.settings.rewards.online.rounds or rewards is None or not rewards.mass or tuned is None:
        return
    worth = RewardEvidence(rewards, material.context, material.offers, material.bought, material.explored)
    made = learn_from_own_answers(
        model, rows, material.sids, worth, tuned.quality, lambda text: stages.tell("rewards", text), stop
    )
    result.rewards = made
    if made.quality and not made.refused:
        tuned.quality = made.quality
        result.metrics |= _named("rewards", made.quality)
    stages.done("rewards", made.summary())


def _popularity_ranks(material: Material) -> torch.Tensor:
    top = list(popular(material.log, material.known, material.split.ends))
    place = np.empty(len(top), dtype=np.int64)
    place[top] = np.arange(len(top))
    return torch.from_numpy(place[material.split.held.targets])


def _named(stage: str, quality: HeldOutQuality) -> dict[str, float]:
    numbers = {
        "users": quality.users,
        "hr10": quality.hr10,
        "ndcg10": quality.ndcg10,
        "validity": quality.validity,
    }
    if quality.purchases:
        numbers["purchase_hr10"] = quality.purchase_hr10
    return {
        f"{stage}/{name}": float(value)
        for name, value in (numbers | {"dense_weight": quality.ranking.dense_weight}).items()
    }


def _sft_failing(material: Material, settings: TrainerSettings, result: CycleResult) -> str | None:
    quality = result.sft.quality if result.sft else None
    if quality is None:
        return None
    if material.parent is None:
        return reason_to_refuse_first(quality, result.metrics["popularity/hr10"], settings)
    return reason_to_refuse(quality, result.metrics.get("parent/hr10"), settings)


def _veto(
    kind: str, model: GeneratorForCausalLM, logged: LoggedExplorations | None, settings: TrainerSettings,
    ranking: Ranking, result: CycleResult, stages: Stages,
) -> str:  # fmt: skip
    """Why explored answers refuse the model; empty where they do not, or there are none."""
    if logged is None:
        return ""
    found = judge_by_explorations(model, logged, settings.offpolicy, ranking.dense_weight)
    result.offpolicy[kind] = found
    result.metrics |= {f"{kind}/{name}": value for name, value in found.metrics().items()}
    stages.done(f"{kind}-offpolicy", found.summary())
    return found.sentence if found.vetoed else ""


def _dpo(
    material: Material, settings: TrainerSettings, window_ms: int, model: GeneratorForCausalLM, rows: Rows,
    run: Path, result: CycleResult, stages: Stages, stop: Callable[[], bool] | None,
) -> GeneratorForCausalLM | None:  # fmt: skip
    tuned = result.sft.quality if result.sft else None
    made = align_to_window(
        material, settings, window_ms, model, tuned, run / "dpo", sequences=rows, stop=stop,
        report_progress=lambda text: stages.tell("dpo", text),
    )  # fmt: skip
    result.pairs, result.withdrawn, result.dpo, result.no_dpo = (
        made.pairs, made.withdrawn, made.dpo, made.refused
    )  # fmt: skip
    result.metrics |= made.metrics | (_named("dpo", made.quality) if made.quality else {})
    stages.done("dpo", made.summary)
    return made.model


def _bundle(
    material: Material, settings: TrainerSettings, kind: Kind, model: GeneratorForCausalLM, folder: Path,
    reference: str | None, result: CycleResult,
) -> Bundle:  # fmt: skip
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(folder / "model")
    material.tokenizer.save_pretrained(folder / "model")
    export_generator(model, folder)
    write_ranking(result.sft.quality.ranking if result.sft and result.sft.quality else Ranking(), folder)
    write_context(material.context, folder)
    write_rewards(material.rewards, folder)
    log, known = material.log, material.known
    some = [
        log.items[log.starts[u] : log.starts[u + 1]] for u in range(min(_PARITY_HISTORIES, len(log.users)))
    ]
    histories: list[list[Sid]] = [[known.sids[item] for item in items] for items in some]
    result.metrics[f"{kind}/parity"] = check_parity(model, folder, histories, settings.seed)
    bought = material.window.bought()
    # Bought first; among items never bought, those clicked most.
    looked = {known.items[at]: -place for place, at in enumerate(popular(log, known))}
    ranked = sorted(known.items, key=lambda item: (-bought.get(item, 0), -looked[item], item))
    return write_bundle(
        folder, kind=kind, codebook=material.codebook, popular=ranked, max_items=material.prompt.max_items,
        sids={number: span[1] for number, span in material.window.ranges["sids"].items()},
        window=material.window.ranges, seed=settings.seed, metrics=dict(result.metrics),
        parent=material.start.id if material.start else None, reference=reference,
    )  # fmt: skip


def _publish(
    material: Material, settings: TrainerSettings, model: GeneratorForCausalLM,
    better: GeneratorForCausalLM | None, run: Path, registry: Registry, rollout: RolloutSettings,
    step: float, promoting: Promoting, result: CycleResult, stages: Stages,
) -> None:  # fmt: skip
    first = registry.alias(CHAMPION) is None
    kind: Kind = "base" if first else "sft"
    made = {kind: _bundle(material, settings, kind, model, run / kind, None, result)}
    if better is not None:
        made["dpo"] = _bundle(material, settings, "dpo", better, run / "dpo", made[kind].id, result)
    stages.done(
        "export", f"{len(made)} bundle(s), parity {max(result.metrics[f'{k}/parity'] for k in made):.1g}"
    )
    params = _params(settings, material)
    for name, bundle in made.items():
        result.bundles[name] = bundle.id
        result.versions[name] = registry.register(bundle, result.metrics, params)
    first_stage = result.sft.pretraining if result.sft else None
    members = result.sft.members if result.sft else []
    curves = (
        ("pretrain", kind, first_stage), (kind, kind, result.sft), ("dpo", "dpo", result.dpo),
        *((f"{kind}-member-{number}", kind, one) for number, one in enumerate(members, 1)),
    )  # fmt: skip
    for stage, of, run_of in curves:
        if of in result.versions and run_of is not None and run_of.curve:
            registry.store_training(
                result.versions[of], stage, run_of.curve, draw_training_curve(stage, run_of.curve)
            )
    with promoting() as publisher:
        if first:
            event = release.start(registry, publisher, result.versions[kind])
        else:
            event = release.start_trial(
                registry, publisher, result.versions[kind], result.versions.get("dpo"), rollout, step
            )
    result.action, result.trial = event.action, event.trial
    shown = ", ".join(f"{name} is version {version}" for name, version in result.versions.items())
    stages.done("register", f"{shown}; {'in service' if first else 'on trial'}")


def _params(settings: TrainerSettings, material: Material) -> dict[str, Any]:
    names = (
        "seed", "members", "width", "layers", "heads", "dropout", "lr", "epochs", "batch_positions", "replay",
    )  # fmt: skip
    params: dict[str, Any] = {name: getattr(settings, name) for name in names}
    for part in ("pretrain", "dpo"):
        values = getattr(settings, part).model_dump(mode="json")
        params |= {f"{part}.{name}": value for name, value in values.items()}
    params |= {"codebook": material.codebook.id, "items": len(material.known.items)}
    params["context"] = ", ".join(f"{name}: {len(v)}" for name, v in material.context.fields.items())
    return params | {"parent": material.start.id if material.start else ""}
