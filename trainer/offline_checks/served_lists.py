"""Held-out users as requests, and the lists that serving answers them: the source of every offline figure.

A held-out event is a request from the page of the newest item of its history, as serving gets it: the prompt
is the history, the page's own item is left out of the list, and so is what the repeat rule leaves out. The
search is that of serving (registry.decoding), within the limits of serving, over the items that are active.
The scores come from torch in training (`TorchGenerator`), and from the files of a bundle when it is done
(`OnnxGenerator`).

Shapes: B held-out users, V requests (a user under a rule), W weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from registry.bundles.ranking import Ranking, RepeatRule
from registry.decoding.beam import Candidates, DenseHead, Generator, ItemScorer, find_candidates
from registry.decoding.list_rules import ListLimits, excluded_leaves
from registry.decoding.sid_index import SidIndex
from trainer.sequences.batches import Int64
from trainer.sequences.held_out import HeldOut
from trainer.sequences.interactions import TrainingCatalogue

# Places of a list: figures are of the first ten, which is what a page shows.
LIST_LENGTH = 10
DENSE_WEIGHTS = tuple(round(0.1 * step, 1) for step in range(11))
_HOUR, _DAY = 3600, 86_400
REPEAT_RULES = (
    RepeatRule(), RepeatRule(repeats="bought"), RepeatRule(repeats="never"),
    *(RepeatRule(repeats="within", within_s=seconds) for seconds in (_HOUR, _DAY, 7 * _DAY, 30 * _DAY)),
)  # fmt: skip
# Requests of one search, and numbers of the largest array of one: 128 MiB of scores of all items.
_REQUESTS, _SCORES = 256, 1 << 25


class ListScorer(Generator, Protocol):
    """A generator with its dense head."""

    @property
    def items(self) -> ItemScorer | None:
        """The dense head; None where there is none."""


@dataclass(frozen=True)
class HeldOutRequests:
    """Requests of held-out users under rules; a user whose rules leave out the same is one request."""

    user: Int64  # (V,) row of the held-out event
    excluded: list[frozenset[int]]  # (V,) leaves that the list leaves out
    of_rule: Int64  # (rules, B) the request of each user under each rule

    def take(self, places: Int64) -> HeldOutRequests:
        """The requests at `places` (N,), without the rules that they are of."""
        excluded = [self.excluded[place] for place in places.tolist()]
        return HeldOutRequests(self.user[places], excluded, np.zeros((0, 0), dtype=np.int64))


class ServedLists:
    """The lists of held-out users over one catalogue, by a model or by a bundle."""

    def __init__(
        self, scorer: ListScorer, held_out: HeldOut, catalogue: TrainingCatalogue, max_items: int,
        index: SidIndex | None = None,
    ) -> None:  # fmt: skip
        """`max_items`: items of a prompt, the newest kept. `index`: another index of the catalogue's items
        and further ones; default: the catalogue's."""
        self.scorer, self.held_out, self.catalogue = scorer, held_out, catalogue
        self.index = catalogue.index if index is None else index
        sids = np.array(catalogue.sids, dtype=np.int64).reshape(len(catalogue.sids), -1)
        self._histories = [sids[history] for history in held_out.histories]
        # With the newest item as the page's, the prompt is the history (registry.bundles.prompt.prompt_sids).
        self._prompts: list[Any] = [history[-max_items:] for history in self._histories]
        contexts = held_out.contexts
        self._contexts = contexts if contexts is not None and contexts.shape[1] else None
        self.targets = np.array(
            [self.index.leaf_of(catalogue.item_ids[row]) for row in held_out.targets.tolist()], dtype=np.int64
        )

    def encoded(self) -> npt.NDArray[np.generic]:
        """What the scorer encodes the users' prompts to (B, ...)."""
        contexts = None if self._contexts is None else self._contexts.tolist()
        return self.scorer.encode(self._prompts, contexts)

    def requests(self, rules: Sequence[RepeatRule]) -> HeldOutRequests:
        """Each held-out user's requests under the rules."""
        held_out, names = self.held_out, self.catalogue.item_ids
        number_of: dict[tuple[int, frozenset[int]], int] = {}
        of_rule = np.zeros((len(rules), len(held_out.targets)), dtype=np.int64)
        for user, history in enumerate(held_out.histories):
            page = [names[history[-1]]] if len(history) and self.catalogue.newest_is_page else []
            for rule_number, rule in enumerate(rules):
                leaves = excluded_leaves(
                    self.index, page, rule, self._histories[user], held_out.bought[user],
                    held_out.ages_s[user],
                )  # fmt: skip
                key = (user, frozenset(leaves))
                of_rule[rule_number, user] = number_of.setdefault(key, len(number_of))
        users = np.array([user for user, _ in number_of], dtype=np.int64)
        return HeldOutRequests(users, [leaves for _, leaves in number_of], of_rule)

    def candidates(self, requests: HeldOutRequests, limits: ListLimits | None = None) -> list[Candidates]:
        """The candidates of the requests, in parts of some requests each, numbered from 0 in each part."""
        limits = limits or self.catalogue.limits
        items = self.scorer.items
        dense = None if items is None else DenseHead(items, limits.exact_items)
        size = max(1, min(_REQUESTS, _SCORES // max(1, len(self.index))))
        width = max(limits.beam, LIST_LENGTH)
        parts = []
        for low in range(0, len(requests.user), size):
            users = requests.user[low : low + size]
            parts.append(
                find_candidates(
                    self.scorer, self.index, [self._prompts[user] for user in users.tolist()],
                    requests.excluded[low : low + size], [width] * len(users), dense,
                    None if self._contexts is None else self._contexts[users].tolist(),
                )
            )  # fmt: skip
        return parts

    def ranks(self, requests: HeldOutRequests, weights: Sequence[float]) -> Int64:
        """The place (W, V) from 0 of each request's target in its list under each weight of the dense head;
        LIST_LENGTH where the list does not have it."""
        ranks = np.full((len(weights), len(requests.user)), LIST_LENGTH, dtype=np.int64)
        low = 0
        for part in self.candidates(requests):
            count = part.invalid_mass.shape[1]
            targets = self.targets[requests.user[low : low + count]]
            for number, weight in enumerate(weights):
                ranks[number, low : low + count] = _target_ranks(part, targets, weight)
            low += count
        return ranks

    def target_ranks(self, ranking: Ranking) -> Int64:
        """The place (B,) from 0 of each held-out item in its user's list, LIST_LENGTH where it has not."""
        requests = self.requests([self.catalogue.limits.repeats or ranking])
        return self.ranks(requests, [ranking.dense_weight])[0, requests.of_rule[0]]

    def fit_ranking(self) -> tuple[Ranking, Int64]:
        """The rule with the best NDCG on the held-out events, equals going to the simpler one, and its
        weight; and the targets' places (B,) under them.

        The weight is the largest that is within one standard error of the best (the rule of Breiman et al.
        1984): a few thousand events cannot tell .8 from 1, and the dense head alone is the steadier.
        """
        weights = (0.0,) if self.scorer.items is None else DENSE_WEIGHTS
        # A rule that serving is set to is not the bundle's to choose.
        set_rule = self.catalogue.limits.repeats
        rules = REPEAT_RULES if set_rule is None else (set_rule,)
        requests = self.requests(rules)
        ranks = self.ranks(requests, weights)[:, requests.of_rule]
        gain = np.append(1 / np.log2(np.arange(LIST_LENGTH) + 2.0), 0.0)
        best_mean, best_rule = -1.0, 0
        for number in range(len(rules)):
            mean = float(gain[ranks[:, number]].mean(1).max())
            if mean > best_mean + 1e-9:
                best_mean, best_rule = mean, number
        gains = gain[ranks[:, best_rule]]
        shortfall = gains[gains.mean(1).argmax()] - gains
        error = shortfall.std(1) / max(1, shortfall.shape[1]) ** 0.5
        near_best = np.flatnonzero(shortfall.mean(1) <= error)
        rule, weight = rules[best_rule], weights[near_best[-1]]
        ranking = Ranking(dense_weight=weight, repeats=rule.repeats, within_s=rule.within_s)
        return ranking, ranks[near_best[-1], best_rule]


def _target_ranks(candidates: Candidates, targets: Int64, weight: float) -> Int64:
    """The place (V,) from 0 of each request's target leaf (V,) in its list; LIST_LENGTH where it has not."""
    listed, score = candidates.under(weight)
    is_target = listed.leaf == targets[listed.request]
    place = np.full(len(targets), -1, dtype=np.int64)
    place[listed.request[is_target]] = np.flatnonzero(is_target)
    has_target = place >= 0
    target_place = place[listed.request]
    target_score: npt.NDArray[np.float32] = score[target_place]
    # Of equals the lower SID is first, and candidates are in the order of their SIDs.
    before = (score > target_score) | ((score == target_score) & (np.arange(len(score)) < target_place))
    rank = np.bincount(listed.request[before & has_target[listed.request]], minlength=len(targets))
    return np.where(has_target, np.minimum(rank, LIST_LENGTH), LIST_LENGTH).astype(np.int64)
