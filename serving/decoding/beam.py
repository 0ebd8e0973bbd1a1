"""Constrained beam search: the k best items under a generator, over nothing but allowed items.

Where a bundle has a dense head, its own best items join the beam's, and the order is a mixture of both
log-probabilities (registry.bundles.ranking).

The score of an item is the sum of its codes' log-probabilities over the whole vocabulary, never
renormalised to the allowed codes, so that scores compare across requests and the probability that a model
spends on codes no item has (`invalid_mass`) stays visible. SIDs have one length, so there is no length
penalty. Sums run in float32, level by level, as in transformers' beam search, so that the order is the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serving.decoding.item_vectors import Floats, ItemVectors
from serving.decoding.sid_index import Ints, Sid, SidIndex


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


@dataclass(frozen=True)
class DenseHead:
    """The dense head, and its weight in the final score, above 0.

    In catalogues of more than `exact` items it scores the beam's items alone.
    """

    items: ItemVectors
    weight: float
    exact_up_to: int
    title_of: Callable[[str], str] = lambda _: ""  # of an item_id; empty where it is not known


@dataclass(frozen=True)
class RankedLeaves:
    """One request's answer: leaves of the index (n,), best first, and their scores (n,) float32."""

    leaves: Ints
    scores: Floats
    # invalid_mass[l]: probability that the beams spend on codes without an allowed item, in [0, 1].
    invalid_mass: tuple[float, ...]


def beam_search(
    generator: Generator,
    index: SidIndex,
    prompts: Sequence[Sequence[Sid]],
    excluded: Sequence[Iterable[int]],
    k: Sequence[int],
    beam: int,
    dense: DenseHead | None = None,
    contexts: Sequence[Sequence[int]] | None = None,
) -> list[RankedLeaves]:
    """Answer R requests at once: one call of the generator a level, for all beams of all requests.

    `excluded[r]`: leaves that request r leaves out. `k[r]`: how many items request r gets whenever that many
    are allowed (each beam has an allowed leaf below it, and a request keeps max(beam, k[r]) of them). Ties go
    to the lower SID. `contexts[r]`: context token ids of request r. Raises ValueError where the model's
    answer is not a number.
    """
    total = len(prompts)
    widths = [max(beam, items_wanted) for items_wanted in k]
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
            nothing = np.zeros(0, dtype=np.int64)
            return [RankedLeaves(nothing, nothing.astype(np.float32), (0.0,) * index.levels) for _ in prompts]
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
    candidates = _Candidates(request, node, score)
    if dense is not None:
        batch = _EncodedRequests(generator, index, prompts, state, excluded, widths)
        candidates = _merge_dense_candidates(batch, dense, candidates)
    return [_ranked_leaves(r, candidates, k[r], invalid[:, r]) for r in range(total)]


@dataclass(frozen=True)
class _EncodedRequests:
    """R requests, their states (R, ...), excluded leaves, and how many candidates each keeps."""

    generator: Generator
    index: SidIndex
    prompts: Sequence[Sequence[Sid]]
    state: NDArray[np.generic]
    excluded: Sequence[Iterable[int]]
    widths: Sequence[int]


@dataclass(frozen=True)
class _Candidates:
    """M candidates, sorted by request and then by leaf: request (M,), leaf (M,) and score (M,) float32."""

    request: Ints
    leaf: Ints
    score: Floats


def _merge_dense_candidates(batch: _EncodedRequests, dense: DenseHead, beam: _Candidates) -> _Candidates:
    """The beam's candidates and the dense head's own best items, with the mixture of both scores."""
    index = batch.index
    query, matrix = dense.items.project_queries(batch.state), dense.items.item_matrix(index)
    past_request, past_leaf, bias = _repeat_bias(index, dense.items, batch.prompts, query)
    if len(index) > dense.exact_up_to:
        logits = np.einsum("nd,nd->n", query[beam.request], matrix[beam.leaf])
        bias_of = {(row, leaf): value for row, leaf, value in zip(past_request, past_leaf, bias, strict=True)}
        pairs = zip(beam.request.tolist(), beam.leaf.tolist(), strict=True)
        logits += [bias_of.get(pair, 0.0) for pair in pairs]
        dense_scores = _log_softmax(logits, beam.request, len(query))
        return replace(beam, score=_mix_scores(dense, beam.score, dense_scores))
    logs = query @ matrix.T
    logs[past_request, past_leaf] += bias
    logs[:, ~index.active] = -np.inf
    for row, leaves in enumerate(batch.excluded):
        logs[row, list(leaves)] = -np.inf
    top = logs.max(axis=1, keepdims=True)
    logs -= top + np.log(np.exp(logs - top).sum(axis=1, keepdims=True))
    merged = _add_best_by_dense_score(batch, logs, beam)
    return replace(merged, score=_mix_scores(dense, merged.score, logs[merged.request, merged.leaf]))


def _add_best_by_dense_score(batch: _EncodedRequests, logs: Floats, beam: _Candidates) -> _Candidates:
    """The beam's candidates and each request's best leaves by `logs` (R, N), all with the beam's scores."""
    in_beam = set(zip(beam.request.tolist(), beam.leaf.tolist(), strict=True))
    dense_only = []
    for row, width in enumerate(batch.widths):
        width = min(width, logs.shape[1])
        best = np.argpartition(logs[row], logs.shape[1] - width)[logs.shape[1] - width :]
        dense_only += [
            (row, leaf) for leaf in best.tolist() if logs[row, leaf] > -np.inf and (row, leaf) not in in_beam
        ]
    if not dense_only:
        return beam
    new_request, new_leaf = np.array(dense_only, dtype=np.int64).T
    new_score = sid_log_probs(batch.generator, batch.index, batch.state[new_request], new_leaf)
    request = np.concatenate((beam.request, new_request))
    leaf = np.concatenate((beam.leaf, new_leaf))
    score = np.concatenate((beam.score, new_score))
    order = np.lexsort((leaf, request))
    return _Candidates(request[order], leaf[order], score[order])


def _repeat_bias(
    index: SidIndex, items: ItemVectors, prompts: Sequence[Sequence[Sid]], query: Floats
) -> tuple[Ints, Ints, Floats]:
    """Request (n,), leaf (n,) and the dense head's repeat bias (n,) for every distinct item of a prompt."""
    last: dict[tuple[int, int], int] = {}
    occurrences: Counter[tuple[int, int]] = Counter()
    for request, prompt in enumerate(prompts):
        for place, sid in enumerate(prompt):
            leaf = index.leaf_of_sid(sid)
            if leaf is not None:
                last[request, leaf] = len(prompt) - place
                occurrences[request, leaf] += 1
    pairs = np.array(list(last), dtype=np.int64).reshape(-1, 2)
    distances = np.array(list(last.values()), dtype=np.int64)
    counts = np.array([occurrences[pair] for pair in last], dtype=np.int64)
    return pairs[:, 0], pairs[:, 1], items.repeat_bias(query, pairs[:, 0], distances, counts)


def sid_log_probs(generator: Generator, index: SidIndex, state: NDArray[np.generic], leaves: Ints) -> Floats:
    """Log-probability of each leaf's SID (n,) under its state (n, ...); -inf where the model rules it out."""
    sids = index.sids[leaves].astype(np.int64)
    total = np.zeros(len(leaves), dtype=np.float32)
    for level in range(index.levels):
        total += generator.step(state, sids[:, :level])[np.arange(len(leaves)), sids[:, level]]
    return total


def _mix_scores(dense: DenseHead, beam_scores: Floats, dense_scores: Floats) -> Floats:
    if dense.weight == 1:
        return dense_scores.astype(np.float32)
    return ((1 - dense.weight) * beam_scores + dense.weight * dense_scores).astype(np.float32)


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


def _ranked_leaves(r: int, candidates: _Candidates, k: int, invalid: NDArray[np.float64]) -> RankedLeaves:
    start, end = np.searchsorted(candidates.request, (r, r + 1))
    leaf, score = candidates.leaf[start:end], candidates.score[start:end]
    order = np.argsort(-score, kind="stable")[:k]
    return RankedLeaves(leaf[order], score[order], tuple(float(mass) for mass in invalid))
