"""How well a generator ranks held-out next items, and how much of what it spells freely is a SID."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from registry.bundles.ranking import Ranking
from trainer.generator.constrained import SidSet, greedy
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline.ranking import ROWS, Ranker, fit, ranks
from trainer.sequences.held_out import HeldOut
from trainer.sequences.interactions import TrainingCatalogue
from trainer.settings import TrainerSettings

# Two-sided, 95 %.
_SURE = 1.96
Mask = npt.NDArray[np.bool_]


def _nobody() -> Mask:
    return np.zeros(0, dtype=np.bool_)


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
    # (users,) of each, for comparisons: whether the item is among the ten best, and whether it was bought.
    hits: Mask = field(default_factory=_nobody, repr=False, compare=False)
    paid: Mask = field(default_factory=_nobody, repr=False, compare=False)


def for_json(result: Any) -> dict[str, Any]:
    """A dataclass as a dictionary for JSON, without what single users did in the qualities in it."""

    def numbers(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        return {
            name: msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else value
            for name, value in pairs
            if not isinstance(value, np.ndarray)
        }

    return asdict(result, dict_factory=numbers)


def told_change(before: Quality, now: Quality) -> str:
    """How HR@10 went from one model to another over the same held-out users, in words.

    Of what was clicked and of what was bought, each with the 95 % interval of the relative change, from the
    users' paired differences. A group without users or hits is left out.
    """
    said = []
    for what, of in (("clicked", ~before.paid), ("bought", before.paid)):
        old, new = before.hits[of].astype(float), now.hits[of].astype(float)
        if not len(old) or not old.any():
            continue
        change = new - old
        base, spread = old.mean(), _SURE * change.std() / len(change) ** 0.5
        low, high = (change.mean() - spread) / base, (change.mean() + spread) / base
        said.append(
            f"of what was {what} {base:.3f} -> {new.mean():.3f} ({change.mean() / base:+.1%}, "
            f"{low:+.1%} to {high:+.1%})"
        )
    return f"HR@10 {', '.join(said)}" if said else ""


def hr_ndcg(rank: Tensor, k: int = 10) -> tuple[float, float]:
    """Hit rate and NDCG at k of one relevant item a row, from ranks that count from 0."""
    if not len(rank):
        return 0.0, 0.0
    hit = rank < k
    gain = torch.where(hit, 1.0 / torch.log2(rank + 2.0), 0.0)
    return float(hit.float().mean()), float(gain.mean())


@torch.no_grad()
def ranked(
    model: GeneratorForCausalLM, held: HeldOut, known: TrainingCatalogue, sids: SidSet,
    settings: TrainerSettings,
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
    model: GeneratorForCausalLM, held: HeldOut, known: TrainingCatalogue, sids: SidSet,
    settings: TrainerSettings,
    ranking: Ranking | None = None,
) -> Quality:  # fmt: skip
    """HR@10, NDCG@10 and validity on held-out items, under a ranking or the one that fits them best."""
    if not len(held.targets):
        model.eval()
        return Quality(0, 0.0, 0.0, 0.0, ranking or Ranking())
    rank, valid, ranking = ranked(model, held, known, sids, settings, ranking)
    hr, ndcg = hr_ndcg(rank)
    paid = np.zeros(len(held.targets), dtype=bool) if held.target_bought is None else held.target_bought
    return Quality(
        len(held.targets), hr, ndcg, float(valid.float().mean()), ranking,
        int(paid.sum()), hr_ndcg(rank[torch.from_numpy(paid)])[0], (rank < 10).numpy(), paid,
    )  # fmt: skip
