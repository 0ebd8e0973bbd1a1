"""The strength of the repeat bias, fitted on held-out events.

The repeat bias (`trainer.generator.items.ItemTable.repeat_vectors`) has a dozen vectors, and is learned
together with a vector of every item. In a log of few users the items' vectors overfit: they predict each
user's next items of the training with a certainty that held-out events do not confirm. So a repeat bias that
is right in training is too small on held-out events. There one factor of it is fitted (a temperature, Guo et
al. 2017, arXiv 1706.04599, of a part of the logits). It is not part of the next-item loss, which would learn
smaller vectors to undo it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.ranking import CatalogueRanker
from trainer.sequences.held_out import HeldOut

STRENGTHS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
_LEARNED_STRENGTH = STRENGTHS.index(1.0)
# With fewer held-out events than this the standard error is too uncertain to compare eight strengths.
_MIN_EVENTS = 100


@torch.no_grad()
def fit_repeat_strength(
    model: GeneratorForCausalLM, ranker: CatalogueRanker, held_out: HeldOut, k: int = 10
) -> float:
    """Set `repeat_strength` to the strength with the best NDCG at k on held-out events, and return it.

    It is 1 for fewer than a hundred events, and where the best strength is not better than 1 by two standard
    errors of the difference.
    """
    model.model.items.repeat_strength.fill_(1.0)
    if len(held_out.targets) < _MIN_EVENTS:
        return 1.0
    gains = _ndcg_by_strength(ranker, held_out, k)
    best = int(gains.mean(1).argmax())
    improvement = gains[best] - gains[_LEARNED_STRENGTH]
    if float(improvement.mean()) <= 2 * float(improvement.std(correction=0)) / len(improvement) ** 0.5:
        return 1.0
    model.model.items.repeat_strength.fill_(STRENGTHS[best])
    return STRENGTHS[best]


def _ndcg_by_strength(ranker: CatalogueRanker, held_out: HeldOut, k: int) -> Tensor:
    """NDCG at k (S, B) of each target under each of the strengths, by the dense head over all items."""
    parts = []
    for targets, logits, (batch, history_items, bias) in ranker.dense_logits(held_out):
        rows = torch.arange(len(targets), device=logits.device)
        gains = []
        for factor in STRENGTHS:
            total = logits.index_put((batch, history_items), factor * bias, accumulate=True)
            rank = (total > total[rows, targets][:, None]).sum(1)
            gains.append(torch.where(rank < k, 1.0 / torch.log2(rank + 2.0), 0.0))
        parts.append(torch.stack(gains).cpu())
    return torch.cat(parts, dim=1)
