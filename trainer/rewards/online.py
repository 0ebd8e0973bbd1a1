"""The online stage of Rewards-in-Context (Yang et al., ICML 2024, arXiv 2402.10207, section 3.2).

After SFT the model answers requests near the Pareto front: all rewards high but one, which is drawn. What it
answers is an item of the catalogue, so its price and its commission are known; the chances of a click and of
a purchase are calibrated (trainer.rewards.calibration). Answers are kept by multi-objective rejection, told
with the rewards that they bring and not with those that were asked for, and learned beside the log's own
sequences.

RiC keeps what is good in any reward. Alone, that keeps dear items that nobody would click: an answer must
also be as likely, with nothing asked for, as a quantile of what users went on to.
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
from registry.bundles.rewards import CLICK, COMMISSION, NAMES, PRICE, PURCHASE, Priced, Rewards
from trainer.generator.constrained import SidSet
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline.offpolicy import Explored
from trainer.offline.quality import Quality, evaluate
from trainer.offline.ranking import Ranker
from trainer.rewards.calibration import Chances, Floats, chances, rates
from trainer.rewards.labels import UNKNOWN, item_bins, labelled, obtained, tokens
from trainer.rewards.negative_feedback import shown
from trainer.sequences.batches import Int32, Int64, SequenceBatch
from trainer.sequences.labelled_answers import LabelledAnswers
from trainer.sequences.rows import TrainingRows
from trainer.tuning.checkpoint import restore, snapshot
from trainer.tuning.devices import device
from trainer.tuning.next_item import LogReplay, batch_loss, catalogue_table_rows
from trainer.tuning.optimization import ClippedAdamW, train_on_batches

# Clicks that the chance of a purchase is fitted to, the newest ones.
_CLICKS = 5000


@dataclass(frozen=True)
class Worth:
    """What a catalogue's items and a log's events bring, and how it is told."""

    rewards: Rewards
    context: Context
    offers: Sequence[Priced | None]
    bought: Int64  # (N,) as of trainer.rewards.purchased
    explored: Explored | None = None


@dataclass(frozen=True)
class Round:
    """What became of one round's requests."""

    asked: int
    likely: int  # answers above the floor
    kept: int
    followed: float  # share of the answers in the bins that were asked for


@dataclass
class OnlineResult:
    """What the stage did. `refused`: why its weights were put back; None: they are kept."""

    rounds: list[Round] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    quality: Quality | None = None
    refused: str | None = None

    def told(self) -> str:
        """The stage in a line."""
        if not self.rounds:
            return "left out: nobody has a history to ask after"
        last = self.rounds[-1]
        said = f"{last.kept:,} of {last.asked:,} answers kept, {last.followed:.0%} in the bins asked for"
        undone = f"; undone: {self.refused}" if self.refused else ""
        return f"{len(self.rounds)} round(s), {self.steps} steps, {said}{undone}"


def wishes(rewards: Rewards, count: int, rng: np.random.Generator) -> Int64:
    """(count, 4) values to ask for of each field of NAMES, all high but one, which is drawn; UNKNOWN: any.

    Nobody asks for what is not clicked: where there is another field, the click is never the one.
    """
    fields = [name for name in NAMES if name in rewards.mass]
    free = [name for name in fields if name != CLICK] or fields
    made = np.full((count, len(NAMES)), UNKNOWN, dtype=np.int64)
    for name in fields:
        made[:, NAMES.index(name)] = rewards.wanted({name: 1.0})[name]
    which = rng.integers(0, len(free), count)
    for at, name in enumerate(free):
        mine = np.flatnonzero(which == at)
        made[mine, NAMES.index(name)] = rng.choice(rewards.supported(name), len(mine))
    return made


def kept(values: Sequence[Floats], likely: npt.NDArray[np.bool_], quantile: float) -> npt.NDArray[np.bool_]:
    """(N,) which answers are kept: likely ones with a reward at its `quantile` of all, in any field.

    `values`: (N,) of each field, NaN where it is not known. A field that is the same for all says nothing.
    """
    good = np.zeros(len(likely), dtype=bool)
    for one in values:
        known = one[~np.isnan(one)]
        if len(known) and known.min() < known.max():
            good |= (one >= np.quantile(known, quantile)) & (one > known.min())
    return good & likely


class Stage:
    """The stage over one model, which learns in place."""

    def __init__(
        self, model: GeneratorForCausalLM, rows: TrainingRows, sids: SidSet, worth: Worth, dense_weight: float
    ) -> None:
        self.model, self.rows, self.sids, self.worth = model, rows, sids, worth
        self.weight = dense_weight
        self.settings = rows.settings
        self.bins = {name: item_bins(worth.rewards, name, worth.offers) for name in (PRICE, COMMISSION)}
        log = rows.log
        self.begin = np.repeat(log.starts[:-1], np.diff(log.starts))
        trained = np.arange(len(log)) < np.repeat(rows.split.training_ends, np.diff(log.starts))
        fresh = np.ones(len(log), dtype=bool)
        fresh[1:] = log.items[1:] != log.items[:-1]
        self.asked_of = np.flatnonzero(trained & fresh & (np.arange(len(log)) > self.begin))

    def histories(self, at: Int64) -> list[Int64]:
        """What users did before the log's rows (N,), the newest `max_items`."""
        size, begin = self.settings.max_items, self.begin
        return [self.rows.log.items[max(begin[row], row - size) : row] for row in at.tolist()]

    def ranker(self) -> Ranker:
        """Of the weights of this moment."""
        return Ranker(self.model, self.rows.catalogue.codes, self.sids, max(self.settings.beam, 10))

    def said(self, context: Int32, values: Int64 | None = None) -> Int32:
        """(N, C + R) token ids: what was said (N, C), and what is asked for (N, 4); None: nothing."""
        none = np.full((len(context), len(NAMES)), UNKNOWN, dtype=np.int64)
        wanted = tokens(none if values is None else values, self.worth.rewards, self.worth.context)
        return np.concatenate((context, wanted), axis=1)

    def chances(self, ranker: Ranker) -> Chances:
        """The chances of the model of this moment."""
        log, logged = self.rows.log, self.worth.explored
        seen, outcomes = np.zeros(0), np.zeros(0, dtype=np.int64)
        if logged is not None:
            histories, targets, at = shown(logged, self.rows.catalogue)
            context = logged.contexts[at, : log.context.shape[1]]
            states = ranker.states(histories, self.said(context))
            seen = ranker.scores(histories, states, targets, self.weight).double().numpy()
            outcomes = logged.reward[at].astype(np.int64)
        clicks = np.flatnonzero(~log.bought & (self.worth.bought != UNKNOWN))
        known = rates(log.items[clicks], self.worth.bought[clicks], len(self.rows.catalogue.item_ids))
        newest = clicks[np.isin(clicks, self.asked_of)]
        newest = newest[np.argsort(log.ts[newest], kind="stable")][-_CLICKS:]
        scores = self.scores(ranker, newest, log.items[newest])
        led = log.items[newest], scores, self.worth.bought[newest]
        return chances(known, (seen, outcomes), led, self.settings.rewards.min_count)

    def scores(self, ranker: Ranker, at: Int64, items: Int64) -> Floats:
        """(N,) how likely items are after what the log's rows had before them, with nothing asked for."""
        histories = self.histories(at)
        states = ranker.states(histories, self.said(self.rows.log.context[at]))
        return ranker.scores(histories, states, items, self.weight).double().numpy()

    def answered(self, ranker: Ranker, at: Int64, wanted: Int64, rng: np.random.Generator) -> Int64:
        """(N,) an item for each request, drawn from the softmax over the candidates under what is asked."""
        histories = self.histories(at)
        states = ranker.states(histories, self.said(self.rows.log.context[at], wanted))
        found = ranker.candidates(histories, states)
        items, score = found.items.numpy(), found.score(self.weight).double().numpy()
        pages = np.array([history[-1] for history in histories])
        score = np.where(items == pages[:, None], -np.inf, score) / self.settings.rewards.online.temperature
        # The largest of scores with Gumbel noise is a draw from their softmax.
        best = (score + rng.gumbel(size=score.shape)).argmax(1)
        return np.take_along_axis(items, best[:, None], 1)[:, 0]

    def round(self, number: int) -> tuple[Round, LabelledAnswers]:
        """Ask, answer, score, reject, and tell what was kept with what it brings."""
        online, worth = self.settings.rewards.online, self.worth
        rng = np.random.default_rng((self.settings.seed, number, 7))
        at = rng.choice(self.asked_of, min(online.requests, len(self.asked_of)), replace=False)
        wanted = wishes(worth.rewards, len(at), rng)
        ranker = self.ranker()
        items = self.answered(ranker, at, wanted, rng)
        known = self.chances(ranker)
        scores = self.scores(ranker, at, items)
        floor = np.quantile(self.scores(ranker, at, self.rows.log.items[at]), online.floor)
        clicked, sold = known.click(scores), known.purchase(items, scores)
        values = obtained(worth.rewards, worth.offers, items, np.full(len(at), UNKNOWN))
        measured = [np.where(bins[items] < 0, np.nan, bins[items]) for bins in self.bins.values()]
        some = kept([*measured, *(one for one in (clicked, sold) if one is not None)], scores >= floor,
                    online.quantile)  # fmt: skip
        # What a click and a purchase mean is that they happened: drawn with their chance, not rounded.
        happened = rng.random((2, len(at)))
        click, purchase = NAMES.index(CLICK), NAMES.index(PURCHASE)
        values[:, click] = UNKNOWN if clicked is None else happened[0] < clicked
        if sold is not None:
            values[:, purchase] = (happened[1] < sold) & (values[:, click] != 0)
        of_items = [NAMES.index(PRICE), NAMES.index(COMMISSION)]
        about = wanted[:, of_items] != UNKNOWN
        followed = (values[:, of_items] == wanted[:, of_items])[about].mean() if about.any() else 0.0
        keep = np.flatnonzero(some)
        histories = self.histories(at[keep])
        context = self.rows.log.context[at[keep]]
        lessons = labelled(histories, items[keep], context, values[keep], worth.rewards, worth.context)
        told = Round(len(at), int((scores >= floor).sum()), len(keep), float(followed))
        return told, lessons.of_items(self.rows.trained_items)

    def learn(self, lessons: LabelledAnswers, number: int, stop: Callable[[], bool]) -> int:
        """Steps over the kept answers, each beside a batch of the log; how many were made."""
        online, model = self.settings.rewards.online, self.model
        optimizer = ClippedAdamW(model.parameters(), lr=online.lr, weight_decay=self.settings.weight_decay)
        table, scored = catalogue_table_rows(model, self.rows)
        replay = LogReplay(model, self.rows)

        def loss_of(batch: SequenceBatch) -> Tensor:
            return batch_loss(model, batch, [], table, scored, self.settings) + replay.loss(model)

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


def refine(
    model: GeneratorForCausalLM, rows: TrainingRows, sids: SidSet, worth: Worth, before: Quality | None,
    progress: Callable[[str], None], stop: Callable[[], bool] | None = None,
) -> OnlineResult:  # fmt: skip
    """The stage's rounds over `model`, in place; undone where held-out users would be served worse.

    `before`: the quality that SFT left, whose ranking mixes the heads; None: nobody is held out. Raises
    ValueError where no reward can be asked for.
    """
    if not worth.rewards.mass:
        raise ValueError("no reward can be asked for: there is nothing to learn from answers")
    settings, result, began = rows.settings, OnlineResult(), time.monotonic()
    online, ranking = settings.rewards.online, before.ranking if before else Ranking()
    model.to(device())
    weights = snapshot(model)
    stage = Stage(model, rows, sids, worth, ranking.dense_weight)
    for number in range(online.rounds if len(stage.asked_of) else 0):
        made, lessons = stage.round(number)
        result.rounds.append(made)
        progress(f"round {number + 1}: {made.kept:,} of {made.asked:,} answers kept")
        result.steps += stage.learn(lessons, number, stop or (lambda: False))
    if before is not None and result.steps:
        result.quality = evaluate(model, rows.split.held_out, rows.catalogue, sids, settings, ranking)
        if result.quality.hr10 < (1 - online.max_fall) * before.hr10:
            result.refused = f"HR@10 fell from {before.hr10:.3f} to {result.quality.hr10:.3f}"
            restore(model, weights)
    model.to("cpu").eval()
    result.seconds = time.monotonic() - began
    return result
