"""How well a generator ranks held-out next items, and how much of what it spells freely is a SID."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from registry.ranking import Ranking
from trainer.constrained import SidSet, greedy
from trainer.data import Catalogue, Held
from trainer.generator import GeneratorForCausalLM
from trainer.ranking import ROWS, Ranker, fit, ranks
from trainer.settings import TrainerSettings


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


def hr_ndcg(rank: Tensor, k: int = 10) -> tuple[float, float]:
    """Hit rate and NDCG at k of one relevant item a row, from ranks that count from 0."""
    if not len(rank):
        return 0.0, 0.0
    hit = rank < k
    gain = torch.where(hit, 1.0 / torch.log2(rank + 2.0), 0.0)
    return float(hit.float().mean()), float(gain.mean())


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
