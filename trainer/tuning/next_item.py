"""The next-item loss of sequences, by the SID and by the item itself at every position; and that of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.generator.items import PastOccurrences
from trainer.generator.layout import token_layout
from trainer.generator.model import GeneratorForCausalLM
from trainer.sequences.batches import (
    IGNORE,
    SequenceBatch,
    TokenBatch,
    TokenRow,
    pad_token_rows,
    to_device,
)
from trainer.sequences.rows import TrainingRows
from trainer.settings import TaskWeights, TrainerSettings
from trainer.tuning.devices import training_arithmetic
from trainer.tuning.losses import ItemBias, softmax_loss
from trainer.tuning.soft_targets import (
    CodeTreeLevel,
    SoftTargets,
    code_tree,
    sibling_term,
    teacher_term,
)


def token_loss(model: GeneratorForCausalLM, batch: TokenBatch) -> Tensor:
    """Mean over the learned tokens of their cross-entropy (whole vocabulary), times their task's weight.

    `batch` is on the CPU, where it is found which places are learned: the loss of a GPU is not waited for.
    """
    base, device = model.model, model.device
    layout = token_layout(batch.input_ids, None, model.config)
    state, folded = base.depth_inputs(to_device(batch.input_ids, device), layout.to(device))
    labels = batch.labels[:, 1:]
    vectors, places = [], []
    for level, head in enumerate(base.depth):
        row, place = ((labels != IGNORE) & (layout.chosen[:, :-1] == level)).nonzero(as_tuple=True)
        at = to_device(row, device), to_device(place, device)
        vectors.append(head(state[at], folded[at] if level else None))
        places.append((row, place))
    rows, columns = (torch.cat(part) for part in zip(*places, strict=True))
    logits = model.lm_head(torch.cat(vectors)).float()
    losses = F.cross_entropy(logits, to_device(labels[rows, columns], device), reduction="none")
    return (losses * to_device(batch.weights[rows], device)).mean()


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


class LearnedPositions(NamedTuple):
    """What a step reads of a batch: N learned positions of sequences of at most P items.

    It is found on the CPU, where the batch lies, and then sent: on a GPU the host would wait for how many
    positions there are, and for the items of their pasts.
    """

    inputs: Tensor  # (B, P - 1) rows of the table, -1 where there is none
    row: Tensor  # (N,) of the batch
    place: Tensor  # (N,) in the sequence
    targets: Tensor  # (N,) rows of the table
    past_items: Tensor  # (N, P) rows of the table: a past's items, each at its last place; -1 elsewhere
    past: PastOccurrences  # (N, P) of these items
    context: Tensor | None  # (N, C) token ids
    bought: Tensor | None  # (N,) bool

    def to(self, device: torch.device) -> LearnedPositions:
        """The same on a device."""
        parts = {
            name: to_device(part, device) for name, part in self._asdict().items() if isinstance(part, Tensor)
        }
        return self._replace(past=PastOccurrences(*(to_device(part, device) for part in self.past)), **parts)


def learned_positions(batch: SequenceBatch, table: Tensor) -> LearnedPositions:
    """The learned positions of a batch; table (I,): the row of each item of the catalogue. All on the CPU."""
    rows = torch.where(batch.items >= 0, table[batch.items.clamp(min=0)], -1)
    row, place = batch.learned.nonzero(as_tuple=True)
    items, past = past_items(rows, row, place)
    context, bought = (None if part is None else part[row, place] for part in (batch.context, batch.bought))
    return LearnedPositions(rows[:, :-1], row, place, rows[row, place], items, past, context, bought)


def sequence_loss(
    model: GeneratorForCausalLM, batch: SequenceBatch, table: Tensor, weights: TaskWeights,
    smoothing: float = 0.0,
    scored: ScoredItems | None = None, tree: Sequence[CodeTreeLevel] = (),
    soft_targets: SoftTargets | None = None,
) -> Tensor:  # fmt: skip
    """The next item at every position, by its SID and by itself.

    `batch` and `table` (I,), the model's row of each item of the catalogue, are on the CPU; the rest is on
    the model's device. The SID's part is the sum over its levels of the cross-entropy over the whole
    vocabulary; the dense head's is over the `scored` items, None: all. `smoothing`: share of the weight of a
    target that goes to other items and, along the `tree`, to sibling codes. `soft_targets`: what a
    teacher expects at the learned positions, in rows of what the dense head scores.
    Where `batch` says what was bought, targets that were bought weigh `weights.purchase` in every mean.
    """
    base = model.model
    positions = learned_positions(batch, table).to(model.device)
    item_vectors, state = states_before_targets(model, positions)
    target = positions.targets
    target_weights = None
    if positions.bought is not None and weights.purchase != 1:
        target_weights = torch.where(positions.bought, weights.purchase, 1.0)
    loss = torch.zeros((), device=model.device)
    if weights.next_item > 0:
        queries = base.queries(state)
        bias = ItemBias(
            positions.past_items, base.items.repeat_bias(queries, positions.past, as_learned=True)
        )
        target_position = target
        if scored is not None:
            item_vectors = F.embedding(scored.rows, item_vectors)
            target_position = scored.position[target]
            bias = bias._replace(
                items=torch.where(bias.items >= 0, scored.position[bias.items.clamp(min=0)], -1)
            )
        loss = loss + weights.next_item * softmax_loss(
            queries, item_vectors, target_position, smoothing, bias, target_weights
        )
        if soft_targets is not None:
            loss = loss + weights.next_item * teacher_term(
                queries, item_vectors, target_position, soft_targets, target_weights, bias
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
            siblings = sibling_term(vectors, codes, target, tree, base.embed_tokens.weight, target_weights)
            code_loss = code_loss + smoothing * siblings
        loss = loss + weights.next_sid * len(base.depth) * code_loss
    return loss


def states_before_targets(model: GeneratorForCausalLM, positions: LearnedPositions) -> tuple[Tensor, Tensor]:
    """Items' vectors (I, D), states before targets (N, D); the positions are on the model's device."""
    base = model.model
    item_vectors = base.items.vectors(base.embed_tokens.weight)
    inputs = positions.inputs
    bos_vectors = base.embed_tokens.weight[model.config.bos_token_id].expand(len(inputs), 1, -1)
    input_vectors = F.embedding(inputs.clamp(min=0), item_vectors) * (inputs >= 0)[..., None]
    states = base.states(torch.cat((bos_vectors, input_vectors), dim=1))
    return item_vectors, base.with_context(states[positions.row, positions.place], positions.context)


def past_items(rows: Tensor, row: Tensor, place: Tensor) -> tuple[Tensor, PastOccurrences]:
    """The items of the past of N places, each by its last occurrence there.

    rows (B, P), -1 where there is none; the places as row (N,) and place (N,) -> rows (N, P), -1 where a past
    has no item or has it again later; where in the past each is.
    """
    length = rows.shape[1]
    at = torch.arange(length, device=rows.device)
    # later[b, q, r]: position r, after q, holds the item of q again; the first such r hides q from then on.
    same = (rows[:, :, None] == rows[:, None]) & (rows >= 0)[:, :, None]
    later_occurrence = same & (at[:, None] < at)
    hidden_from = torch.where(later_occurrence.any(-1), later_occurrence.int().argmax(-1), length)
    count = (same & (at[:, None] >= at)).sum(-1)
    distance = place[:, None] - at
    visible = (distance > 0) & (place[:, None] <= hidden_from[row])
    past = PastOccurrences(distance.clamp(min=1), count[row].clamp(min=1))
    return torch.where(visible, rows[row], -1), past


def batch_loss(
    model: GeneratorForCausalLM, batch: SequenceBatch, texts: list[TokenRow], table: Tensor,
    scored: ScoredItems | None,
    settings: TrainerSettings, tree: Sequence[CodeTreeLevel] = (), teacher: TeacherTargets | None = None,
) -> Tensor:  # fmt: skip
    """The loss of one batch (on the CPU, as in `sequence_loss`): its sequences, and texts that go with it."""
    soft_targets = teacher(batch, scored) if teacher else None
    with training_arithmetic(settings.arithmetic, model.device):
        loss = sequence_loss(
            model, batch, table, settings.weights, settings.smoothing, scored, tree, soft_targets
        )
        if texts:
            loss = loss + token_loss(model, pad_token_rows(texts))
    return loss


def catalogue_table_rows(
    model: GeneratorForCausalLM, rows: TrainingRows
) -> tuple[Tensor, ScoredItems | None]:
    """The model's row (I,) of each item of the catalogue, on the CPU, where batches are made; and, on the
    model's device, which items the dense head's loss is over."""
    items = model.model.items
    table = items.rows(torch.from_numpy(rows.catalogue.codes).to(model.device)).cpu()
    if bool((table < 0).any()):
        raise ValueError("every item of the catalogue must be in the model's table: call set_items() first")
    scored = scored_items(table, torch.from_numpy(rows.trained_items))
    return table, None if scored is None else ScoredItems(*(part.to(model.device) for part in scored))


def smoothing_tree(model: GeneratorForCausalLM, settings: TrainerSettings) -> Sequence[CodeTreeLevel]:
    """The tree that codes are smoothed along; empty where the settings smooth nothing."""
    return code_tree(model.model.items.codes) if settings.smoothing else ()


class LogReplay:
    """The next-item loss on the log's sequences, batch by batch, for a stage that learns something else."""

    def __init__(self, rows: TrainingRows) -> None:
        self._rows = rows
        self._places: tuple[Tensor, ScoredItems | None] | None = None
        self._tree: Sequence[CodeTreeLevel] = ()
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
        """Of the next batch; epochs follow each other without an end. All models have the same items."""
        if self._places is None:
            # Not before: a stage may move the model to its device after it has made its parts.
            self._places = catalogue_table_rows(model, self._rows)
            self._tree = smoothing_tree(model, self._rows.settings)
        return batch_loss(model, self._next_batch(), [], *self._places, self._rows.settings, self._tree)
