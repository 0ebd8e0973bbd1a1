"""The next-item loss of sequences, by the SID and by the item itself at every position; and that of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.generator.items import PastOccurrences
from trainer.generator.model import GeneratorForCausalLM
from trainer.sequences.batches import IGNORE, SequenceBatch, TokenBatch, TokenRow, pad_token_rows
from trainer.sequences.rows import TrainingRows
from trainer.settings import TaskWeights, TrainerSettings
from trainer.tuning.devices import training_arithmetic
from trainer.tuning.losses import softmax_loss
from trainer.tuning.soft_targets import CodeTreeLevel, SoftTargets, sibling_term, teacher_term


def token_loss(model: GeneratorForCausalLM, batch: TokenBatch) -> Tensor:
    """Mean over the learned tokens of their cross-entropy (whole vocabulary), times their task's weight."""
    vectors = model.model(batch.input_ids).last_hidden_state[:, :-1]
    labels = batch.labels[:, 1:]
    learned = labels != IGNORE
    logits = model.lm_head(vectors[learned]).float()
    losses = F.cross_entropy(logits, labels[learned], reduction="none")
    return (losses * batch.weights[:, None].expand_as(labels)[learned]).mean()


class ScoredItems(NamedTuple):
    """The items that the dense head's softmax runs over: those with an interaction in training.

    An item without interactions would only ever be pushed away, and a new item stay where that left it.
    """

    rows: Tensor  # (S,) rows of the model's table
    position: Tensor  # (I,) each row's place among them; 0 where it has none
    is_scored: Tensor  # (I,) bool


# What is likely at the learned positions of a batch, in rows of what the dense head scores.
TeacherTargets = Callable[[SequenceBatch, ScoredItems | None], SoftTargets]


def scored_items(table: Tensor, trained: Tensor) -> ScoredItems | None:
    """Table rows of the catalogue (I,), and the `trained` ones -> the scored items; None: all are scored."""
    rows = table[trained].unique()
    if len(rows) == len(table):
        return None
    position = torch.zeros(len(table), dtype=torch.long, device=table.device)
    position[rows] = torch.arange(len(rows), device=table.device)
    return ScoredItems(rows, position, torch.zeros_like(position, dtype=torch.bool).index_fill(0, rows, True))


def sequence_loss(
    model: GeneratorForCausalLM, batch: SequenceBatch, table: Tensor, weights: TaskWeights,
    smoothing: float = 0.0,
    scored: ScoredItems | None = None, code_tree: Sequence[CodeTreeLevel] = (),
    soft_targets: SoftTargets | None = None,
) -> Tensor:  # fmt: skip
    """The next item at every position, by its SID and by itself.

    `table` (I,): the model's row of each item of the catalogue. The SID's part is the sum over its levels of
    the cross-entropy over the whole vocabulary; the dense head's is over the `scored` items, None: all.
    `smoothing`: share of the weight of a target that goes to other items and, along the `code_tree`, to
    sibling codes. `soft_targets`: what a teacher expects at the learned positions, in rows of what the dense
    head scores.
    Where `batch` says what was bought, targets that were bought weigh `weights.purchase` in every mean.
    """
    base = model.model
    item_vectors, rows, state = states_before_targets(model, batch, table)
    target = rows[batch.learned]
    target_weights = None
    if batch.bought is not None and weights.purchase != 1:
        target_weights = torch.where(batch.bought[batch.learned], weights.purchase, 1.0)
    loss = torch.zeros((), device=rows.device)
    if weights.next_item > 0:
        (query_number, past_item), occurrences = past_items(rows, batch.learned)
        target_position = target
        if scored is not None:
            item_vectors, target_position, past_item = (
                F.embedding(scored.rows, item_vectors),
                scored.position[target],
                scored.position[past_item],
            )
        queries = base.queries(state)
        loss = loss + weights.next_item * softmax_loss(
            queries, item_vectors, target_position, smoothing, (query_number, past_item),
            base.items.repeat_bias(queries, query_number, occurrences, as_learned=True), target_weights,
        )  # fmt: skip
        if soft_targets is not None:
            loss = loss + weights.next_item * teacher_term(
                queries, item_vectors, target_position, soft_targets, target_weights
            )
    if weights.next_sid > 0:
        codes = base.items.codes[target]
        code_vectors = base.embed_tokens(codes)
        vectors, prefix = [], None
        for level, head in enumerate(base.depth):
            vectors.append(head(state, prefix))
            prefix = code_vectors[:, level] if prefix is None else prefix + code_vectors[:, level]
        code_loss = softmax_loss(
            torch.cat(vectors), base.embed_tokens.weight, codes.T.reshape(-1),
            weights=None if target_weights is None else target_weights.repeat(len(vectors)),
        )  # fmt: skip
        if smoothing:
            siblings = sibling_term(
                vectors, codes, target, code_tree, base.embed_tokens.weight, target_weights
            )
            code_loss = code_loss + smoothing * siblings
        loss = loss + weights.next_sid * len(base.depth) * code_loss
    return loss


def states_before_targets(
    model: GeneratorForCausalLM, batch: SequenceBatch, table: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Items' vectors (I, D), the batch as rows of the table (B, P), states before targets (N, D)."""
    base = model.model
    item_vectors = base.items.vectors(base.embed_tokens.weight)
    rows = torch.where(batch.items >= 0, table[batch.items.clamp(min=0)], -1)
    bos_vectors = base.embed_tokens.weight[model.config.bos_token_id].expand(len(rows), 1, -1)
    inputs = rows[:, :-1]
    input_vectors = F.embedding(inputs.clamp(min=0), item_vectors) * (inputs >= 0)[..., None]
    state = base.states(torch.cat((bos_vectors, input_vectors), dim=1))[batch.learned]
    context = None if batch.context is None else batch.context[batch.learned]
    return item_vectors, rows, base.with_context(state, context)


def past_items(rows: Tensor, learned: Tensor) -> tuple[tuple[Tensor, Tensor], PastOccurrences]:
    """The items of every learned position's past, by their last occurrence.

    rows (B, P), -1 where there is none -> (queries (M,) ascending, items (M,)), where in the past they are.
    """
    length = rows.shape[1]
    at = torch.arange(length, device=rows.device)
    # later[b, q, r]: position r, after q, holds the item of q again; the first such r hides q from then on.
    same = (rows[:, :, None] == rows[:, None]) & (rows >= 0)[:, :, None]
    later_occurrence = same & (at[:, None] < at)
    hidden_from = torch.where(later_occurrence.any(-1), later_occurrence.int().argmax(-1), length)
    visible = (
        (at[None, None] < at[None, :, None])
        & (at[None, :, None] <= hidden_from[:, None])
        & learned[..., None]
    )
    query_number = (learned.flatten().cumsum(0) - 1).view(learned.shape)
    row, place, past_place = visible.nonzero(as_tuple=True)
    count = (same & (at[:, None] >= at)).sum(-1)
    return (query_number[row, place], rows[row, past_place]), PastOccurrences(
        place - past_place, count[row, past_place]
    )


def batch_loss(
    model: GeneratorForCausalLM, batch: SequenceBatch, texts: list[TokenRow], table: Tensor,
    scored: ScoredItems | None,
    settings: TrainerSettings, code_tree: Sequence[CodeTreeLevel] = (), teacher: TeacherTargets | None = None,
) -> Tensor:  # fmt: skip
    """The loss of one batch: its sequences, and the texts that go with it."""
    device = table.device
    batch = batch.to(device)
    soft_targets = teacher(batch, scored) if teacher else None
    with training_arithmetic(settings.arithmetic, device):
        loss = sequence_loss(
            model, batch, table, settings.weights, settings.smoothing, scored, code_tree, soft_targets
        )
        if texts:
            loss = loss + token_loss(model, TokenBatch(*(part.to(device) for part in pad_token_rows(texts))))
    return loss


def catalogue_table_rows(
    model: GeneratorForCausalLM, rows: TrainingRows
) -> tuple[Tensor, ScoredItems | None]:
    """The model's row (I,) of each item of the catalogue, and which items the dense head's loss is over."""
    codes = torch.from_numpy(rows.catalogue.codes).to(model.device)
    table = model.model.items.rows(codes)
    if bool((table < 0).any()):
        raise ValueError("every item of the catalogue must be in the model's table: call set_items() first")
    return table, scored_items(table, torch.from_numpy(rows.trained_items).to(model.device))


class LogReplay:
    """The next-item loss on the log's sequences, batch by batch, for a stage that learns something else."""

    def __init__(self, model: GeneratorForCausalLM, rows: TrainingRows) -> None:
        self._rows = rows
        self._table, self._among = catalogue_table_rows(model, rows)
        self._epoch = 0
        self._left: list[SequenceBatch] = []

    def skip(self, batches: int) -> None:
        """Go on after so many batches, which a stage that was cut off has learned."""
        for _ in range(batches):
            self._next_batch()

    def _next_batch(self) -> SequenceBatch:
        if not self._left:
            self._left = self._rows.sequence_batches(self._epoch)
            self._epoch += 1
        return self._left.pop()

    def loss(self, model: GeneratorForCausalLM) -> Tensor:
        """Of the next batch; epochs follow each other without an end."""
        return batch_loss(model, self._next_batch(), [], self._table, self._among, self._rows.settings)
