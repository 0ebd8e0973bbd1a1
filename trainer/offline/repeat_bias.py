"""How much items of the past weigh beside all others, fitted where the generator was not trained.

What the dense head adds to items of the past (`trainer.generator.items.ItemTable.again`) has a dozen vectors,
and is learned beside a vector of every item. In a log of few users the latter know by heart what each user
went to, and say so with a certainty that held-out events do not bear out: what is added, right in training,
is too little there. On such events one factor is fitted (a temperature, Guo et al. 2017, arXiv 1706.04599, of
a part of the logits). It is not part of the next-item loss, which would only undo it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.generator.model import GeneratorForCausalLM
from trainer.offline.ranking import Ranker
from trainer.sequences.held_out import HeldOut

STRENGTHS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
_AS_LEARNED = STRENGTHS.index(1.0)
# Fewer held-out events than this say nothing of eight strengths: their standard error is a guess itself.
_LEAST = 100


@torch.no_grad()
def strengthen(model: GeneratorForCausalLM, ranker: Ranker, held: HeldOut, k: int = 10) -> float:
    """Give what is added to the past the strength with the best NDCG at k on held-out events, and return it.

    It is 1 unless the best of a hundred events and more is better by two standard errors of their difference.
    """
    model.model.items.strength.fill_(1.0)
    if len(held.targets) < _LEAST:
        return 1.0
    gains = _gains(ranker, held, k)
    best = int(gains.mean(1).argmax())
    more = gains[best] - gains[_AS_LEARNED]
    if float(more.mean()) <= 2 * float(more.std(correction=0)) / len(more) ** 0.5:
        return 1.0
    model.model.items.strength.fill_(STRENGTHS[best])
    return STRENGTHS[best]


def _gains(ranker: Ranker, held: HeldOut, k: int) -> Tensor:
    """NDCG at k (S, B) of each target under each of the strengths, by the dense head over all items."""
    parts = []
    for targets, logits, (batch, past, more) in ranker.dense_logits(held):
        mine = torch.arange(len(targets), device=logits.device)
        found = []
        for factor in STRENGTHS:
            whole = logits.index_put((batch, past), factor * more, accumulate=True)
            rank = (whole > whole[mine, targets][:, None]).sum(1)
            found.append(torch.where(rank < k, 1.0 / torch.log2(rank + 2.0), 0.0))
        parts.append(torch.stack(found).cpu())
    return torch.cat(parts, dim=1)
