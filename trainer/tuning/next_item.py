"""The next-item loss of sequences, by the SID and by the item itself at every position; and that of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.generator.items import PastOccurrences
from trainer.generator.model import GeneratorForCausalLM
from trainer.sequences.batches import IGNORE, SequenceBatch, TokenBatch, TokenRow, pad_token_rows
from trainer.sequences.rows import TrainingRows
from trainer.settings import TaskWeights, TrainerSettings
from trainer.tuning.devices import fast_bf16
from trainer.tuning.losses import softmax_loss
from trainer.tuning.soft_targets import CodeTreeLevel, SoftTargets, sibling_term, teacher_term


def token_loss(model: GeneratorForCausalLM, batch: TokenBatch) -> Tensor:
    """Mean over the learned tokens of their cross-entropy (whole vocabulary), times their task's weight."""
    vectors = model.model(batch.input_ids).last_hidden_state[:, :-1]
    labels = batch.labels[:, 1:]
    at = labels != IGNORE
    logits = model.lm_head(vectors[at]).float()
    losses = F.cross_entropy(logits, labels[at], reduction="none")
    return (losses * batch.weights[:, None].expand_as(labels)[at]).mean()


class ScoredItems(NamedTuple):
    """The items that the dense head's softmax runs over: those that somebody touched.

    An item that nobody touched yet would only ever be pushed away, and a new item stay where that left it.
    """

    rows: Tensor  # (S,) rows of the model's table
    position: Tensor  # (I,) each row's place among them; 0 where it has none
    is_scored: Tensor  # (I,) bool


# What is likely at the learned positions of a batch, in rows of what the dense head scores.
Teacher = Callable[[SequenceBatch, ScoredItems | None], SoftTargets]


def scored_items(table: Tensor, touched: Tensor) -> ScoredItems | None:
    """Of the catalogue's rows in the table (I,) and those of them that were touched; None: all are scored."""
    rows = table[touched].unique()
    if len(rows) == len(table):
        return None
    place = torch.zeros(len(table), dtype=torch.long, device=table.device)
    place[rows] = torch.arange(len(rows), device=table.device)
    return ScoredItems(rows, place, torch.zeros_like(place, dtype=torch.bool).index_fill(0, rows, True))


def sequence_loss(
    model: GeneratorForCausalLM, pieces: SequenceBatch, table: Tensor, weights: TaskWeights,
    smoothing: float = 0.0,
    among: ScoredItems | None = None, tree: Sequence[CodeTreeLevel] = (), soft: SoftTargets | None = None,
) -> Tensor:  # fmt: skip
    """The next item at every position, by its SID and by itself.

    `table` (I,): the model's row of each item of the catalogue. The SID's part is the sum over its levels of
    the cross-entropy over the whole vocabulary; the dense head's is over the items of `among`, None: all.
    `smoothing`: share of the weight of a target that goes to other items and, along the `tree`, to sibling
    codes. `soft`: what a teacher says at the learned positions, in rows of what the dense head scores.
    Where `pieces` tells what was bought, targets that were weigh `weights.purchase` in every mean.
    """
    base = model.model
    every, rows, state = states_before_targets(model, pieces, table)
    target = rows[pieces.learned]
    each = None
    if pieces.bought is not None and weights.purchase != 1:
        each = torch.where(pieces.bought[pieces.learned], weights.purchase, 1.0)
    loss = torch.zeros((), device=rows.device)
    if weights.next_item > 0:
        (query, past), when = past_items(rows, pieces.learned)
        wanted = target
        if among is not None:
            every, wanted, past = F.embedding(among.rows, every), among.position[target], among.position[past]
        asked = base.queries(state)
        loss = loss + weights.next_item * softmax_loss(
            asked, every, wanted, smoothing, (query, past),
            base.items.repeat_bias(asked, query, when, as_learned=True), each,
        )  # fmt: skip
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


def states_before_targets(
    model: GeneratorForCausalLM, pieces: SequenceBatch, table: Tensor
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
    return every, rows, base.with_context(state, about)


def past_items(rows: Tensor, learned: Tensor) -> tuple[tuple[Tensor, Tensor], PastOccurrences]:
    """The items of every learned position's past, by their last occurrence.

    rows (B, P), -1 where there is none -> (queries (M,) ascending, items (M,)), where in the past they are.
    """
    length = rows.shape[1]
    at = torch.arange(length, device=rows.device)
    # later[b, q, r]: position r, after q, holds the item of q again; the first such r hides q from then on.
    same = (rows[:, :, None] == rows[:, None]) & (rows >= 0)[:, :, None]
    later = same & (at[:, None] < at)
    until = torch.where(later.any(-1), later.int().argmax(-1), length)
    seen = (at[None, None] < at[None, :, None]) & (at[None, :, None] <= until[:, None]) & learned[..., None]
    number = (learned.flatten().cumsum(0) - 1).view(learned.shape)
    row, place, past = seen.nonzero(as_tuple=True)
    count = (same & (at[:, None] >= at)).sum(-1)
    return (number[row, place], rows[row, past]), PastOccurrences(place - past, count[row, past])


def batch_loss(
    model: GeneratorForCausalLM, pieces: SequenceBatch, titles: list[TokenRow], table: Tensor,
    among: ScoredItems | None,
    settings: TrainerSettings, tree: Sequence[CodeTreeLevel] = (), teacher: Teacher | None = None,
) -> Tensor:  # fmt: skip
    """The loss of one batch: its sequences, and the texts that go with it."""
    where = table.device
    pieces = pieces.to(where)
    soft = teacher(pieces, among) if teacher else None
    with torch.autocast(where.type, torch.bfloat16, enabled=fast_bf16(where)):
        loss = sequence_loss(model, pieces, table, settings.weights, settings.smoothing, among, tree, soft)
        if titles:
            loss = loss + token_loss(model, TokenBatch(*(part.to(where) for part in pad_token_rows(titles))))
    return loss


def catalogue_table_rows(
    model: GeneratorForCausalLM, rows: TrainingRows
) -> tuple[Tensor, ScoredItems | None]:
    """The model's row (I,) of each item of the catalogue, and which items the dense head's loss is over."""
    codes = torch.from_numpy(rows.catalogue.codes).to(model.device)
    table = model.model.items.rows(codes)
    if bool((table < 0).any()):
        raise ValueError("every item of the catalogue must be in the model's table: call know() first")
    return table, scored_items(table, torch.from_numpy(rows.trained_items).to(model.device))


class LogReplay:
    """The next-item loss on the log's sequences, batch by batch, for a stage that learns something else."""

    def __init__(self, model: GeneratorForCausalLM, rows: TrainingRows) -> None:
        self._rows = rows
        self._table, self._among = catalogue_table_rows(model, rows)
        # Now: a stage may switch them off for what it compares, and sequences are learned with them.
        self._drops = [(part, part.p) for part in model.modules() if isinstance(part, nn.Dropout)]
        self._epoch = 0
        self._left: list[SequenceBatch] = []

    def loss(self, model: GeneratorForCausalLM) -> Tensor:
        """Of the next batch; epochs follow each other without an end."""
        if not self._left:
            self._left = self._rows.sequence_batches(self._epoch)
            self._epoch += 1
        now = [part.p for part, _ in self._drops]
        for part, share in self._drops:
            part.p = share
        loss = batch_loss(model, self._left.pop(), [], self._table, self._among, self._rows.settings)
        for (part, _), share in zip(self._drops, now, strict=True):
            part.p = share
        return loss
