"""The strength of the repeat bias, fitted on held-out events.

The repeat bias (`trainer.generator.items.ItemTable.repeat_vectors`) has a dozen vectors, and is learned
together with a vector of every item. In a log of few users the items' vectors overfit: they predict each
user's next items of the training with a certainty that held-out events do not confirm. So a repeat bias that
is right in training is too small on held-out events. There one factor of it is fitted (a temperature, Guo et
al. 2017, arXiv 1706.04599, of a part of the logits). It is not part of the next-item loss, which would learn
smaller vectors to undo it.
"""

from __future__ import annotations

import numpy as np
import torch

from registry.bundles.ranking import Ranking
from trainer.generator.constrained import SidSet
from trainer.generator.model import GeneratorForCausalLM
from trainer.generator.torch_generator import TorchGenerator
from trainer.offline_checks.served_lists import LIST_LENGTH, ServedLists
from trainer.sequences.held_out import HeldOut
from trainer.sequences.interactions import TrainingCatalogue

STRENGTHS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
_LEARNED_STRENGTH = STRENGTHS.index(1.0)
# With fewer held-out events than this the standard error is too uncertain to compare eight strengths.
_MIN_EVENTS = 100


@torch.no_grad()
def fit_repeat_strength(
    model: GeneratorForCausalLM, held_out: HeldOut, catalogue: TrainingCatalogue, sids: SidSet
) -> float:
    """Set `repeat_strength` to the strength with the best NDCG@10 on held-out events, and return it.

    It is 1 for fewer than a hundred events, and where the best strength is not better than 1 by two standard
    errors of the difference. The lists are those of the dense head, with items of the past.
    """
    strength = model.model.items.repeat_strength
    strength.fill_(1.0)
    if len(held_out.targets) < _MIN_EVENTS:
        return 1.0
    lists = ServedLists(TorchGenerator(model), held_out, catalogue, sids.prompt.max_items)
    gains = np.zeros((len(STRENGTHS), len(held_out.targets)))
    for number, factor in enumerate(STRENGTHS):
        strength.fill_(factor)
        rank = lists.target_ranks(Ranking(dense_weight=1.0))
        gains[number] = np.where(rank < LIST_LENGTH, 1 / np.log2(rank + 2.0), 0.0)
    best = int(gains.mean(1).argmax())
    improvement = gains[best] - gains[_LEARNED_STRENGTH]
    if improvement.mean() <= 2 * improvement.std() / len(improvement) ** 0.5:
        best = _LEARNED_STRENGTH
    strength.fill_(STRENGTHS[best])
    return STRENGTHS[best]
