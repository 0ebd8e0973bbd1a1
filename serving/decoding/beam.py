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
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serving.decoding.index import Ints, Sid, SidIndex
from serving.decoding.items import Floats, Items


class Generator(Protocol):
    """What spells SIDs code by code. The index and the rules stay where the model behind this changes."""

    sizes: tuple[int, ...]  # K_l: codes of each level

    def encode(
        self, prompts: Sequence[Sequence[Sid]], contexts: Sequence[Sequence[int]] | None = None
    ) -> NDArray[np.generic]:
        """B prompts, each SIDs oldest first (may be empty) -> an array of B rows, one state a prompt.

        contexts: (B, C) token ids, 0 where nothing is said; None: nothing at all is said.
        """

    def step(self, state: NDArray[np.generic], prefix: Ints) -> Floats:
        """States of N beams and the codes they have chosen (N, l) -> log-probabilities (N, K_l), float32."""


@dataclass(frozen=True)
class Dense:
    """The dense head, and its weight in the final score, above 0.

    In catalogues of more than `exact` items it scores the beam's items alone.
    """

    items: Items
    weight: float
    exact: int
    title_of: Callable[[str], str] = lambda _: ""  # of an item_id; empty where it is not known


@dataclass(frozen=True)
class Ranking:
    """One request's answer: leaves of the index (n,), best first, and their scores (n,) float32."""

    leaves: Ints
    scores: Floats
    # invalid_mass[l]: probability that the beams spend on codes without an allowed item, in [0, 1].
    invalid_mass: tuple[float, ...]


def search(
    generator: Generator,
    index: SidIndex,
    prompts: Sequence[Sequence[Sid]],
    excluded: Sequence[Iterable[int]],
    k: Sequence[int],
    beam: int,
    dense: Dense | None = None,
    contexts: Sequence[Sequence[int]] | None = None,
) -> list[Ranking]:
    """Answer R requests at once: one call of the generator a level, for all beams of all requests.

    `excluded[r]`: leaves that request r leaves out. `k[r]`: items wanted, found whenever that many are
    allowed (each beam has an allowed leaf below it, and a request keeps max(beam, k[r]) of them). Ties go
    to the lower SID. `contexts[r]`: token ids of what request r says beside its prompt. Raises ValueError
    where the model's answer is not a number.
    """
    total = len(prompts)
    widths = [max(beam, wanted) for wanted in k]
    without = index.exclusions(excluded)
    if dense is not None:
        dense.items.meet(index, dense.title_of)
    state = generator.encode(prompts) if contexts is None else generator.encode(prompts, contexts)
    request = np.arange(total)
    node = np.zeros(total, dtype=np.int64)
    score = np.zeros(total, dtype=np.float32)
    prefix = np.zeros((total, 0), dtype=np.int64)
    invalid = np.zeros((index.levels, total))
    for level in range(index.levels):
        parent, child = index.expand(level, node, request, without)
        if not len(parent):
            nothing = np.zeros(0, dtype=np.int64)
            return [Ranking(nothing, nothing.astype(np.float32), (0.0,) * index.levels) for _ in prompts]
        log_probs = generator.step(state[request], prefix)
        code = index.codes[level][child]
        chosen = log_probs[parent, code]
        if np.isnan(chosen).any():
            raise ValueError(f"the model's log-probabilities of level {level} are not numbers")
        invalid[level] = _invalid_mass(total, request, score, parent, chosen)
        kept = _best(score[parent] + chosen, request[parent], widths)
        parent, node, code = parent[kept], child[kept], code[kept]
        request, score = request[parent], score[parent] + chosen[kept]
        prefix = np.concatenate((prefix[parent], code[:, None]), axis=1)
    if dense is not None:
        request, node, score = _mixed(
            generator, index, dense, prompts, state, excluded, widths, request, node, score
        )
    return [_ranking(r, request, node, score, k[r], invalid[:, r]) for r in range(total)]


def _mixed(
    generator: Generator, index: SidIndex, dense: Dense, prompts: Sequence[Sequence[Sid]],
    state: NDArray[np.generic], excluded: Sequence[Iterable[int]], widths: Sequence[int], request: Ints,
    leaf: Ints, score: Floats,
) -> tuple[Ints, Ints, Floats]:  # fmt: skip
    """The beam's candidates and the dense head's own, by request and leaf, with the mixture of scores."""
    query, matrix = dense.items.queries(state), dense.items.matrix(index)
    again = _again(index, dense.items, prompts, query)
    if len(index) > dense.exact:
        logits = np.einsum("nd,nd->n", query[request], matrix[leaf])
        added = {(row, at): value for row, at, value in zip(*again, strict=True)}
        logits += [added.get(pair, 0.0) for pair in zip(request.tolist(), leaf.tolist(), strict=True)]
        return request, leaf, _mixture(dense, score, _log_softmax(logits, request, len(query)))
    logs = query @ matrix.T
    logs[again[0], again[1]] += again[2]
    logs[:, ~index.active] = -np.inf
    for row, some in enumerate(excluded):
        logs[row, list(some)] = -np.inf
    top = logs.max(axis=1, keepdims=True)
    logs -= top + np.log(np.exp(logs - top).sum(axis=1, keepdims=True))
    held = set(zip(request.tolist(), leaf.tolist(), strict=True))
    own = []
    for row, width in enumerate(widths):
        width = min(width, logs.shape[1])
        best = np.argpartition(logs[row], logs.shape[1] - width)[logs.shape[1] - width :]
        own += [(row, at) for at in best.tolist() if logs[row, at] > -np.inf and (row, at) not in held]
    more = np.array(own, dtype=np.int64).reshape(-1, 2)
    if len(more):
        asked = spelled(generator, index, state[more[:, 0]], more[:, 1])
        request, leaf = np.concatenate((request, more[:, 0])), np.concatenate((leaf, more[:, 1]))
        score = np.concatenate((score, asked))
        order = np.lexsort((leaf, request))
        request, leaf, score = request[order], leaf[order], score[order]
    return request, leaf, _mixture(dense, score, logs[request, leaf])


def _again(
    index: SidIndex, items: Items, prompts: Sequence[Sequence[Sid]], query: Floats
) -> tuple[Ints, Ints, Floats]:
    """Request, leaf and what the dense head adds, for every item of a prompt, by its last place and count."""
    last: dict[tuple[int, int], int] = {}
    often: Counter[tuple[int, int]] = Counter()
    for request, prompt in enumerate(prompts):
        for place, sid in enumerate(prompt):
            leaf = index.leaf_of_sid(sid)
            if leaf is not None:
                last[request, leaf] = len(prompt) - place
                often[request, leaf] += 1
    pairs = np.array(list(last), dtype=np.int64).reshape(-1, 2)
    distances = np.array(list(last.values()), dtype=np.int64)
    counts = np.array([often[pair] for pair in last], dtype=np.int64)
    return pairs[:, 0], pairs[:, 1], items.again(query, pairs[:, 0], distances, counts)


def spelled(generator: Generator, index: SidIndex, state: NDArray[np.generic], leaves: Ints) -> Floats:
    """Log-probability of each leaf's SID (n,) under its state (n, ...); -inf where the model rules it out."""
    sids = index.sids[leaves].astype(np.int64)
    total = np.zeros(len(leaves), dtype=np.float32)
    for level in range(index.levels):
        total += generator.step(state, sids[:, :level])[np.arange(len(leaves)), sids[:, level]]
    return total


def _mixture(dense: Dense, spelled: Floats, scored: Floats) -> Floats:
    if dense.weight == 1:
        return scored.astype(np.float32)
    return ((1 - dense.weight) * spelled + dense.weight * scored).astype(np.float32)


def _log_softmax(logits: Floats, request: Ints, total: int) -> Floats:
    """Log-probabilities (n,) among each request's own candidates."""
    top = np.full(total, -np.inf, dtype=np.float32)
    np.maximum.at(top, request, logits)
    mass = np.bincount(request, weights=np.exp(logits - top[request]), minlength=total)
    made: Floats = (logits - top[request] - np.log(mass)[request]).astype(np.float32)
    return made


def _best(score: Floats, request: Ints, widths: Sequence[int]) -> Ints:
    """Positions of each request's best candidates, at most widths[r], left in the order they came in.

    Candidates come by request and, within one, by ascending SID: beams stay in that order from level to
    level, so "the first of equals" is the lower SID.
    """
    starts = np.searchsorted(request, np.arange(len(widths) + 1))
    kept = []
    for width, start, end in zip(widths, starts[:-1], starts[1:], strict=True):
        here = score[start:end]
        if len(here) <= width:
            kept.append(np.arange(start, end))
            continue
        least = np.partition(here, len(here) - width)[len(here) - width]
        above = here > least
        # Fill up with the first of those that equal the least kept score.
        level = np.flatnonzero(here == least)[: width - int(above.sum())]
        above[level] = True
        kept.append(start + np.flatnonzero(above))
    return np.concatenate(kept)


def _invalid_mass(
    total: int, request: Ints, score: Floats, parent: Ints, chosen: Floats
) -> NDArray[np.float64]:
    """(R,) probability outside the allowed codes, over each request's beams weighted by their probability."""
    inside = np.bincount(parent, weights=np.exp(chosen), minlength=len(request))
    best = np.full(total, -np.inf)
    np.maximum.at(best, request, score)
    weight = np.exp(score - best[request])
    spent = np.bincount(request, weights=weight, minlength=total)
    lost = np.bincount(request, weights=weight * (1 - inside), minlength=total)
    return np.clip(np.divide(lost, spent, out=np.zeros(total), where=spent > 0), 0, 1)


def _ranking(
    r: int, request: Ints, node: Ints, score: Floats, k: int, invalid: NDArray[np.float64]
) -> Ranking:
    start, end = np.searchsorted(request, (r, r + 1))
    order = np.argsort(-score[start:end], kind="stable")[:k]
    return Ranking(node[start:end][order], score[start:end][order], tuple(float(mass) for mass in invalid))
