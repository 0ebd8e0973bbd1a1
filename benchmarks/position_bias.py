"""What pairs may reject where shoppers leave a page early.

    python -m benchmarks.position_bias --publish

A shop of the most sold items of Online Retail, whose shoppers look at the next place of a page with a chance
of .6 only (`shoppers.click_position`). One fine-tuned model a seed answers their visits; from these come
pairs by three rules of what was looked at: every place that was shown, the places above the lowest click or
purchase (the agents' rule), and the places that the simulated shopper truly looked at, which no shop knows.
From the one model each rule gives an aligned one, by as many pairs and steps. Judged by the true chances of
clicks and orders of the lists that each shows, at the same pages: orders a page, CTR and CVR, relative to the
fine-tuned model; means over seeds with 95 % intervals of Student's t. All trainings are counted in passes,
none in seconds.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from agents.attribution.pairs import (
    ExaminedPlaces,
    OpenPairWindows,
    PairDecision,
    PairRules,
    places_above_lowest_response,
)
from agents.attribution.window_stage import WindowRules
from benchmarks.results import RESULTS, line, markdown_table, put_table, report_progress, write_lines
from registry.bundles.embedder import title_vectors
from registry.bundles.prompt import Prompt
from registry.hold_out import HoldOut
from registry.settings import CodebookSettings
from streams.events import Event, Impression, PreferencePair, RankedItem, Recommendation, Trigger
from streams.replay import EventSource, source_of
from streams.settings import ShoppersSettings
from streams.simulation.shoppers import Shopper, Truth, Vector, population
from streams.simulation.shopping import ShoppingTrip
from trainer.alignment.dpo import align
from trainer.alignment.rows import preference_rows
from trainer.codebooks.fit import assign_keeping, fit_codebook_to_vectors
from trainer.generator.build import fresh_generator
from trainer.generator.constrained import SidSet
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.ranking import CatalogueRanker
from trainer.sequences.held_out import split_log
from trainer.sequences.interactions import training_catalogue, user_sequences
from trainer.sequences.rows import TrainingRows
from trainer.sequences.tokenizer import build_tokenizer
from trainer.settings import TrainerSettings
from trainer.tuning.sft import train

BEGIN, END = "<!-- position-bias -->\n", "<!-- end -->\n"
DATASET = "simulated shoppers of UCI Online Retail's most sold items"
CLAIM = "what pairs may reject where shoppers leave a page early"
TUNED = "fine-tuned"
SHOWN_ITEMS = 10
CODEBOOK_ID = "codebook"
# Longer than a visit takes; no purchase of one visit lies in the window of another that matters.
WINDOW_MS = 3_600_000
RULES = WindowRules(WINDOW_MS, 0)
METRICS = ("orders a page", "CTR", "CVR")


class ObservedTruth(Truth):
    """A truth that keeps how many places each visit looked at, in the order of visits."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.examined: list[int] = []

    def examined_places(self, places: int, rng: np.random.Generator) -> int:
        """As every truth, and kept."""
        examined = super().examined_places(places, rng)
        self.examined.append(examined)
        return examined


@dataclass(frozen=True)
class TrueRates:
    """What a model's lists truly bring."""

    orders: float  # a page
    ctr: float
    cvr: float

    def relative_to(self, other: TrueRates) -> dict[str, float]:
        """The relative change of each metric."""
        return {
            "orders a page": self.orders / other.orders - 1,
            "CTR": self.ctr / other.ctr - 1,
            "CVR": self.cvr / other.cvr - 1,
        }


class SteepShop:
    """The shop of one seed: items, shoppers with their pasts, and the visits to one model's lists."""

    def __init__(
        self, seed: int, source: EventSource, items: int, click_position: float, settings: TrainerSettings
    ) -> None:
        self.settings = settings.model_copy(update={"seed": seed})
        self.shoppers_settings = ShoppersSettings.model_validate(
            {"seed": seed, "click_position": click_position, "k": SHOWN_ITEMS}
        )
        events = [(str(e.user_id), str(e.item_id), e.ts) for e in source.events()]  # type: ignore[attr-defined]
        sold = {item for item, _ in Counter(item for _, item, _ in events).most_common(items)}
        self.events = [event for event in events if event[1] in sold]
        records = sorted((r for r in source.catalogue() if r.item_id in sold), key=lambda r: r.item_id)
        titles = {record.item_id: record.title for record in records}
        self.text_vectors = title_vectors(list(titles.values()))
        codebook = fit_codebook_to_vectors(
            self.text_vectors, CODEBOOK_ID, CodebookSettings.model_validate({"collaborative": 0.0}), 0
        )
        sids = assign_keeping(codebook, self.text_vectors, [None] * len(titles))
        self.prompt = Prompt(codebook.sizes, settings.max_items)
        self.catalogue = training_catalogue(dict(zip(titles, sids, strict=True)), titles, self.prompt)
        self.row_of = {name: at for at, name in enumerate(self.catalogue.item_ids)}
        self.sids = SidSet(self.catalogue.sids, self.prompt)
        self.tokenizer = build_tokenizer(self.prompt, self.catalogue.titles, settings.max_words)
        self.pasts: dict[str, list[str]] = defaultdict(list)
        for user, item, _ in sorted(self.events, key=lambda event: event[2]):
            self.pasts[user].append(item)
        self.truth = ObservedTruth(records, self.shoppers_settings)
        self.shoppers = population(self.truth, self.pasts)
        self.now = max(ts for _, _, ts in self.events) + WINDOW_MS

    def fine_tune(self) -> tuple[GeneratorForCausalLM, TrainingRows]:
        """The model that all others are aligned from, and the rows that it learned."""
        users, items, ts = zip(*self.events, strict=True)
        log = user_sequences(users, ts, items, self.catalogue, np.ones(len(ts), np.bool_), [True] * len(ts))
        split = split_log(log, HoldOut(share=self.settings.validation_share), self.settings)
        rows = TrainingRows(split, self.catalogue, self.tokenizer, self.prompt, self.settings)
        model = fresh_generator(
            self.catalogue, self.text_vectors, self.prompt, len(self.tokenizer), self.settings
        )
        train(model, rows, self.sids, self.settings)
        return model, rows

    def lists(self, model: GeneratorForCausalLM, visits: Sequence[tuple[str, str]]) -> list[list[str]]:
        """The ten best items by the dense head for each (user, item of the page), without that item."""
        ranker = CatalogueRanker(model, self.catalogue.codes, self.sids, 2 * SHOWN_ITEMS)
        pasts = [
            np.array([self.row_of[item] for item in [*self.pasts[user][1 - self.prompt.max_items :], page]])
            for user, page in visits
        ]
        best = ranker.best_items(pasts, ranker.states(pasts), SHOWN_ITEMS + 1)
        named = ([self.catalogue.item_ids[row] for row in rows if row >= 0] for rows in best.tolist())
        return [
            [item for item in items if item != page][:SHOWN_ITEMS]
            for items, (_, page) in zip(named, visits, strict=True)
        ]

    def visits(self, model: GeneratorForCausalLM, sessions: int) -> tuple[list[Event], dict[str, int]]:
        """The events of sessions on the model's lists, and how many places of each request were looked at."""
        client = _ListClient(lambda asked: self.lists(model, asked))
        self.truth.examined.clear()
        ShoppingTrip(client, self.truth, self.shoppers, self.shoppers_settings, self.now).run(sessions, {})
        shown = sorted((e for e in client.events if isinstance(e, Impression)), key=lambda event: event.ts)
        requests = [event.request_id or "" for event in shown]
        return client.events, dict(zip(requests, self.truth.examined, strict=True))

    def pairs(self, events: Sequence[Event], examined: ExaminedPlaces) -> list[PreferencePair]:
        """The pairs of the events, as the agents decide them when all windows are closed."""
        windows: dict[str, OpenPairWindows] = defaultdict(OpenPairWindows)
        for event in events:
            windows[event.user_id].add_event(event, RULES, None)  # type: ignore[attr-defined, arg-type]
        end = max(event.ts for event in events) + 2 * WINDOW_MS
        rules = PairRules(RULES, SHOWN_ITEMS, self.row_of.__contains__, examined)
        return [
            self._pair(user, decision)
            for user, state in windows.items()
            for decision in state.close_due(end, rules)
        ]

    def _pair(self, user: str, decision: PairDecision) -> PreferencePair:
        def sid(item: str) -> list[int]:
            return list(self.catalogue.sids[self.row_of[item]])

        return PreferencePair(
            schema_version=1,
            event_id=f"{decision.request_id}-{decision.scheme}-{decision.chosen}", ts=decision.ts,
            user_id=user, scheme=decision.scheme, codebook=CODEBOOK_ID, chosen_item=decision.chosen,
            chosen=sid(decision.chosen), rejected_items=list(decision.rejected),
            rejected=[sid(item) for item in decision.rejected],
            history=[sid(item) for item in self.pasts[user][-self.prompt.max_items :]],
            trigger=None if decision.trigger is None else sid(decision.trigger),
        )  # fmt: skip

    def true_rates(self, model: GeneratorForCausalLM, pages: int) -> TrueRates:
        """What the model's lists bring on pages that are the same for every model of the seed."""
        random = np.random.default_rng([self.settings.seed, pages])
        chosen: list[Shopper] = [self.shoppers[int(i)] for i in random.choice(len(self.shoppers), pages)]
        visits = [(shopper.user_id, shopper.trigger(self.truth, random)) for shopper in chosen]
        clicks = orders = shown = 0.0
        for shopper, (_, page), items in zip(chosen, visits, self.lists(model, visits), strict=True):
            chance: Vector = self.truth.click_probability(shopper.taste, items, page)
            clicks += float(chance.sum())
            bought = self.truth.purchase_probability(shopper.taste, shopper.purchase_taste, items)
            orders += float((chance * bought).sum())
            shown += len(items)
        return TrueRates(orders / pages, clicks / shown, orders / clicks)


class _ListClient:
    """A client of the shopping loop that answers a batch of triggers at its first result."""

    def __init__(self, lists: Callable[[Sequence[tuple[str, str]]], list[list[str]]]) -> None:
        self._lists = lists
        self._waiting: list[tuple[Trigger, Future[Recommendation]]] = []
        self.events: list[Event] = []

    def submit(self, trigger: Trigger, timeout: float = 0.0) -> Future[Recommendation]:
        """A future that is resolved with its whole batch."""
        answer = _BatchFuture(self._answer)
        self._waiting.append((trigger, answer))
        return answer

    def publish_all(self, events: Iterable[Event], on_progress: Callable[[int], Any] | None = None) -> int:
        """Keep the events."""
        new = list(events)
        self.events += new
        return len(new)

    def _answer(self) -> None:
        waiting, self._waiting = self._waiting, []
        lists = self._lists([(trigger.user_id, trigger.item_id or "") for trigger, _ in waiting])
        for (trigger, answer), items in zip(waiting, lists, strict=True):
            ranked = [RankedItem(item, [], -float(place)) for place, item in enumerate(items)]
            reply = Recommendation.new(
                request_id=trigger.request_id, user_id=trigger.user_id, ts=trigger.ts, items=ranked,
                trigger_item_id=trigger.item_id,
            )  # fmt: skip
            self.events.append(reply)
            answer.set_result(reply)


class _BatchFuture(Future[Recommendation]):
    def __init__(self, resolve: Callable[[], None]) -> None:
        super().__init__()
        self._resolve = resolve

    def result(self, timeout: float | None = None) -> Recommendation:
        if not self.done():
            self._resolve()
        return super().result(timeout)


def examination_rules(examined: dict[str, int]) -> dict[str, ExaminedPlaces]:
    """The compared rules; `examined`: how many places of each request were truly looked at."""

    def all_shown(request_id: str, shown: Sequence[str], responded: Collection[str]) -> int:
        return len(shown)

    def truly_examined(request_id: str, shown: Sequence[str], responded: Collection[str]) -> int:
        return examined[request_id]

    return {
        "everything shown": all_shown,
        "passed over, above the lowest click or purchase": places_above_lowest_response,
        "passed over, of what was truly looked at": truly_examined,
    }


def run_seed(seed: int, options: argparse.Namespace, settings: TrainerSettings) -> list[dict[str, Any]]:
    """The lines of one seed: every rule's change of every metric, relative to the fine-tuned model."""
    shop = SteepShop(seed, source_of("online-retail"), options.items, options.click_position, settings)
    model, rows = shop.fine_tune()
    before = shop.true_rates(model, options.pages)
    report_progress(f"seed {seed}, {TUNED}: {before}")
    events, examined = shop.visits(model, options.sessions)
    pairs_by_rule = {name: shop.pairs(events, rule) for name, rule in examination_rules(examined).items()}
    # As many pairs by every rule: what differs is what they reject, not how long is learned.
    usable = [sum(pair.scheme in settings.dpo.schemes for pair in pairs) for pairs in pairs_by_rule.values()]
    dpo = settings.dpo.model_copy(update={"max_pairs": min(usable)})
    aligned_settings = shop.settings.model_copy(update={"dpo": dpo})
    lines = []
    for name, pairs in pairs_by_rule.items():
        preferences = preference_rows(pairs, CODEBOOK_ID, shop.prompt, dpo)
        aligned, result = align(model, shop.tokenizer, preferences, aligned_settings, sequences=rows)
        after = shop.true_rates(aligned, options.pages)
        report_progress(f"seed {seed}, {name}: {len(preferences)} pairs, {result.steps} steps, {after}")
        lines += [
            line(
                CLAIM, DATASET, name,
                f"{metric}, relative change to the fine-tuned model", round(change, 4), seed,
                command(options),
            )
            | {"pairs": len(preferences), "steps": result.steps, "rate": metric}
            for metric, change in after.relative_to(before).items()
        ]  # fmt: skip
    return lines


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A row for each rule: the mean over seeds of each metric's change, with its interval."""
    rows = []
    for name in dict.fromkeys(row["model"] for row in lines):
        cells = [
            _mean_cell([row["value"] for row in lines if row["model"] == name and row["rate"] == metric])
            for metric in METRICS
        ]
        rows.append([name, *cells])
    return markdown_table(["rejected", *METRICS], rows)


def _mean_cell(values: Sequence[float]) -> str:
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:+.1%}"
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return f"{mean:+.1%} ({mean - half:+.1%} to {mean + half:+.1%})"


def command(options: argparse.Namespace) -> str:
    """The command line that measures the same."""
    names = ("seeds", "items", "sessions", "pages", "epochs", "width", "click_position")
    given = (f"--{name.replace('_', '-')} {getattr(options, name)}" for name in names)
    return " ".join(["python -m benchmarks.position_bias", *given])


def trainer_settings(options: argparse.Namespace) -> TrainerSettings:
    """Small models that are trained by passes, without rewards and without limits of time."""
    return TrainerSettings.model_validate({
        "width": options.width, "layers": 1, "heads": 2, "max_items": 12, "epochs": options.epochs,
        "max_seconds": None, "rewards": {"enabled": False},
        "dpo": {"max_seconds": None, "probe_users": 0, "max_items": 12},
    })  # fmt: skip


def main() -> None:
    """Measure every rule with every seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--items", type=int, default=500, help="of the shop, the most sold ones")
    parser.add_argument("--sessions", type=int, default=6000, help="visits that pairs are made of")
    parser.add_argument("--pages", type=int, default=1500, help="on which every model is judged")
    parser.add_argument("--epochs", type=int, default=2, help="of the fine-tuning")
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--click-position", type=float, default=0.6)
    parser.add_argument("--publish", action="store_true", help="put the table into docs/results")
    options = parser.parse_args()
    settings = trainer_settings(options)
    lines: list[dict[str, Any]] = []
    for seed in range(1, options.seeds + 1):
        new = run_seed(seed, options, settings)
        for figure in new:
            print(json.dumps(figure), flush=True)
        lines += new
    if options.publish:
        write_lines(RESULTS / "position-bias.jsonl", lines)
        put_table(RESULTS / "position-bias.md", BEGIN, END, table(lines))
    report_progress("\n".join(table(lines)))


if __name__ == "__main__":
    main()
