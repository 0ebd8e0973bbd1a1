"""Constrained beam search: the k best items under a generator, over nothing but allowed items.

Where a bundle has a dense head, its own best items join the beam's, and the order is a mixture of both
log-probabilities (registry.bundles.ranking).

The score of an item is the sum of its codes' log-probabilities over the whole vocabulary, never
renormalised to the allowed codes, so that scores compare across requests and the probability that a model
spends on codes no item has (`invalid_mass`) stays visible. SIDs have one length, so there is no length
penalty. Sums run in float32, level by level, as in transformers' beam search, so that the order is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from registry.decoding.item_vectors import Floats
from registry.decoding.sid_index import Ints, Sid, SidIndex


class Generator(Protocol):
    """A model that scores SIDs code by code. Index and rules do not depend on which model it is."""

    sizes: tuple[int, ...]  # K_l: codes of each level

    def encode(
        self, prompts: Sequence[Sequence[Sid]], contexts: Sequence[Sequence[int]] | None = None
    ) -> NDArray[np.generic]:
        """B prompts, each SIDs oldest first (may be empty) -> an array of B rows, one state a prompt.

        contexts: (B, C) token ids, 0 where a field has no value; None: no request has a context.
        """

    def step(self, state: NDArray[np.generic], prefix: Ints) -> Floats:
        """States of N beams and the codes they have chosen (N, l) -> log-probabilities (N, K_l), float32."""


class ItemScorer(Protocol):
    """The dense head of a model: queries of states, and the items' vectors that they are multiplied with."""

    def add_new_items(self, index: SidIndex, title_of: Callable[[str], str]) -> None:
        """Give items of the index that came after the training a vector from their titles."""

    def project_queries(self, state: NDArray[np.generic]) -> Floats:
        """States (R, ...) -> queries (R, D) float32."""

    def item_matrix(self, index: SidIndex) -> Floats:
        """The vectors (N, D) float32 of the index's items, in leaf order."""

    def repeat_bias(self, query: Floats, owner: Ints, distances: Ints, counts: Ints) -> Floats:
        """The addend (n,) to the logits of n items of histories: see ItemVectors.repeat_bias."""


@dataclass(frozen=True)
class DenseHead:
    """The dense head. In catalogues of more than `exact_up_to` items it scores the beam's items alone."""

    items: ItemScorer
    exact_up_to: int
    title_of: Callable[[str], str] = lambda _: ""  # of an item_id; empty where it is not known


@dataclass(frozen=True)
class RankedLeaves:
    """One request's answer: leaves of the index (n,), best first, and their scores (n,) float32."""

    leaves: Ints
    scores: Floats
    # invalid_mass[l]: probability that the beams spend on codes without an allowed item, in [0, 1].
    invalid_mass: tuple[float, ...]


@dataclass(frozen=True)
class Candidates:
    """M candidates of R requests, sorted by request and then by leaf, with the scores of both heads."""

    request: Ints  # (M,)
    leaf: Ints  # (M,)
    sid: Floats  # (M,) log-probability of the SID
    dense: Floats  # (M,) of the item by the dense head, among what it scored; zeros without one
    in_beam: NDArray[np.bool_]  # (M,) the beam ended in it; the others are the dense head's own best
    invalid_mass: NDArray[np.float64]  # (L, R), see RankedLeaves

    def under(self, dense_weight: float) -> tuple[Candidates, Floats]:
        """The candidates of a mixture, and their scores: without the dense head the beam's alone."""
        if dense_weight == 0:
            kept = replace(
                self, request=self.request[self.in_beam], leaf=self.leaf[self.in_beam],
                sid=self.sid[self.in_beam], dense=self.dense[self.in_beam],
                in_beam=self.in_beam[self.in_beam],
            )  # fmt: skip
            return kept, kept.sid
        if dense_weight == 1:
            return self, self.dense
        return self, ((1 - dense_weight) * self.sid + dense_weight * self.dense).astype(np.float32)

    def ranked(self, dense_weight: float, k: Sequence[int]) -> list[RankedLeaves]:
        """The k[r] best of each request r under a weight of the dense head; ties go to the lower SID."""
        candidates, score = self.under(dense_weight)
        bounds = np.searchsorted(candidates.request, np.arange(len(k) + 1))
        lists = []
        for r, (start, end) in enumerate(pairwise(bounds.tolist())):
            order = start + np.argsort(-score[start:end], kind="stable")[: k[r]]
            invalid = tuple(float(mass) for mass in self.invalid_mass[:, r])
            lists.append(RankedLeaves(candidates.leaf[order], score[order], invalid))
        return lists


def beam_search(
    generator: Generator,
    index: SidIndex,
    prompts: Sequence[Sequence[Sid]],
    excluded: Sequence[Iterable[int]],
    k: Sequence[int],
    beam: int,
    dense: DenseHead | None = None,
    dense_weight: float = 0.0,
    contexts: Sequence[Sequence[int]] | None = None,
) -> list[RankedLeaves]:
    """Answer R requests at once: the k[r] best items of request r under a weight of the dense head.

    A request gets k[r] items whenever that many are allowed: each beam has an allowed leaf below it, and a
    request keeps max(beam, k[r]) of them. See `find_candidates`.
    """
    head = dense if dense_weight > 0 else None
    widths = [max(beam, items_wanted) for items_wanted in k]
    candidates = find_candidates(generator, index, prompts, excluded, widths, head, contexts)
    return candidates.ranked(dense_weight, k)


def find_candidates(
    generator: Generator,
    index: SidIndex,
    prompts: Sequence[Sequence[Sid]],
    excluded: Sequence[Iterable[int]],
    widths: Sequence[int],
    dense: DenseHead | None = None,
    contexts: Sequence[Sequence[int]] | None = None,
) -> Candidates:
    """The widths[r] best leaves of each request r by the beam, and as many by the dense head.

    One call of the generator a level, for all beams of all requests. `excluded[r]`: leaves that request r
    leaves out. Ties go to the lower SID. `contexts[r]`: context token ids of request r. Raises ValueError
    where the model's answer is not a number.
    """
    total = len(prompts)
    exclusions = index.exclusions(excluded)
    if dense is not None:
        dense.items.add_new_items(index, dense.title_of)
    state = generator.encode(prompts) if contexts is None else generator.encode(prompts, contexts)
    request = np.arange(total)
    node = np.zeros(total, dtype=np.int64)
    score = np.zeros(total, dtype=np.float32)
    prefix = np.zeros((total, 0), dtype=np.int64)
    invalid = np.zeros((index.levels, total))
    for level in range(index.levels):
        parent, child = index.expand(level, node, request, exclusions)
        if not len(parent):
            return _no_candidates(index.levels, total)
        log_probs = generator.step(state[request], prefix)
        code = index.codes[level][child]
        code_log_probs = log_probs[parent, code]
        if np.isnan(code_log_probs).any():
            raise ValueError(f"the model's log-probabilities of level {level} are not numbers")
        invalid[level] = _invalid_mass(total, request, score, parent, code_log_probs)
        best = _best(score[parent] + code_log_probs, request[parent], widths)
        parent, node, code = parent[best], child[best], code[best]
        request, score = request[parent], score[parent] + code_log_probs[best]
        prefix = np.concatenate((prefix[parent], code[:, None]), axis=1)
    beam = Candidates(request, node, score, np.zeros_like(score), np.ones(len(node), dtype=np.bool_), invalid)
    if dense is None:
        return beam
    batch = _EncodedRequests(generator, index, prompts, state, excluded, widths)
    return _with_dense_scores(batch, dense, beam)


def _no_candidates(levels: int, total: int) -> Candidates:
    none, no_scores = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    return Candidates(
        none, none, no_scores, no_scores, np.zeros(0, dtype=np.bool_), np.zeros((levels, total))
    )


@dataclass(frozen=True)
class _EncodedRequests:
    """R requests, their states (R, ...), excluded leaves, and how many candidates each keeps."""

    generator: Generator
    index: SidIndex
    prompts: Sequence[Sequence[Sid]]
    state: NDArray[np.generic]
    excluded: Sequence[Iterable[int]]
    widths: Sequence[int]


def _with_dense_scores(batch: _EncodedRequests, dense: DenseHead, beam: Candidates) -> Candidates:
    """The beam's candidates and the dense head's own best items, with the scores of both."""
    index = batch.index
    query, matrix = dense.items.project_queries(batch.state), dense.items.item_matrix(index)
    past_request, past_leaf, bias = _repeat_bias(index, dense.items, batch.prompts, query)
    if len(index) > dense.exact_up_to:
        logits = np.einsum("nd,nd->n", query[beam.request], matrix[beam.leaf])
        past, key = past_request * len(index) + past_leaf, beam.request * len(index) + beam.leaf
        at = np.minimum(np.searchsorted(past, key), max(0, len(past) - 1))
        in_history = past[at] == key if len(past) else np.zeros(len(key), dtype=np.bool_)
        logits[in_history] += bias[at[in_history]]
        return replace(beam, dense=_log_softmax(logits, beam.request, len(query)))
    logs = query @ matrix.T
    logs[past_request, past_leaf] += bias
    logs[:, ~index.active] = -np.inf
    for row, leaves in enumerate(batch.excluded):
        logs[row, list(leaves)] = -np.inf
    top = logs.max(axis=1, keepdims=True)
    logs -= top + np.log(np.exp(logs - top).sum(axis=1, keepdims=True))
    merged = _add_best_by_dense_score(batch, logs, beam)
    return replace(merged, dense=logs[merged.request, merged.leaf])


def _add_best_by_dense_score(batch: _EncodedRequests, logs: Floats, beam: Candidates) -> Candidates:
    """The beam's candidates and each request's best leaves by `logs` (R, N), all with the beam's scores."""
    rows, leaves = [], []
    for row, width in enumerate(batch.widths):
        width = min(width, logs.shape[1])
        best = np.argpartition(logs[row], logs.shape[1] - width)[logs.shape[1] - width :]
        best = best[logs[row, best] > -np.inf]
        rows.append(np.full(len(best), row))
        leaves.append(best)
    new_request, new_leaf = np.concatenate(rows), np.concatenate(leaves)
    keys, beam_keys = (
        request * logs.shape[1] + leaf
        for request, leaf in ((new_request, new_leaf), (beam.request, beam.leaf))
    )
    is_new = ~np.isin(keys, beam_keys)
    if not is_new.any():
        return beam
    new_request, new_leaf = new_request[is_new], new_leaf[is_new]
    new_score = sid_log_probs(batch.generator, batch.index, batch.state[new_request], new_leaf)
    request = np.concatenate((beam.request, new_request))
    leaf = np.concatenate((beam.leaf, new_leaf))
    order = np.lexsort((leaf, request))
    return Candidates(
        request[order], leaf[order], np.concatenate((beam.sid, new_score))[order],
        np.zeros(len(order), dtype=np.float32),
        np.concatenate((beam.in_beam, np.zeros(len(new_leaf), dtype=np.bool_)))[order], beam.invalid_mass,
    )  # fmt: skip


def _repeat_bias(
    index: SidIndex, items: ItemScorer, prompts: Sequence[Sequence[Sid]], query: Floats
) -> tuple[Ints, Ints, Floats]:
    """Request (n,), leaf (n,) and the dense head's repeat bias (n,) for every distinct item of a prompt,
    by request and then by leaf."""
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    sids = np.concatenate([
        np.asarray(prompt, dtype=np.int64).reshape(-1, index.levels) for prompt in prompts
    ])  # fmt: skip
    request = np.repeat(np.arange(len(prompts)), lengths)
    # From the end of the history: 1 for the newest item.
    distance = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(request))
    leaf = index.leaves_of_sids(sids)
    request, leaf, distance = (values[leaf >= 0] for values in (request, leaf, distance))
    keys, owner, counts = np.unique(request * len(index) + leaf, return_inverse=True, return_counts=True)
    last = np.full(len(keys), np.iinfo(np.int64).max)
    np.minimum.at(last, owner, distance)
    requests, leaves = np.divmod(keys, max(1, len(index)))
    return requests, leaves, items.repeat_bias(query, requests, last, counts)


def sid_log_probs(generator: Generator, index: SidIndex, state: NDArray[np.generic], leaves: Ints) -> Floats:
    """Log-probability of each leaf's SID (n,) under its state (n, ...); -inf where the model rules it out."""
    sids = index.sids[leaves].astype(np.int64)
    total = np.zeros(len(leaves), dtype=np.float32)
    for level in range(index.levels):
        total += generator.step(state, sids[:, :level])[np.arange(len(leaves)), sids[:, level]]
    return total


def _log_softmax(logits: Floats, request: Ints, total: int) -> Floats:
    """Log-probabilities (n,) among each request's own candidates."""
    top = np.full(total, -np.inf, dtype=np.float32)
    np.maximum.at(top, request, logits)
    mass = np.bincount(request, weights=np.exp(logits - top[request]), minlength=total)
    log_probs: Floats = (logits - top[request] - np.log(mass)[request]).astype(np.float32)
    return log_probs


def _best(score: Floats, request: Ints, widths: Sequence[int]) -> Ints:
    """Positions of each request's best candidates, at most widths[r], left in the order they came in.

    Candidates come by request and, within one, by ascending SID: beams stay in that order from level to
    level, so "the first of equals" is the lower SID.
    """
    starts = np.searchsorted(request, np.arange(len(widths) + 1))
    best_positions = []
    for width, start, end in zip(widths, starts[:-1], starts[1:], strict=True):
        here = score[start:end]
        if len(here) <= width:
            best_positions.append(np.arange(start, end))
            continue
        least = np.partition(here, len(here) - width)[len(here) - width]
        above = here > least
        # Fill up with the first of those that equal the least kept score.
        level = np.flatnonzero(here == least)[: width - int(above.sum())]
        above[level] = True
        best_positions.append(start + np.flatnonzero(above))
    return np.concatenate(best_positions)


def _invalid_mass(
    total: int, request: Ints, score: Floats, parent: Ints, code_log_probs: Floats
) -> NDArray[np.float64]:
    """(R,) probability outside the allowed codes, over each request's beams weighted by their probability."""
    inside = np.bincount(parent, weights=np.exp(code_log_probs), minlength=len(request))
    best = np.full(total, -np.inf)
    np.maximum.at(best, request, score)
    weight = np.exp(score - best[request])
    spent = np.bincount(request, weights=weight, minlength=total)
    lost = np.bincount(request, weights=weight * (1 - inside), minlength=total)
    return np.clip(np.divide(lost, spent, out=np.zeros(total), where=spent > 0), 0, 1)
