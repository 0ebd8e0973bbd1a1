"""Supervised fine-tuning: the next SID at every position, and texts, in a time budget, resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from registry.ranking import Ranking
from trainer.batches import Batch, Pieces, Row, collate
from trainer.checkpoint import Checkpoint, Place, restore, snapshot
from trainer.constrained import SidSet, greedy
from trainer.data import Catalogue, Held, Rows
from trainer.devices import Devices
from trainer.generator import IGNORE, GeneratorForCausalLM
from trainer.losses import softmax_loss
from trainer.ranking import ROWS, Ranker, fit, ranks
from trainer.settings import TaskWeights, TrainerSettings
from trainer.soft_targets import Level, Soft, code_tree, sibling_term, teacher_term

_WARMUP = 0.05
_CLIP = 1.0
# Seconds between two lines of progress.
_TELL_S = 2.0
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Quality:
    """Ranking of held-out next items by the constrained beam, over all items."""

    users: int
    hr10: float
    ndcg10: float
    validity: float  # share of answers spelled without the constraint that are known SIDs
    ranking: Ranking  # how the two heads were mixed
    purchases: int = 0  # users whose held-out item was bought
    purchase_hr10: float = 0.0  # of these alone


@dataclass
class SftResult:
    """What a run did. `quality` is of the weights that were kept."""

    steps: int
    epochs: float
    seconds: float
    loss: float
    quality: Quality | None
    stopped: str
    # A point for each validation: epoch, step, seconds, loss; hr10 and ndcg10 where somebody was held out.
    curve: list[dict[str, float]] = field(default_factory=list)
    pretraining: SftResult | None = None  # what the stage before this one did (trainer.pretrain)


def device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_bf16(where: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 here (they keep float32 weights)."""
    if where.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported())


def hr_ndcg(rank: Tensor, k: int = 10) -> tuple[float, float]:
    """Hit rate and NDCG at k of one relevant item a row, from ranks that count from 0."""
    if not len(rank):
        return 0.0, 0.0
    hit = rank < k
    gain = torch.where(hit, 1.0 / torch.log2(rank + 2.0), 0.0)
    return float(hit.float().mean()), float(gain.mean())


def token_loss(model: GeneratorForCausalLM, batch: Batch) -> Tensor:
    """Mean over the learned tokens of their cross-entropy (whole vocabulary), times their task's weight."""
    vectors = model.model(batch.input_ids).last_hidden_state[:, :-1]
    labels = batch.labels[:, 1:]
    at = labels != IGNORE
    logits = model.lm_head(vectors[at]).float()
    losses = F.cross_entropy(logits, labels[at], reduction="none")
    return (losses * batch.weights[:, None].expand_as(labels)[at]).mean()


class Scored(NamedTuple):
    """The items that the dense head's softmax runs over: those that somebody touched.

    An item that nobody touched yet would only ever be pushed away, and a new item stay where that left it.
    """

    rows: Tensor  # (S,) rows of the model's table
    place: Tensor  # (I,) each row's place among them; 0 where it has none
    touched: Tensor  # (I,) bool


# What is likely at the learned positions of a batch, in rows of what the dense head scores.
Teacher = Callable[[Pieces, Scored | None], Soft]


def scored(table: Tensor, touched: Tensor) -> Scored | None:
    """Of the catalogue's rows in the table (I,) and those of them that were touched; None: all are scored."""
    rows = table[touched].unique()
    if len(rows) == len(table):
        return None
    place = torch.zeros(len(table), dtype=torch.long, device=table.device)
    place[rows] = torch.arange(len(rows), device=table.device)
    return Scored(rows, place, torch.zeros_like(place, dtype=torch.bool).index_fill(0, rows, True))


def sequence_loss(
    model: GeneratorForCausalLM, pieces: Pieces, table: Tensor, weights: TaskWeights, smoothing: float = 0.0,
    among: Scored | None = None, tree: Sequence[Level] = (), soft: Soft | None = None,
) -> Tensor:  # fmt: skip
    """The next item at every position, by its SID and by itself.

    `table` (I,): the model's row of each item of the catalogue. The SID's part is the sum over its levels of
    the cross-entropy over the whole vocabulary; the dense head's is over the items of `among`, None: all.
    `smoothing`: share of the weight of a target that goes to other items and, along the `tree`, to sibling
    codes. `soft`: what a teacher says at the learned positions, in rows of what the dense head scores.
    Where `pieces` tells what was bought, targets that were weigh `weights.purchase` in every mean.
    """
    base = model.model
    every, rows, state = learned_states(model, pieces, table)
    target = rows[pieces.learned]
    each = None
    if pieces.bought is not None and weights.purchase != 1:
        each = torch.where(pieces.bought[pieces.learned], weights.purchase, 1.0)
    loss = torch.zeros((), device=rows.device)
    if weights.next_item > 0:
        (query, past), distance = pasts(rows, pieces.learned)
        wanted = target
        if among is not None:
            every, wanted, past = F.embedding(among.rows, every), among.place[target], among.place[past]
        asked = base.queries(state)
        loss = loss + weights.next_item * softmax_loss(
            asked, every, wanted, smoothing, (query, past), base.items.again_of(distance), each
        )
        if soft is not None:
            loss = loss + weights.next_item * teacher_term(asked, every, wanted, soft, each)
    if weights.next_sid > 0:
        codes = base.items.codes[target]
        chosen = base.embed_tokens(codes)
        vectors, prefix = [], None
        for level, head in enumerate(base.depth):
            vectors.append(head(state, prefix))
            prefix = chosen[:, level] if prefix is None else prefix + chosen[:, level]
        spelled = softmax_loss(
            torch.cat(vectors), base.embed_tokens.weight, codes.T.reshape(-1),
            weights=None if each is None else each.repeat(len(vectors)),
        )  # fmt: skip
        if smoothing:
            siblings = sibling_term(vectors, codes, target, tree, base.embed_tokens.weight, each)
            spelled = spelled + smoothing * siblings
        loss = loss + weights.next_sid * len(base.depth) * spelled
    return loss


def learned_states(
    model: GeneratorForCausalLM, pieces: Pieces, table: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Items' vectors (I, D), pieces as rows of the table (B, P), states before what is learned (N, D)."""
    base = model.model
    every = base.items.vectors(base.embed_tokens.weight)
    rows = torch.where(pieces.items >= 0, table[pieces.items.clamp(min=0)], -1)
    begin = base.embed_tokens.weight[model.config.bos_token_id].expand(len(rows), 1, -1)
    seen = rows[:, :-1]
    past = F.embedding(seen.clamp(min=0), every) * (seen >= 0)[..., None]
    state = base.states(torch.cat((begin, past), dim=1))[pieces.learned]
    about = None if pieces.context is None else pieces.context[pieces.learned]
    return every, rows, base.conditioned(state, about)


def pasts(rows: Tensor, learned: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The items of every learned position's past, by their last occurrence.

    rows (B, P), -1 where there is none -> (queries (M,) ascending, items (M,)), distances (M,) from 1.
    """
    length = rows.shape[1]
    at = torch.arange(length, device=rows.device)
    # later[b, q, r]: position r, after q, holds the item of q again; the first such r hides q from then on.
    same = (rows[:, :, None] == rows[:, None]) & (at[:, None] < at) & (rows >= 0)[:, :, None]
    until = torch.where(same.any(-1), same.int().argmax(-1), length)
    seen = (at[None, None] < at[None, :, None]) & (at[None, :, None] <= until[:, None]) & learned[..., None]
    number = (learned.flatten().cumsum(0) - 1).view(learned.shape)
    row, place, past = seen.nonzero(as_tuple=True)
    return (number[row, place], rows[row, past]), place - past


@torch.no_grad()
def ranked(
    model: GeneratorForCausalLM, held: Held, known: Catalogue, sids: SidSet, settings: TrainerSettings,
    ranking: Ranking | None = None,
) -> tuple[Tensor, Tensor, Ranking]:  # fmt: skip
    """Rank (B,) from 0 of each held-out item, whether (B,) what is spelled freely is a SID, and the ranking.

    Under a ranking, or the one that fits the items best; B >= 1.
    """
    model.eval()
    ranker = Ranker(model, known.codes, sids, max(settings.beam, 10))
    states = ranker.states(held.histories, held.contexts)
    found = ranker.candidates(held.histories, states)
    ranking = ranking or fit(found, held)
    valid = torch.cat([greedy(model, part, sids) for part in states.split(ROWS)])
    return ranks(found, held, ranking).cpu(), valid.cpu(), ranking


@torch.no_grad()
def evaluate(
    model: GeneratorForCausalLM, held: Held, known: Catalogue, sids: SidSet, settings: TrainerSettings,
    ranking: Ranking | None = None,
) -> Quality:  # fmt: skip
    """HR@10, NDCG@10 and validity on held-out items, under a ranking or the one that fits them best."""
    if not len(held.targets):
        model.eval()
        return Quality(0, 0.0, 0.0, 0.0, ranking or Ranking())
    rank, valid, ranking = ranked(model, held, known, sids, settings, ranking)
    hr, ndcg = hr_ndcg(rank)
    paid = np.zeros(len(held.targets), dtype=bool) if held.paid is None else held.paid
    return Quality(
        len(held.targets), hr, ndcg, float(valid.float().mean()), ranking,
        int(paid.sum()), hr_ndcg(rank[torch.from_numpy(paid)])[0],
    )  # fmt: skip


def _learning_rate(fraction: float) -> float:
    """Share of the peak rate after `fraction` of the run: a short linear rise, then half a cosine to 0."""
    if fraction < _WARMUP:
        return max(fraction / _WARMUP, 0.01)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - _WARMUP) / (1 - _WARMUP))))


def batch_loss(
    model: GeneratorForCausalLM, pieces: Pieces, titles: list[Row], table: Tensor, among: Scored | None,
    settings: TrainerSettings, tree: Sequence[Level] = (), teacher: Teacher | None = None,
) -> Tensor:  # fmt: skip
    """The loss of one batch: its sequences, and the texts that go with it."""
    where = table.device
    pieces = pieces.to(where)
    soft = teacher(pieces, among) if teacher else None
    with torch.autocast(where.type, torch.bfloat16, enabled=fast_bf16(where)):
        loss = sequence_loss(model, pieces, table, settings.weights, settings.smoothing, among, tree, soft)
        if titles:
            loss = loss + token_loss(model, Batch(*(part.to(where) for part in collate(titles))))
    return loss


def placed(model: GeneratorForCausalLM, rows: Rows) -> tuple[Tensor, Scored | None]:
    """The model's row (I,) of each item of the catalogue, and which items the dense head's loss is over."""
    codes = torch.from_numpy(rows.known.codes).to(model.device)
    table = model.model.items.rows(codes)
    if bool((table < 0).any()):
        raise ValueError("every item of the catalogue must be in the model's table: call know() first")
    return table, scored(table, torch.from_numpy(rows.touched).to(model.device))


class Replay:
    """The next-item loss on the log's sequences, batch by batch, for a stage that learns something else."""

    def __init__(self, model: GeneratorForCausalLM, rows: Rows) -> None:
        self._rows = rows
        self._table, self._among = placed(model, rows)
        # Now: a stage may switch them off for what it compares, and sequences are learned with them.
        self._drops = [(part, part.p) for part in model.modules() if isinstance(part, nn.Dropout)]
        self._epoch = 0
        self._left: list[Pieces] = []

    def loss(self, model: GeneratorForCausalLM) -> Tensor:
        """Of the next batch; epochs follow each other without an end."""
        if not self._left:
            self._left = self._rows.pieces(self._epoch)
            self._epoch += 1
        now = [part.p for part, _ in self._drops]
        for part, share in self._drops:
            part.p = share
        loss = batch_loss(model, self._left.pop(), [], self._table, self._among, self._rows.settings)
        for (part, _), share in zip(self._drops, now, strict=True):
            part.p = share
        return loss


def train(
    model: GeneratorForCausalLM,
    rows: Rows,
    sids: SidSet,
    settings: TrainerSettings,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    teacher: Teacher | None = None,
    devices: Devices | None = None,
) -> SftResult:
    """Train `model` in place and leave in it the weights that ranked the held-out items best.

    With `folder` the run writes a checkpoint after each epoch and when `stop()` says so, and goes on from the
    one it finds there; without a time budget the resumed run ends in the very weights of an unbroken one.
    `teacher` says what is likely at the learned positions of a batch, in rows of what the dense head scores.

    With several `devices` every process calls this with the same rows, settings and folder; a step takes one
    batch in each. Time, `stop`, validation and the kept weights are the main process's: the others come back
    with the weights of their last step.
    """
    devices = devices or Devices()
    where = device()
    model.to(where)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.999), fused=True
    )
    saved = Checkpoint(folder) if folder else None
    place = saved.load(model, optimizer) if saved else None
    place = place or Place()
    best = saved.best if saved else None
    devices.spread(model)
    began, before = time.monotonic(), place.seconds
    running = math.nan if place.loss is None else place.loss
    told = before
    quality: Quality | None = None

    def validate() -> Quality | None:
        nonlocal best
        if not len(rows.split.held.targets):
            return None
        measured = evaluate(model, rows.split.held, rows.known, sids, settings)
        if measured.ndcg10 > place.best_ndcg or best is None:
            place.best_ndcg, place.stale = measured.ndcg10, 0
            best = snapshot(model)
        else:
            place.stale += 1
        return measured

    def save() -> None:
        if saved and devices.main:
            saved.save(model, optimizer, place, best)

    table, among = placed(model, rows)
    tree = code_tree(model.model.items.codes) if settings.smoothing else ()
    while place.stopped is None and place.epoch < settings.epochs:
        batches = rows.pieces(place.epoch)
        texts = rows.texts(place.epoch)
        each = -(-len(texts) // max(1, len(batches)))
        while place.batch < len(batches):
            place.seconds = before + time.monotonic() - began
            share = place.seconds / settings.max_seconds if settings.max_seconds else 0.0
            asked = stop is not None and stop()
            spent, interrupted = devices.told([share, float(asked)])
            if spent >= 1:
                place.stopped = "time budget spent"
                break
            done = place.epoch + place.batch / len(batches)
            if interrupted:
                save()
                return SftResult(place.step, done, place.seconds, running, None, "interrupted")
            model.train()
            optimizer.zero_grad(set_to_none=True)
            # Where batches run out before processes do, the last step has no batch for some.
            at = place.batch + devices.rank
            loss = None
            if at < len(batches):
                # Dropout belongs to the batch: it is the same after a pause, and in whichever process.
                torch.manual_seed(_seed_of(settings.seed, place.epoch, at))
                titles = texts[at * each : (at + 1) * each]
                loss = batch_loss(model, batches[at], titles, table, among, settings, tree, teacher)
                loss.backward()
            value = devices.average(model, loss)
            own = model.model.items.own.grad
            if among is not None and own is not None:
                # Titles reach them too: a new item stays its codes and its text.
                own.mul_(among.touched[:, None])
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            rate = settings.lr * _learning_rate(max(spent, done / settings.epochs))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            running = value if math.isnan(running) else 0.98 * running + 0.02 * value
            place.loss = running
            place.step += 1
            place.batch = min(place.batch + devices.count, len(batches))
            if progress and place.seconds - told > _TELL_S:
                told = place.seconds
                progress(f"epoch {place.epoch + place.batch / len(batches):.2f}, loss {running:.3f}")
        done = place.epoch + place.batch / max(1, len(batches))
        if place.stopped is None:
            place.epoch, place.batch = place.epoch + 1, 0
        quality = validate()
        place.stale = int(devices.told([float(place.stale)])[0])
        if place.stopped is None and place.stale >= settings.patience:
            place.stopped = f"no better NDCG@10 for {place.stale} validations"
        place.seconds = before + time.monotonic() - began
        place.curve.append(_point(done, place, running, quality))
        if progress:
            shown = f", HR@10 {quality.hr10:.3f}, NDCG@10 {quality.ndcg10:.3f}" if quality else ""
            progress(f"epoch {done:.2f}, loss {running:.3f}{shown}, {place.seconds:.0f} s")
        save()
    if best is not None:
        restore(model, best)
        if place.stale or quality is None:
            quality = evaluate(model, rows.split.held, rows.known, sids, settings)
    model.eval()
    return SftResult(
        place.step, place.curve[-1]["epoch"] if place.curve else 0.0, place.seconds, running, quality,
        place.stopped or "all epochs done", place.curve,
    )  # fmt: skip


def _seed_of(seed: int, epoch: int, batch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch, batch)).generate_state(1)[0])


def _point(epoch: float, place: Place, loss: float, quality: Quality | None) -> dict[str, float]:
    made = {"epoch": epoch, "step": float(place.step), "seconds": place.seconds}
    if math.isfinite(loss):
        made["loss"] = loss
    return made | ({"hr10": quality.hr10, "ndcg10": quality.ndcg10} if quality else {})
