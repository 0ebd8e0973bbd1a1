"""Claim: aligned on purchases at the default weights, the model sells more and loses little click-through.

Runs on the stack that `sidstream demo` left up: its fine-tuned model, its preference pairs and its shoppers,
whose propensities are known. Every variant is aligned from the same model on the same pairs, and judged by
the true chances of clicks and purchases of the ten items that it shows to 500 shoppers: no sampling noise of
clicks, none of trials. Prints one line of JSON a variant: CTR, CVR, margin, drop, pairs, steps, seconds.

    python -m benchmarks.align
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from aiokafka import TopicPartition

from registry.bundles.bundle import Bundle
from registry.bundles.context import Context
from registry.bundles.context import read as read_context
from registry.bundles.prompt import Sid, prompt_sids
from registry.bundles.ranking import read as read_ranking
from registry.bundles.store import Registry
from sidstream.settings import Settings, load
from streams.errors import SidstreamError
from streams.events import PreferencePair, Scheme, SidAssignment, UserProfile, decode
from streams.replay import source_of, user_item_sequences
from streams.simulation.shoppers import Shopper, Truth, population
from streams.state import history, keys
from streams.state.redisdb import redis_client
from streams.wire.topic_reader import read_newest_events, read_ranges
from trainer.alignment.dpo import align
from trainer.alignment.rows import preference_rows
from trainer.cycle_inputs import read_cycle_inputs
from trainer.generator.build import load_model
from trainer.generator.constrained import SidSet
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.ranking import CatalogueRanker
from trainer.sequences.rows import TrainingRows

# What is compared: (name, changes of the settings `trainer.dpo`).
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("defaults", {}),
    ("replay 1", {"replay_weight": 1.0}),
    ("without replay", {"replay_weight": 0.0}),
    ("twice the rate", {"lr": 8e-4}),
    ("half of the rate", {"lr": 2e-4}),
    ("one rejected, each on its own", {"loss": "dpo", "max_rejected": 1}),
    ("nine rejected", {"max_rejected": 9}),
    ("a beta that follows", {"dynamic_beta": True}),
    ("beta .1", {"beta": 0.1}),
    ("half of the pairs", {"max_pairs": 4000}),
    ("without clicks over what was shown", {"schemes": ["purchased_over_shown"]}),
    ("also purchases over clicks", {"schemes": list(get_args(Scheme))}),
)
SHOPPERS = 500
SHOWN = 10
# Where the shoppers of the demo ask from.
SCENE = "item-page"


@dataclass
class TrueRateJudge:
    """Shoppers, each with a trigger and a prompt, and the truth about them."""

    truth: Truth
    shoppers: list[Shopper]
    triggers: list[str]
    prompts: list[list[Sid]]
    context: Context
    profiles: dict[str, dict[str, str]]
    items: dict[Sid, str]
    sid_set: SidSet

    def true_rates(self, model: GeneratorForCausalLM, bundle: Bundle) -> tuple[float, float]:
        """True (CTR, CVR) of the ten best items for every shopper, without the trigger item.

        Ranked as the bundle is served, but for its rule about past items.
        """
        sids = list(self.items)
        row_of = {sid: row for row, sid in enumerate(sids)}
        codes = np.array([bundle.prompt.tokens(sid) for sid in sids], dtype=np.int64)
        ranker = CatalogueRanker(model, codes, self.sid_set, 2 * SHOWN)
        users = [shopper.user_id for shopper in self.shoppers]
        context_rows = self.context.rows([SCENE] * len(users), users, self.profiles)
        histories = [np.array([row_of[sid] for sid in prompt]) for prompt in self.prompts]
        candidates = ranker.candidates(histories, ranker.states(histories, context_rows))
        order = candidates.order(read_ranking(bundle.path).dense_weight)
        clicks = purchases = shown = 0.0
        for shopper, trigger, best in zip(self.shoppers, self.triggers, order.tolist(), strict=True):
            named = (self.items[sids[row]] for row in best if row >= 0)
            items = [item for item in named if item != trigger][:SHOWN]
            chance = self.truth.click_probability(shopper.taste, items, trigger)
            clicks += float(chance.sum())
            bought = self.truth.purchase_probability(shopper.taste, shopper.purchase_taste, items)
            purchases += float((chance * bought).sum())
            shown += len(items)
        return clicks / shown, purchases / clicks


def draw_judge(settings: Settings, bundle: Bundle, shoppers: int = SHOPPERS) -> TrueRateJudge:
    """So many shoppers of the demo, by seed."""
    log = source_of("online-retail")
    truth = Truth(list(log.catalogue()), settings.shoppers)
    candidates_to_judge = population(truth, user_item_sequences(log))
    rng = np.random.default_rng(settings.shoppers.seed)
    chosen_shoppers = [
        candidates_to_judge[i] for i in rng.choice(len(candidates_to_judge), shoppers, replace=False)
    ]
    triggers = [shopper.trigger(truth, rng) for shopper in chosen_shoppers]
    codebook = bundle.manifest.codebook
    newest = read_newest_events(settings.kafka, SidAssignment).values()
    sids = {event.item_id: tuple(event.sid) for event in newest if event.codebook == codebook}
    with redis_client(settings.redis) as store:
        pasts = [
            [entry.sid for entry in history.decode_history(store.get(keys.history(shopper.user_id))).entries]
            for shopper in chosen_shoppers
        ]
    prompts = [
        prompt_sids(past, sids[trigger], bundle.prompt.max_items)
        for past, trigger in zip(pasts, triggers, strict=True)
    ]
    sid_set = SidSet(list(sids.values()), bundle.prompt)
    profiles = {
        profile.user_id: profile.attributes
        for profile in read_newest_events(settings.kafka, UserProfile).values()
    }
    items = {sid: item for item, sid in sids.items()}
    return TrueRateJudge(
        truth, chosen_shoppers, triggers, prompts, read_context(bundle.path), profiles, items, sid_set
    )


def read_window_pairs(settings: Settings, bundle: Bundle) -> list[PreferencePair]:
    """The preference pairs of the window that the bundle was made from."""
    ranges = {
        TopicPartition("preferences", int(number)): (begin, end)
        for number, (begin, end) in bundle.manifest.window["preferences"].items()
    }

    async def read() -> list[PreferencePair]:
        batches = [records async for _, records in read_ranges(settings.kafka, ranges)]
        return [decode(PreferencePair, record.value) for records in batches for record in records]

    return asyncio.run(read())


def main() -> None:
    """Run the benchmark."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    settings = load()
    registry = Registry(settings.registry)
    tuned = [row.version for row in registry.versions() if row.kind == "sft"]
    if not tuned:
        raise SidstreamError("no fine-tuned model is registered: run `sidstream demo` first")
    bundle = registry.fetch(min(tuned, key=int))
    judge = draw_judge(settings, bundle)
    inputs = read_cycle_inputs(
        settings.trainer, settings.kafka, registry, from_scratch=False,
        horizon_ms=settings.agents.horizon_ms, window_ms=settings.agents.window_ms,
    )  # fmt: skip
    sequences = TrainingRows(
        inputs.split,
        inputs.catalogue,
        inputs.tokenizer,
        inputs.prompt,
        settings.trainer,
        inputs.negative_feedback,
    )
    with tempfile.TemporaryDirectory() as folder:
        pairs = read_window_pairs(settings, bundle)
        ctr, cvr = judge.true_rates(load_model(bundle.model)[0], bundle)
        print(json.dumps({"variant": "none", "ctr": round(ctr, 4), "cvr": round(cvr, 4)}), flush=True)
        for name, changes in VARIANTS:
            dpo = settings.trainer.dpo.model_copy(update={"max_seconds": None, **changes})
            trainer_settings = settings.trainer.model_copy(update={"dpo": dpo})
            rows = preference_rows(
                pairs, bundle.manifest.codebook, bundle.prompt, dpo, judge.context, judge.profiles
            )
            model, tokenizer = load_model(bundle.model)
            began = time.perf_counter()
            aligned, result = align(
                model, tokenizer, rows, trainer_settings, Path(folder) / name, sequences=sequences
            )
            seconds = time.perf_counter() - began
            ctr, cvr = judge.true_rates(aligned, bundle)
            line = {
                "variant": name, **changes, "ctr": round(ctr, 4), "cvr": round(cvr, 4),
                "margin": round(result.margin, 3), "drop": round(result.drop, 2), "pairs": len(rows),
                "steps": result.steps, "seconds": round(seconds, 1),
            }  # fmt: skip
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
