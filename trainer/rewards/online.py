"""The online stage of Rewards-in-Context (Yang et al., ICML 2024, arXiv 2402.10207, section 3.2).

After SFT the model answers requests near the Pareto front: all rewards high but one, which is drawn. An
answer is an item of the catalogue, so its price and its commission are known; the probabilities of a click
and of a purchase are calibrated (trainer.rewards.calibration). Answers are kept by multi-objective
rejection, labelled with the rewards that they have and not with those of the request, and learned together
with the log's own sequences.

RiC keeps an answer that is good in any reward. That alone would keep expensive items that no user would
click. So an answer must also be as likely, without requested rewards, as a quantile of the users' own next
items.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from registry.bundles.context import Context
from registry.bundles.ranking import Ranking
from registry.bundles.rewards import CLICK, COMMISSION, PRICE, PURCHASE, REWARD_NAMES, HasPrice, Rewards
from trainer.generator.constrained import SidSet
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.offpolicy import LoggedExplorations
from trainer.offline_checks.quality import HeldOutQuality, evaluate_held_out
from trainer.offline_checks.ranking import CatalogueRanker
from trainer.rewards.calibration import CalibratedChances, Floats, calibrate_chances, purchase_rates
from trainer.rewards.labels import UNKNOWN, answers_with_rewards, item_bins, reward_tokens, reward_values
from trainer.rewards.negative_feedback import explored_items
from trainer.sequences.batches import Int32, Int64, SequenceBatch
from trainer.sequences.labelled_answers import LabelledAnswers
from trainer.sequences.rows import TrainingRows
from trainer.tuning.checkpoint import restore, snapshot
from trainer.tuning.devices import device
from trainer.tuning.next_item import LogReplay, batch_loss, catalogue_table_rows, smoothing_tree
from trainer.tuning.optimization import ClippedAdamW, train_on_batches

# Clicks that the chance of a purchase is fitted to, the newest ones.
_CALIBRATION_CLICKS = 5000


@dataclass(frozen=True)
class RewardEvidence:
    """The rewards of a catalogue's items and of a log's events, and their tokens."""

    rewards: Rewards
    context: Context
    offers: Sequence[HasPrice | None]
    purchases: Int64  # (N,) as of trainer.rewards.labels.purchase_labels
    explorations: LoggedExplorations | None = None


@dataclass(frozen=True)
class RoundOutcome:
    """The counts of one round's requests and answers."""

    asked: int
    likely: int  # answers above the floor
    kept: int
    followed: float  # share of the answers in the bins that were asked for


@dataclass
class OnlineResult:
    """The outcome of the stage. `refused`: why its weights were undone; None: they are kept."""

    rounds: list[RoundOutcome] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    quality: HeldOutQuality | None = None
    refused: str | None = None

    def summary(self) -> str:
        """The stage in a line."""
        if not self.rounds:
            return "left out: nobody has a history to ask after"
        last = self.rounds[-1]
        kept_share = (
            f"{last.kept:,} of {last.asked:,} answers kept, {last.followed:.0%} in the bins asked for"
        )
        undone = f"; undone: {self.refused}" if self.refused else ""
        return f"{len(self.rounds)} round(s), {self.steps} steps, {kept_share}{undone}"


def reward_requests(rewards: Rewards, count: int, rng: np.random.Generator) -> Int64:
    """Requested values (count, 4) of each field of NAMES: all high but one, which is drawn; UNKNOWN: any.

    The drawn field is the click only where there is no other: no request is for items that are not clicked.
    """
    fields = [name for name in REWARD_NAMES if name in rewards.mass]
    drawable = [name for name in fields if name != CLICK] or fields
    requests = np.full((count, len(REWARD_NAMES)), UNKNOWN, dtype=np.int64)
    for name in fields:
        requests[:, REWARD_NAMES.index(name)] = rewards.requested_rewards({name: 1.0})[name]
    which = rng.integers(0, len(drawable), count)
    for at, name in enumerate(drawable):
        rows = np.flatnonzero(which == at)
        requests[rows, REWARD_NAMES.index(name)] = rng.choice(rewards.supported_values(name), len(rows))
    return requests


def passing_answers(
    values: Sequence[Floats], likely: npt.NDArray[np.bool_], quantile: float
) -> npt.NDArray[np.bool_]:
    """Which answers (N,) bool are kept: likely ones that reach the `quantile` of all answers in any field.

    `values`: (N,) for each field, NaN where it is not known. A field with one value for all is not counted.
    """
    passing = np.zeros(len(likely), dtype=bool)
    for field_values in values:
        known_values = field_values[~np.isnan(field_values)]
        if len(known_values) and known_values.min() < known_values.max():
            passing |= (field_values >= np.quantile(known_values, quantile)) & (
                field_values > known_values.min()
            )
    return passing & likely


class OnlineStage:
    """The rounds of the stage over one model, whose weights change in place."""

    def __init__(
        self,
        model: GeneratorForCausalLM,
        rows: TrainingRows,
        sids: SidSet,
        evidence: RewardEvidence,
        dense_weight: float,
    ) -> None:
        self.model, self.rows, self.sids, self.evidence = model, rows, sids, evidence
        self.dense_weight = dense_weight
        self.settings = rows.settings
        self.bins = {name: item_bins(evidence.rewards, name, evidence.offers) for name in (PRICE, COMMISSION)}
        log = rows.log
        self.sequence_starts = np.repeat(log.starts[:-1], np.diff(log.starts))
        fresh = np.ones(len(log), dtype=bool)
        fresh[1:] = log.items[1:] != log.items[:-1]
        self.request_rows = np.flatnonzero(fresh & (np.arange(len(log)) > self.sequence_starts))

    def histories(self, at: Int64) -> list[Int64]:
        """The users' histories before the log's rows (N,): the newest `max_items` items."""
        size, begin = self.settings.max_items, self.sequence_starts
        return [self.rows.log.items[max(begin[row], row - size) : row] for row in at.tolist()]

    def ranker(self) -> CatalogueRanker:
        """A ranker with the current weights."""
        catalogue = self.rows.catalogue
        return CatalogueRanker(self.model, catalogue.codes, self.sids, max(catalogue.limits.beam, 10))

    def context_tokens(self, context: Int32, values: Int64 | None = None) -> Int32:
        """Token ids (N, C + R) of context fields (N, C) and of requested rewards (N, 4), None: no request."""
        unknown = np.full((len(context), len(REWARD_NAMES)), UNKNOWN, dtype=np.int64)
        reward_labels = reward_tokens(
            unknown if values is None else values, self.evidence.rewards, self.evidence.context
        )
        return np.concatenate((context, reward_labels), axis=1)

    def calibrated_chances(self, ranker: CatalogueRanker) -> CalibratedChances:
        """The calibrated chances of a click and a purchase under the current weights."""
        log, logged = self.rows.log, self.evidence.explorations
        explored_scores, outcomes = np.zeros(0), np.zeros(0, dtype=np.int64)
        if logged is not None:
            histories, targets, at = explored_items(logged, self.rows.catalogue)
            context = logged.contexts[at, : log.context.shape[1]]
            states = ranker.states(histories, self.context_tokens(context))
            explored_scores = ranker.scores(histories, states, targets, self.dense_weight).double().numpy()
            outcomes = logged.reward[at].astype(np.int64)
        clicks = np.flatnonzero(~log.bought & (self.evidence.purchases != UNKNOWN))
        item_rates = purchase_rates(
            log.items[clicks], self.evidence.purchases[clicks], len(self.rows.catalogue.item_ids)
        )
        newest = clicks[np.isin(clicks, self.request_rows)]
        newest = newest[np.argsort(log.ts[newest], kind="stable")][-_CALIBRATION_CLICKS:]
        scores = self.scores(ranker, newest, log.items[newest])
        clicked = log.items[newest], scores, self.evidence.purchases[newest]
        return calibrate_chances(
            item_rates, (explored_scores, outcomes), clicked, self.settings.rewards.min_count
        )

    def scores(self, ranker: CatalogueRanker, at: Int64, items: Int64) -> Floats:
        """Log-probabilities (N,) of items after the histories of rows of the log, without a request."""
        histories = self.histories(at)
        states = ranker.states(histories, self.context_tokens(self.rows.log.context[at]))
        return ranker.scores(histories, states, items, self.dense_weight).double().numpy()

    def draw_answers(
        self, ranker: CatalogueRanker, at: Int64, requests: Int64, rng: np.random.Generator
    ) -> Int64:
        """An item (N,) for each request, drawn from the softmax over the candidates under that request."""
        histories = self.histories(at)
        states = ranker.states(histories, self.context_tokens(self.rows.log.context[at], requests))
        candidates = ranker.candidates(histories, states)
        items, score = candidates.items.numpy(), candidates.score(self.dense_weight).double().numpy()
        pages = np.array([history[-1] for history in histories])
        score = np.where(items == pages[:, None], -np.inf, score) / self.settings.rewards.online.temperature
        # The largest of scores with Gumbel noise is a draw from their softmax.
        best = (score + rng.gumbel(size=score.shape)).argmax(1)
        return np.take_along_axis(items, best[:, None], 1)[:, 0]

    def collect_answers(self, number: int) -> tuple[RoundOutcome, LabelledAnswers]:
        """Draw requests and answers, reject some, and label the kept answers with their rewards."""
        online, evidence = self.settings.rewards.online, self.evidence
        rng = np.random.default_rng((self.settings.seed, number, 7))
        at = rng.choice(self.request_rows, min(online.requests, len(self.request_rows)), replace=False)
        requests = reward_requests(evidence.rewards, len(at), rng)
        ranker = self.ranker()
        items = self.draw_answers(ranker, at, requests, rng)
        chances = self.calibrated_chances(ranker)
        scores = self.scores(ranker, at, items)
        floor = np.quantile(self.scores(ranker, at, self.rows.log.items[at]), online.floor)
        click_chance, purchase_chance = chances.click(scores), chances.purchase(items, scores)
        values = reward_values(evidence.rewards, evidence.offers, items, np.full(len(at), UNKNOWN))
        measured = [np.where(bins[items] < 0, np.nan, bins[items]) for bins in self.bins.values()]
        chances_of_fields = [values for values in (click_chance, purchase_chance) if values is not None]
        passing = passing_answers([*measured, *chances_of_fields], scores >= floor, online.quantile)
        # A click and a purchase are events: their values are drawn by their probability, not rounded.
        happened = rng.random((2, len(at)))
        click, purchase = REWARD_NAMES.index(CLICK), REWARD_NAMES.index(PURCHASE)
        values[:, click] = UNKNOWN if click_chance is None else happened[0] < click_chance
        if purchase_chance is not None:
            values[:, purchase] = (happened[1] < purchase_chance) & (values[:, click] != 0)
        of_items = [REWARD_NAMES.index(PRICE), REWARD_NAMES.index(COMMISSION)]
        about = requests[:, of_items] != UNKNOWN
        followed = (values[:, of_items] == requests[:, of_items])[about].mean() if about.any() else 0.0
        keep = np.flatnonzero(passing)
        histories = self.histories(at[keep])
        context = self.rows.log.context[at[keep]]
        lessons = answers_with_rewards(
            histories, items[keep], context, values[keep], evidence.rewards, evidence.context
        )
        outcome = RoundOutcome(len(at), int((scores >= floor).sum()), len(keep), float(followed))
        return outcome, lessons.of_items(self.rows.trained_items)

    def learn(self, lessons: LabelledAnswers, number: int, stop: Callable[[], bool]) -> int:
        """Train on the kept answers, each step with a batch of the log, too; the number of steps."""
        online, model = self.settings.rewards.online, self.model
        optimizer = ClippedAdamW(model.parameters(), lr=online.lr, weight_decay=self.settings.weight_decay)
        table, scored = catalogue_table_rows(model, self.rows)
        tree = smoothing_tree(model, self.settings)
        replay = LogReplay(self.rows)

        def loss_of(batch: SequenceBatch) -> Tensor:
            return batch_loss(model, batch, [], table, scored, self.settings, tree) + replay.loss(model)

        model.train()
        torch.manual_seed(self.settings.seed + number)
        batches = islice(self._endless_batches(lessons), online.steps)
        steps, _ = train_on_batches(optimizer, batches, loss_of, stop=stop)
        model.eval()
        return steps

    def _endless_batches(self, lessons: LabelledAnswers) -> Iterator[SequenceBatch]:
        """The batches of one epoch after another; none where an epoch is empty."""
        for epoch in count():
            batches = lessons.sequence_batches(self.settings, epoch)
            if not batches:
                return
            yield from reversed(batches)


def learn_from_own_answers(
    model: GeneratorForCausalLM, rows: TrainingRows, sids: SidSet, evidence: RewardEvidence,
    before: HeldOutQuality | None, progress: Callable[[str], None], stop: Callable[[], bool] | None = None,
) -> OnlineResult:  # fmt: skip
    """Run the stage's rounds over `model`, in place; undone where HR@10 of held-out users falls too far.

    `before`: the quality after SFT, whose ranking mixes the heads; None: no users are held out. Raises
    ValueError where there is no reward field.
    """
    if not evidence.rewards.mass:
        raise ValueError("no reward can be asked for: there is nothing to learn from answers")
    settings, result, started_at = rows.settings, OnlineResult(), time.monotonic()
    online, ranking = settings.rewards.online, before.ranking if before else Ranking()
    model.to(device())
    weights = snapshot(model)
    stage = OnlineStage(model, rows, sids, evidence, ranking.dense_weight)
    for number in range(online.rounds if len(stage.request_rows) else 0):
        outcome, lessons = stage.collect_answers(number)
        result.rounds.append(outcome)
        progress(f"round {number + 1}: {outcome.kept:,} of {outcome.asked:,} answers kept")
        result.steps += stage.learn(lessons, number, stop or (lambda: False))
    if before is not None and result.steps:
        result.quality = evaluate_held_out(model, rows.split.held_out, rows.catalogue, sids, ranking)
        if result.quality.hr10 < (1 - online.max_fall) * before.hr10:
            result.refused = f"HR@10 fell from {before.hr10:.3f} to {result.quality.hr10:.3f}"
            restore(model, weights)
    model.to("cpu").eval()
    result.seconds = time.monotonic() - started_at
    return result
