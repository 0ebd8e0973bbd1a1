"""Ranking quality of a generator on held-out next items, and the share of its free answers that are SIDs."""

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
from trainer.generator.constrained import SidSet, spells_known_sids
from trainer.generator.model import GeneratorForCausalLM
from trainer.generator.torch_generator import TorchGenerator
from trainer.offline_checks.bootstrap import relative_changes
from trainer.offline_checks.ranking import ROWS_PER_FORWARD
from trainer.offline_checks.served_lists import ListScorer, ServedLists
from trainer.sequences.held_out import HeldOut
from trainer.sequences.interactions import TrainingCatalogue

Mask = npt.NDArray[np.bool_]


def _no_users() -> Mask:
    return np.zeros(0, dtype=np.bool_)


@dataclass(frozen=True)
class HeldOutQuality:
    """Ranking of held-out next items: the lists that serving gives (trainer.offline_checks.served_lists)."""

    users: int
    hr10: float
    ndcg10: float
    validity: float  # share of answers spelled without the constraint that are known SIDs
    ranking: Ranking  # how the two heads were mixed
    purchases: int = 0  # users whose held-out item was bought
    purchase_hr10: float = 0.0  # of these alone
    # (users,) of each, for comparisons: whether the item is among the ten best, and whether it was bought.
    hits: Mask = field(default_factory=_no_users, repr=False, compare=False)
    paid: Mask = field(default_factory=_no_users, repr=False, compare=False)


def for_json(result: Any) -> dict[str, Any]:
    """A dataclass as a dictionary for JSON, without the arrays of single users in it."""

    def numbers(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        return {
            name: msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else value
            for name, value in pairs
            if not isinstance(value, np.ndarray)
        }

    return asdict(result, dict_factory=numbers)


def describe_change(before: HeldOutQuality, now: HeldOutQuality) -> str:
    """The change of HR@10 from one model to another over the same held-out users, as text.

    Separately for held-out clicks and purchases, each with the 95 % interval of the ratio over the users. A
    group without users or hits is left out.
    """
    parts = []
    for action, users in (("clicked", ~before.paid), ("bought", before.paid)):
        old, new = before.hits[users].astype(float), now.hits[users].astype(float)
        if not len(old) or not old.any():
            continue
        change, low, high = relative_changes(new[:, None], old[:, None], np.arange(len(old)))[0]
        parts.append(
            f"of what was {action} {old.mean():.3f} -> {new.mean():.3f} ({change:+.1%}, "
            f"{low:+.1%} to {'no bound' if np.isinf(high) else f'{high:+.1%}'})"
        )
    return f"HR@10 {', '.join(parts)}" if parts else ""


def hr_ndcg(rank: Tensor, k: int = 10) -> tuple[float, float]:
    """Hit rate and NDCG at k of one relevant item a row, from ranks that count from 0."""
    if not len(rank):
        return 0.0, 0.0
    hit = rank < k
    gain = torch.where(hit, 1.0 / torch.log2(rank + 2.0), 0.0)
    return float(hit.float().mean()), float(gain.mean())


@torch.no_grad()
def rank_held_out(
    model: GeneratorForCausalLM, held_out: HeldOut, catalogue: TrainingCatalogue, sids: SidSet,
    ranking: Ranking | None = None,
) -> tuple[Tensor, Tensor, Ranking]:  # fmt: skip
    """The place (B,) from 0 of each held-out item in the list that its user would be served (LIST_LENGTH:
    not in it), whether (B,) the free answer is a SID, and the ranking.

    `ranking` None: the one that is fitted to the held-out items. B >= 1.
    """
    scorer = TorchGenerator(model)
    lists = ServedLists(scorer, held_out, catalogue, sids.prompt.max_items)
    if ranking is None:
        ranking, ranks = lists.fit_ranking()
    else:
        ranks = lists.target_ranks(ranking)
    states = scorer.states(lists.encoded())
    valid = torch.cat([spells_known_sids(model, part, sids) for part in states.split(ROWS_PER_FORWARD)])
    return torch.from_numpy(ranks), valid.cpu(), ranking


@torch.no_grad()
def evaluate_held_out(
    model: GeneratorForCausalLM, held_out: HeldOut, catalogue: TrainingCatalogue, sids: SidSet,
    ranking: Ranking | None = None,
) -> HeldOutQuality:  # fmt: skip
    """HR@10, NDCG@10 and validity on held-out items, under `ranking`, or the one that is fitted to them."""
    if not len(held_out.targets):
        model.eval()
        return HeldOutQuality(0, 0.0, 0.0, 0.0, ranking or Ranking())
    rank, valid, ranking = rank_held_out(model, held_out, catalogue, sids, ranking)
    return _quality(rank, held_out, float(valid.float().mean()), ranking)


def bundle_quality(
    bundle: ListScorer, held_out: HeldOut, catalogue: TrainingCatalogue, max_items: int,
    trained: HeldOutQuality,
) -> HeldOutQuality:  # fmt: skip
    """The quality of a bundle's files, under the ranking that its model was `trained` to.

    Validity stays that of the model: serving never spells freely.
    """
    rank = ServedLists(bundle, held_out, catalogue, max_items).target_ranks(trained.ranking)
    return _quality(torch.from_numpy(rank), held_out, trained.validity, trained.ranking)


def _quality(rank: Tensor, held_out: HeldOut, validity: float, ranking: Ranking) -> HeldOutQuality:
    hr, ndcg = hr_ndcg(rank)
    paid = (
        np.zeros(len(held_out.targets), dtype=bool)
        if held_out.target_bought is None
        else held_out.target_bought
    )
    return HeldOutQuality(
        len(held_out.targets), hr, ndcg, validity, ranking,
        int(paid.sum()), hr_ndcg(rank[torch.from_numpy(paid)])[0], (rank < 10).numpy(), paid,
    )  # fmt: skip
