"""The loss of gSASRec: generalised binary cross-entropy over sampled negatives (gBCE).

Petrov and Macdonald 2023, arXiv 2308.07192. A model that is trained on sampled negatives is overconfident:
it learns which of a few items is right, not which of all. gBCE raises the positive's probability to a power
beta < 1, which takes that back.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def beta_of(negatives: int, items: int, calibration: float) -> float:
    """beta = alpha (t (1 - 1 / alpha) + 1 / alpha) = 1 + t (alpha - 1), with alpha = negatives / (items - 1).

    `calibration` t from 0 (plain binary cross-entropy, beta 1) to 1 (probabilities
    of a softmax over all items, beta alpha).
    """
    sampling_rate = min(1.0, negatives / max(1, items - 1))
    return 1 + calibration * (sampling_rate - 1)


def gbce_loss(states: Tensor, items: Tensor, targets: Tensor, negatives: int, calibration: float) -> Tensor:
    """Mean over the targets of -(beta log sigma(s+) + sum over negatives of log(1 - sigma(s-))) / (K + 1).

    states (B, T, D), items (I, D), targets (B, T) int64 rows of `items`, -1 where there is none, at least one
    is. The K negatives are drawn uniformly from all items for each row, and its positions share them: the
    paper draws them for each position, which on a processor costs more than the softmax over all items.
    Scalar, float32.
    """
    sampled = torch.randint(len(items), (len(states), negatives), device=states.device)
    negative_scores = torch.einsum("btd,bkd->btk", states, items[sampled]).float()
    has_target = targets >= 0
    positive_scores = (states * items[targets.clamp(min=0)]).sum(-1).float()
    beta = beta_of(negatives, len(items), calibration)
    # log(1 - sigma(s)) = log sigma(-s)
    gain = beta * F.logsigmoid(positive_scores) + F.logsigmoid(-negative_scores).sum(-1)
    return -gain[has_target].mean() / (negatives + 1)
