"""A shop of one lineage for `benchmarks.lineages`: shoppers, log, pairs, models and trials in one process.

What a cycle does is done by the product's own functions; what Kafka, Redis, MLflow and the serving process do
between them is a list, a dictionary and a call here.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agents.attribution.pairs import OpenPairWindows, PairDecision, PairRules
from agents.attribution.window_stage import WindowRules
from registry.arms import CHAMPION, DPO, SFT
from registry.bundles.embedder import title_vectors
from registry.bundles.prompt import Prompt
from registry.bundles.ranking import Ranking
from registry.experiment.decision import judge
from registry.experiment.statistics import arm_sums
from registry.hold_out import HoldOut
from registry.settings import CodebookSettings, GateSettings, RolloutSettings
from streams.events import (
    Click,
    Event,
    Impression,
    PreferencePair,
    Purchase,
    RankedItem,
    Recommendation,
    Trigger,
)
from streams.replay import source_of, user_item_sequences
from streams.settings import ShoppersSettings
from streams.simulation.shoppers import Shopper, Truth, population
from streams.simulation.shopping import ShoppingTrip
from trainer.alignment.dpo import align
from trainer.alignment.rows import preference_rows
from trainer.codebooks.fit import assign_keeping, fit_codebook_to_vectors
from trainer.generator.build import fresh_generator
from trainer.generator.constrained import SidSet
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.offline_check import held_out_probe, reason_to_refuse
from trainer.offline_checks.quality import evaluate_held_out
from trainer.offline_checks.ranking import CatalogueRanker
from trainer.sequences.held_out import split_log, without_validation_users
from trainer.sequences.interactions import training_catalogue, user_sequences
from trainer.sequences.rows import TrainingRows
from trainer.sequences.tokenizer import build_tokenizer
from trainer.settings import TrainerSettings
from trainer.tuning.sft import train

WINDOW_MS, DAY_MS = 86_400_000, 86_400_000
TASTE_DRIFT = 0.2
# Sessions between two looks at a trial, and the looks after which it ends undecided.
SESSIONS_PER_LOOK, LOOKS = 3000, 6
JUDGING_SHOPPERS, SHOWN_ITEMS = 2000, 10
CODEBOOK_ID = "codebook"
RULES = WindowRules(WINDOW_MS, 0)
GATE = GateSettings.model_validate({})
ROLLOUT = RolloutSettings.model_validate({})


@dataclass(frozen=True)
class ModelVersion:
    """One model, and what it was aligned from."""

    number: int
    kind: str
    model: GeneratorForCausalLM
    tuned: GeneratorForCausalLM
    ranking: Ranking


class InProcessClient:
    """A client of the shopping loop that answers from models in this process, a batch at a time."""

    def __init__(self, shop: LineageShop) -> None:
        self.shop = shop
        self._waiting: list[tuple[Trigger, Future[Recommendation]]] = []

    def submit(self, trigger: Trigger, timeout: float = 0.0) -> Future[Recommendation]:
        """A future that the whole batch of triggers resolves when its first result is read."""
        promise = _LazyRecommendation(self._answer)
        self._waiting.append((trigger, promise))
        return promise

    def _answer(self) -> None:
        waiting, self._waiting = self._waiting, []
        answers = self.shop.answer([trigger for trigger, _ in waiting])
        for (_, promise), answer in zip(waiting, answers, strict=True):
            promise.set_result(answer)

    def publish_all(self, events: Iterable[Event], on_progress: Callable[[int], Any] | None = None) -> int:
        """Record the events in the shop at once."""
        return self.shop.record_events(events)


class _LazyRecommendation(Future[Recommendation]):
    def __init__(self, make: Callable[[], None]) -> None:
        super().__init__()
        self._make = make

    def result(self, timeout: float | None = None) -> Recommendation:
        if not self.done():
            self._make()
        return super().result(timeout)


@dataclass
class InteractionLog:
    """Clicks and purchases in the order of their arrival, as the trainer's log has them."""

    users: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    ts: list[int] = field(default_factory=list)
    bought: list[bool] = field(default_factory=list)

    def add(self, user: str, item: str, ts: int, bought: bool) -> None:
        self.users.append(user)
        self.items.append(item)
        self.ts.append(ts)
        self.bought.append(bought)


class LineageShop:
    """One lineage: shoppers, log, preference pairs and the models in service."""

    def __init__(
        self, seed: int, aligned: bool, settings: TrainerSettings, tell: Callable[[str], None]
    ) -> None:
        self.seed, self.aligned, self.report_progress = seed, aligned, tell
        self.settings = settings.model_copy(update={"seed": seed})
        # The validation users of every generation, as the update cycle deals them.
        self.hold_out = HoldOut(share=settings.validation_share)
        self.random = np.random.default_rng(seed)
        self.shoppers_settings = ShoppersSettings.model_validate({"seed": seed})
        log = source_of("online-retail")
        self.truth = Truth(list(log.catalogue()), self.shoppers_settings)
        pasts = user_item_sequences(log)
        self.shoppers = population(self.truth, pasts)
        self.titles = {item.item_id: item.title for item in log.catalogue()}
        self.prices = {item.item_id: item.price or 0.0 for item in log.catalogue()}
        self.log = InteractionLog()
        for event in log.events():
            self.log.add(str(event.user_id), str(event.item_id), event.ts, True)  # type: ignore[attr-defined]
        self.now = max(self.log.ts) + DAY_MS
        self.rows_seen_by_champion = 0  # rows of the log that the champion has learned from
        self.history: dict[str, list[int]] = defaultdict(list)
        self.open_windows: dict[str, OpenPairWindows] = defaultdict(OpenPairWindows)
        self.preference_pairs: list[PreferencePair] = []
        self._learn_items()
        order = np.argsort(self.log.ts, kind="stable")
        for at in order.tolist():
            self._remember(self.log.users[at], self.log.items[at])
        self.arms: dict[str, ModelVersion] = {}
        self.rankers: dict[int, CatalogueRanker] = {}
        self.weights: dict[str, float] = {}
        self.outcome_sums: dict[str, np.ndarray] = {}
        self.version_count = 0

    def _learn_items(self) -> None:
        names = sorted(self.titles)
        vectors = title_vectors([self.titles[name] for name in names])
        codebook = fit_codebook_to_vectors(
            vectors, CODEBOOK_ID, CodebookSettings.model_validate({"collaborative": 0.0}), 0
        )
        sids = assign_keeping(codebook, vectors, [None] * len(vectors))
        self.prompt = Prompt(codebook.sizes, self.settings.max_items)
        self.catalogue = training_catalogue(dict(zip(names, sids, strict=True)), self.titles, self.prompt)
        self.row_of_item = {name: at for at, name in enumerate(self.catalogue.item_ids)}
        self.sids = SidSet(self.catalogue.sids, self.prompt)
        self.title_vectors = vectors
        self.tokenizer = build_tokenizer(self.prompt, self.catalogue.titles, self.settings.max_words)

    def _remember(self, user: str, item: str) -> None:
        row = self.row_of_item.get(item)
        if row is not None:
            self.history[user].append(row)

    # What the shopping loop calls

    def answer(self, triggers: list[Trigger]) -> list[Recommendation]:
        """The ten best of each request, from the model of its user's arm; the page's own item left out."""
        by_arm: dict[str, list[int]] = defaultdict(list)
        for at, trigger in enumerate(triggers):
            by_arm[self.arm_of(trigger.user_id)].append(at)
        ranked_rows: dict[int, list[int]] = {}
        for arm, places in by_arm.items():
            triggers = [triggers[at] for at in places]
            ranked_rows |= dict(zip(places, self.rank(self.arms[arm], triggers), strict=True))
        return [self._reply(trigger, ranked_rows[at]) for at, trigger in enumerate(triggers)]

    def arm_of(self, user: str) -> str:
        """The arm of a user; each trial assigns users anew."""
        share = np.random.default_rng([self.seed, self.version_count, int(user)]).random()
        for arm, weight in self.weights.items():
            share -= weight
            if share < 0:
                return arm
        return CHAMPION

    def rank(self, version: ModelVersion, triggers: list[Trigger]) -> list[list[int]]:
        """Rows of the ten best items of each request."""
        ranker = self.rankers.setdefault(
            version.number, CatalogueRanker(version.model, self.catalogue.codes, self.sids, 2 * SHOWN_ITEMS)
        )
        pages = [self.row_of_item[trigger.item_id or ""] for trigger in triggers]
        pasts = [
            np.array([*self.history[trigger.user_id][-self.prompt.max_items + 1 :], page])
            for trigger, page in zip(triggers, pages, strict=True)
        ]
        if version.ranking.dense_weight == 1:
            best = ranker.best_items(pasts, ranker.states(pasts), SHOWN_ITEMS + 1)
        else:
            best = ranker.candidates(pasts).order(version.ranking.dense_weight)
        return [
            [row for row in rows if row >= 0 and row != page][:SHOWN_ITEMS]
            for rows, page in zip(best.tolist(), pages, strict=True)
        ]

    def _reply(self, trigger: Trigger, rows: list[int]) -> Recommendation:
        arm = self.arm_of(trigger.user_id)
        items = [
            RankedItem(
                item_id=self.catalogue.item_ids[row], sid=list(self.catalogue.sids[row]), score=-1.0 - place
            )
            for place, row in enumerate(rows)
        ]
        return Recommendation(
            schema_version=1, event_id=f"a-{trigger.request_id}", ts=trigger.ts,
            request_id=trigger.request_id,
            user_id=trigger.user_id, items=items, bundle=str(self.arms[arm].number), arm=arm, trial="t",
            scene=trigger.scene, trigger_item_id=trigger.item_id,
        )  # fmt: skip

    def record_events(self, events: Iterable[Event]) -> int:
        """Apply events to histories, log, sums of the trial and open windows, as the agents do; how many."""
        count = 0
        for event in events:
            count += 1
            if not isinstance(event, Impression | Click | Purchase):
                continue
            user = event.user_id
            self.open_windows[user].add_event(event, RULES, None)
            sums_of = self.outcome_sums.setdefault(user, np.zeros(3, np.int64))
            if isinstance(event, Impression):
                sums_of[0] += len(event.item_ids)
                continue
            bought = isinstance(event, Purchase)
            sums_of[2 if bought else 1] += 1
            self.log.add(user, event.item_id, event.ts, bought)
            self._remember(user, event.item_id)
        return count

    # The cycle

    def visit(self, sessions: int) -> None:
        """Let shoppers visit; then all windows close."""
        trip = ShoppingTrip(
            InProcessClient(self), self.truth, self.shoppers, self.shoppers_settings, self.now
        )
        self.now = trip.run(sessions, self.prices).end_ts + 2 * WINDOW_MS
        for user, state in self.open_windows.items():
            for decision in state.close_due(
                self.now, PairRules(RULES, 10, lambda item: item in self.row_of_item)
            ):
                self.preference_pairs.append(self._pair(user, decision))

    def _pair(self, user: str, decision: PairDecision) -> PreferencePair:
        # What came since the page was opened is at the end of the history: its items are left out.
        later = {self.row_of_item[item] for item in (decision.chosen, *decision.rejected)}
        past = self.history[user][-2 * self.prompt.max_items :]
        past = [row for row in past if row not in later][-self.prompt.max_items :]
        page = self.row_of_item.get(decision.trigger or "")
        sid = self.catalogue.sids
        return PreferencePair(
            schema_version=1, event_id=f"{user}-{decision.ts}-{decision.scheme}-{decision.chosen}",
            ts=decision.ts, user_id=user, scheme=decision.scheme, codebook=CODEBOOK_ID,
            chosen_item=decision.chosen,
            chosen=list(sid[self.row_of_item[decision.chosen]]), rejected_items=list(decision.rejected),
            rejected=[list(sid[self.row_of_item[item]]) for item in decision.rejected],
            history=[list(sid[row]) for row in past], trigger=None if page is None else list(sid[page]),
        )  # fmt: skip

    def train(self, seconds: float) -> list[ModelVersion]:
        """Candidates from the champion: fine-tuned and, where the lineage is aligned, aligned."""
        settings, recorded = self.settings, self.log
        fresh = np.arange(len(recorded.users)) >= self.rows_seen_by_champion
        log = user_sequences(
            recorded.users, recorded.ts, recorded.items, self.catalogue, fresh, recorded.bought
        )
        split = split_log(log, self.hold_out, settings)
        champion = self.arms.get(CHAMPION)
        changes: dict[str, Any] = {"max_seconds": seconds}
        if champion is None:
            model = fresh_generator(
                self.catalogue, self.title_vectors, self.prompt, len(self.tokenizer), settings
            )
        else:
            model = copy.deepcopy(champion.tuned)
            changes["lr"] = settings.refresh_lr
        train_settings = settings.model_copy(update=changes)
        rows = TrainingRows(split, self.catalogue, self.tokenizer, self.prompt, train_settings)
        result = train(model, rows, self.sids, train_settings)
        quality = result.quality
        assert quality is not None, "somebody is held out"
        self.version_count += 1
        tuned = ModelVersion(self.version_count, "sft", model, model, quality.ranking)
        summary = f"version {self.version_count}: {result.epochs:.1f} epochs, HR@10 {quality.hr10:.3f}"
        candidates = [tuned]
        if champion is not None and self.aligned:
            learned, _ = without_validation_users(
                self.preference_pairs, lambda pair: pair.user_id, self.hold_out
            )
            pairs = preference_rows(learned, CODEBOOK_ID, self.prompt, train_settings.dpo)
            probe = held_out_probe(split.held_out, self.catalogue, self.sids, train_settings, quality.ranking)
            better, dpo = align(model, self.tokenizer, pairs, train_settings, sequences=rows, probe=probe)
            after = evaluate_held_out(
                better, split.held_out, self.catalogue, self.sids, train_settings, quality.ranking
            )
            summary += f"; {len(pairs)} pairs, {dpo.steps} steps, HR@10 {after.hr10:.3f}, {dpo.stopped}"
            if not reason_to_refuse(after, quality.hr10, train_settings) and not dpo.failed(
                train_settings.dpo.max_drop
            ):
                self.version_count += 1
                candidates.append(ModelVersion(self.version_count, "dpo", better, model, quality.ranking))
        self.report_progress(summary)
        return candidates

    def cycle(self, seconds: float) -> dict[str, Any]:
        """Train, try, judge, promote; then tastes turn."""
        candidates = self.train(seconds)
        self.rankers.clear()
        if CHAMPION not in self.arms:
            self.arms = {CHAMPION: candidates[0]}
            self.weights = {CHAMPION: 1.0}
            self.rows_seen_by_champion = len(self.log.users)
            self.visit(SESSIONS_PER_LOOK)
            return self._row("start", "the first model is in service")
        names = [SFT, DPO][: len(candidates)]
        self.arms = {CHAMPION: self.arms[CHAMPION], **dict(zip(names, candidates, strict=True))}
        shares = np.array([ROLLOUT.champion, ROLLOUT.sft, ROLLOUT.dpo][: len(self.arms)])
        self.weights = dict(zip(self.arms, (shares / shares.sum()).tolist(), strict=True))
        self.outcome_sums.clear()
        bundles = {name: str(version.number) for name, version in self.arms.items()}
        read = len(self.log.users)
        for _ in range(LOOKS):
            self.visit(SESSIONS_PER_LOOK)
            by_arm: dict[str, list[np.ndarray]] = {name: [] for name in self.arms}
            for user, counts in self.outcome_sums.items():
                by_arm[self.arm_of(user)].append(counts)
            arms = {name: arm_sums(np.array(rows).reshape(-1, 3)) for name, rows in by_arm.items()}
            verdict = judge(arms, GATE, GATE.mode, self.weights, bundles)
            if verdict.verdict != "inconclusive":
                break
        all_true = {name: self.true_rates(version) for name, version in self.arms.items()}
        row = self._row(verdict.verdict, verdict.sentence) | {"arms": all_true}
        if verdict.verdict == "promote":
            self.arms[CHAMPION] = self.arms[verdict.winner]
            self.rows_seen_by_champion = read
        self.arms = {CHAMPION: self.arms[CHAMPION]}
        self.weights = {CHAMPION: 1.0}
        row["ctr"], row["cvr"] = self.true_rates(self.arms[CHAMPION])
        self._drift()
        return row

    def _row(self, did: str, sentence: str) -> dict[str, Any]:
        champion = self.arms[CHAMPION]
        ctr, cvr = self.true_rates(champion)
        return {"did": did, "sentence": sentence, "ctr": ctr, "cvr": cvr, "champion": champion.number}

    def true_rates(self, version: ModelVersion) -> tuple[float, float]:
        """True (CTR, CVR) of what a model shows to 2,000 shoppers, the same ones for every model."""
        random = np.random.default_rng([self.seed, 7])
        shoppers: list[Shopper] = [
            self.shoppers[int(i)] for i in random.choice(len(self.shoppers), JUDGING_SHOPPERS)
        ]
        triggers = [
            Trigger(schema_version=1, event_id="", ts=0, request_id="", user_id=shopper.user_id,
                    item_id=shopper.trigger(self.truth, random))
            for shopper in shoppers
        ]  # fmt: skip
        clicks = orders = shown = 0.0
        for shopper, trigger, rows in zip(shoppers, triggers, self.rank(version, triggers), strict=True):
            items = [self.catalogue.item_ids[row] for row in rows]
            chance = self.truth.click_probability(shopper.taste, items, trigger.item_id)
            clicks += float(chance.sum())
            orders += float((chance * self.truth.purchase_probability(shopper.taste, items)).sum())
            shown += len(items)
        return round(clicks / shown, 4), round(orders / clicks, 4)

    def _drift(self) -> None:
        for shopper in self.shoppers:
            noise = TASTE_DRIFT * self.random.standard_normal(len(shopper.taste)) / len(shopper.taste) ** 0.5
            moved = shopper.taste + noise
            shopper.taste = moved / np.linalg.norm(moved)
