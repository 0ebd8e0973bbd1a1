"""What stops a training and chooses its settings: one figure on one set of targets, for every model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from registry.bundles.ranking import RepeatRule, excluded_by_repeats
from trainer.evaluation.ranker import CHUNK
from trainer.evaluation.sequences import Bool, Int64
from trainer.evaluation.splits import EvaluationSplit
from trainer.offline_checks.served_lists import REPEAT_RULES
from trainer.sequences.held_out import HeldOut

# As many as the trainer's default: NDCG@10 then has a standard error near .007, and a validation costs little
# beside the training that it ends.
VALIDATION_USERS = 1000


def validation_targets(split: EvaluationSplit, users: int, seed: int, max_items: int) -> HeldOut:
    """The first validation target of each of up to `users` users, drawn by `seed`, in the order drawn.

    Each with the newest `max_items` of its history, how long before the target each was, and whether it had
    been bought by then. Ages are 0 where the data set has no times.
    """
    first: dict[int, int] = {}
    for place, user in enumerate(split.valid.users.tolist()):
        first.setdefault(user, place)
    drawn = np.random.default_rng(seed).permutation(sorted(first))[:users]
    places = [first[int(user)] for user in drawn]
    lengths = [len(split.valid.histories[place]) for place in places]
    about = [_history(split, int(user), length) for user, length in zip(drawn, lengths, strict=True)]
    return HeldOut(
        [split.valid.histories[place][-max_items:] for place in places],
        split.valid.targets[np.array(places, np.int64)],
        [ages_s[-max_items:] for ages_s, _ in about],
        [bought[-max_items:] for _, bought in about],
    )


def validation_users(split: EvaluationSplit, users: int, seed: int) -> Int64:
    """Whose targets `validation_targets` draws (B,), as rows of `SequenceDataset.users`, in its order."""
    return np.random.default_rng(seed).permutation(np.unique(split.valid.users))[:users]


def _history(split: EvaluationSplit, user: int, length: int) -> tuple[Int64, Bool]:
    """The first `length` events of a user before the next one: seconds to it, and whether each was bought."""
    dataset = split.dataset
    ages_s, bought = np.zeros(length, np.int64), np.zeros(length, np.bool_)
    if dataset.ts is not None:
        times = dataset.ts[user]
        ages_s = (times[length] - times[:length]) // 1000
    if dataset.bought is not None:
        bought = dataset.bought[user][:length].copy()
        if dataset.bought_ts is not None and dataset.ts is not None:
            # A purchase that comes after the target is not known yet.
            bought &= dataset.bought_ts[user][:length] < dataset.ts[user][length]
    return ages_s, bought


def best_rule_ndcg(score: Callable[[Sequence[Int64]], Tensor], targets: HeldOut, k: int = 10) -> float:
    """NDCG at `k` over all items, under the repeat rule that is the best for it; 0 without targets.

    `score`: b histories -> scores (b, I) of all items. The rules are those that the update cycle fits
    (`trainer.offline_checks.served_lists.REPEAT_RULES`): a model of the product stops by this figure as well.
    """
    if not len(targets.targets):
        return 0.0
    # Alike lengths together: less padding.
    order = np.argsort([len(row) for row in targets.histories], kind="stable")
    gains: list[list[Tensor]] = [[] for _ in REPEAT_RULES]
    for low in range(0, len(order), CHUNK):
        part = targets.take(order[low : low + CHUNK])
        scores = score(part.histories)
        target = torch.from_numpy(part.targets).to(scores.device)[:, None]
        beats_target = scores > scores.gather(1, target)
        rank_of_all = beats_target.sum(1)
        for gain, rule in zip(gains, REPEAT_RULES, strict=True):
            rows, items = (torch.from_numpy(places).to(scores.device) for places in _left_out(part, rule))
            rank = rank_of_all - torch.bincount(rows, beats_target[rows, items].double(), len(rank_of_all))
            listed = torch.ones(len(rank), dtype=torch.bool, device=scores.device)
            listed[rows[items == target[rows, 0]]] = False
            gain.append(torch.where(listed & (rank < k), 1 / torch.log2(rank + 2.0), 0.0))
    return max(float(torch.cat(gain).mean()) for gain in gains)


def _left_out(targets: HeldOut, rule: RepeatRule) -> tuple[Int64, Int64]:
    """The items that a rule leaves out: rows (M,) of `targets` and items (M,), no pair twice."""
    rows = np.repeat(np.arange(len(targets.targets)), [len(row) for row in targets.histories])
    items, ages_s, bought = (
        np.concatenate(parts) for parts in (targets.histories, targets.ages_s, targets.bought)
    )
    excluded = excluded_by_repeats(rule, bought, ages_s)
    pairs = np.unique(np.stack([rows[excluded], items[excluded]], axis=1), axis=0)
    return pairs[:, 0], pairs[:, 1]
