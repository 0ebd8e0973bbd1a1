"""Targets that are more than one item: siblings in the code tree, and what a teacher model expects.

Shapes: N learned positions, I items of the table, L levels, D width, K items that a teacher names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.tuning.losses import ItemBias, weighted_mean


class CodeTreeLevel(NamedTuple):
    """The nodes of one level of the code tree, in order of SIDs, grouped by their parents."""

    tokens: Tensor  # (M,) the code of each node, as a token id
    starts: Tensor  # (parents,) where each parent's children begin
    parent: Tensor  # (I,) each item's parent


def code_tree(codes: Tensor) -> list[CodeTreeLevel]:
    """The tree that SIDs (I, L) of token ids, ascending and each once, span; a level after another."""
    levels = []
    parent = torch.zeros(len(codes), dtype=torch.long, device=codes.device)
    for level in range(codes.shape[1]):
        node, inverse = torch.unique_consecutive(codes[:, : level + 1], dim=0, return_inverse=True)
        first = torch.searchsorted(inverse.contiguous(), torch.arange(len(node), device=codes.device))
        above = parent[first]
        starts = torch.searchsorted(above.contiguous(), torch.arange(int(above[-1]) + 1, device=codes.device))
        levels.append(CodeTreeLevel(node[:, level], starts, parent))
        parent = inverse
    return levels


def sibling_term(
    vectors: Sequence[Tensor], codes: Tensor, rows: Tensor, tree: Sequence[CodeTreeLevel], table: Tensor,
    weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What is added to the mean cross-entropy of codes for a share of their targets' weight.

    That share goes evenly to the codes that real items have below the same prefix, where plain smoothing
    (Szegedy et al. 2016, section 7) would give most of it to codes of no item. vectors: L of (N, D), which
    score the codes (N, L) of the items `rows` (N,) by `table` (V, D) -> scalar. The normaliser cancels: it is
    the mean of logit(target) - mean logit(siblings), by `weights` (N,) as in `softmax_loss`.
    """
    total = torch.zeros((), device=table.device)
    for depth, (vector, level) in enumerate(zip(vectors, tree, strict=True)):
        siblings = F.embedding_bag(level.tokens, table, level.starts, mode="mean")
        target_minus_siblings = F.embedding(codes[:, depth], table) - F.embedding(
            level.parent[rows], siblings
        )
        total = total + weighted_mean((vector.float() * target_minus_siblings.float()).sum(-1), weights)
    return total / len(vectors)


class SoftTargets(NamedTuple):
    """What a teacher expects at N positions; a row's probabilities sum to 1."""

    items: Tensor  # (N, K) rows of whatever the student scores
    probabilities: Tensor  # (N, K) float32
    share: float  # of the target's weight that goes to them


def teacher_term(
    queries: Tensor,
    item_vectors: Tensor,
    targets: Tensor,
    soft_targets: SoftTargets,
    weights: Tensor | None = None,
    bias: ItemBias | None = None,
) -> Tensor:
    """What is added to the mean cross-entropy of items for distillation (Hinton et al. 2015, equation 2).

    queries (N, D), every (I, D), targets (N,) -> scalar: share * mean of logit(target) - expected logit under
    the teacher; temperature 1, the normaliser cancels. `weights` (N,) and `bias` as in `softmax_loss`.
    """
    queries = queries.float()
    target_logits = (queries * F.embedding(targets, item_vectors).float()).sum(-1)
    teacher_logits = torch.einsum(
        "nd,nkd->nk", queries, F.embedding(soft_targets.items, item_vectors).float()
    )
    if bias is not None:
        target_logits = target_logits + bias.at(targets)
        # (N, K, S): which of a query's biased items is which of the teacher's.
        same = soft_targets.items[:, :, None] == bias.items[:, None]
        teacher_logits = teacher_logits + (bias.values[:, None] * same).sum(-1)
    return soft_targets.share * weighted_mean(
        target_logits - (teacher_logits * soft_targets.probabilities).sum(-1), weights
    )
