"""How good a codebook's SIDs are: collisions, how evenly codes are used, and what neighbours share.

Collisions are counted in three ways, because one of them alone misleads: (N - U) / N with U distinct SIDs,
the share of items whose SID another item has too, and the sizes of such groups.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from registry.bundles.codebook import Codebook, unit
from registry.bundles.prompt import Sid
from trainer.codebooks.collaborative import WINDOW, cooccurrence

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

# Neighbours are looked for from so many items, evenly spread, among all.
MAX_NEIGHBOUR_QUERIES = 5_000


@dataclasses.dataclass(frozen=True)
class NearestCodes:
    """The nearest code at every level, before every item got a slot of its own."""

    collision_rate: float  # (N - U) / N
    collided: float  # share of items whose SID another item has too
    largest_group: int  # items of the SID that most items share
    p99_group: float  # 99th percentile of items a SID
    error: float  # mean squared distance to what the codes stand for, over that to the mean of all items
    moved: float  # share of items whose own SID is not the nearest codes
    moved_error: float  # the error of the SIDs that items have


@dataclasses.dataclass(frozen=True)
class LevelSpread:
    """How the items' codes of one level are spread."""

    size: int
    used: int
    perplexity: float  # exp of the entropy: as many codes in even use would be as surprising
    gini: float  # 0: all codes have as many items; near 1: one code has them all
    counts: tuple[int, ...]  # items of each code, fullest first


@dataclasses.dataclass(frozen=True)
class SharedPrefixes:
    """Share of items whose neighbour has the same first code, and the same first two."""

    first: float
    two: float
    chance: float  # share of pairs of any two items that have the same first code
    items: int  # items that were compared with a neighbour


@dataclasses.dataclass(frozen=True)
class CodebookReport:
    """The output of `sidstream sids report`. A part is None where the data that it needs is missing."""

    codebook: str
    items: int
    levels: tuple[LevelSpread, ...]
    prefixes: int  # prefixes, all codes but the last, with at least one item
    largest_prefix: int  # items of the fullest one
    headroom: float  # codes of the last level over that
    greedy: NearestCodes | None
    neighbours: SharedPrefixes | None  # the nearest in the space of vectors
    together: SharedPrefixes | None  # the item that most often stands next to it in user sequences

    def as_dict(self) -> dict[str, Any]:
        """Plain values, rounded to four places, for JSON."""
        fields: dict[str, Any] = round_floats(dataclasses.asdict(self))
        for level in fields["levels"]:
            del level["counts"]
        return fields


def codebook_report(
    codebook: Codebook,
    sids: Sequence[Sid],
    vectors: Float32 | None = None,
    sequences: Sequence[Int64] = (),
) -> CodebookReport:
    """Measure the SIDs of N >= 1 items; `vectors` (N, D) of the fit, `sequences` of rows of each user."""
    codes = np.array(sids, dtype=np.int64)
    prefixes = Counter(map(tuple, codes[:, :-1].tolist()))
    largest = max(prefixes.values())
    return CodebookReport(
        codebook=codebook.id,
        items=len(codes),
        levels=tuple(code_spread(codes[:, at], size) for at, size in enumerate(codebook.sizes)),
        prefixes=len(prefixes),
        largest_prefix=largest,
        headroom=codebook.sizes[-1] / largest,
        greedy=None if vectors is None else nearest_codes(codebook, vectors, codes),
        neighbours=None if vectors is None else _vector_neighbours(codes, vectors),
        together=_co_interacted_neighbours(codes, sequences),
    )


def nearest_codes(codebook: Codebook, vectors: Float32, own_codes: Int64) -> NearestCodes:
    """Collisions and error of the nearest codes of vectors (N, D).

    `own_codes`: the SIDs (N, L) that the items have.
    """
    codes, _ = codebook.quantise(vectors)
    groups = np.array(list(Counter(map(tuple, codes.tolist())).values()))
    latent = codebook.encode(vectors)
    mean_squared_distance = ((latent - latent.mean(axis=0)) ** 2).sum(axis=1).mean() or 1.0
    return NearestCodes(
        collision_rate=(len(codes) - len(groups)) / len(codes),
        collided=float(groups[groups > 1].sum() / len(codes)),
        largest_group=int(groups.max()),
        p99_group=float(np.percentile(groups, 99)),
        error=float(_squared_errors(codebook, latent, codes).mean() / mean_squared_distance),
        moved=float((codes != own_codes).any(axis=1).mean()),
        moved_error=float(_squared_errors(codebook, latent, own_codes).mean() / mean_squared_distance),
    )


def _squared_errors(codebook: Codebook, latent: Float64, codes: Int64) -> Float64:
    """Squared distances (N,) of quantised vectors (N, d) to the reconstructions of codes (N, L).

    Where residuals are scaled to unit length, the last distance is scaled back by all the lengths.
    """
    residual, length = latent, np.ones((len(latent), 1))
    for level, centroids in enumerate(codebook.centroids):
        if level and codebook.scaled:
            length = length * np.linalg.norm(residual, axis=1, keepdims=True)
            residual = unit(residual)
        residual = residual - centroids[codes[:, level]].astype(np.float64)
    errors: Float64 = ((length * residual) ** 2).sum(axis=1)
    return errors


def code_spread(codes: Int64, size: int) -> LevelSpread:
    """How codes (N,) of 0..size-1 are spread.

    Gini of the sorted counts x_(1) <= .. <= x_(K): (2 / (K S)) sum_i i x_(i) - (K + 1) / K, with S their sum.
    """
    counts = np.sort(np.bincount(codes, minlength=size)).astype(np.float64)
    total = counts.sum()
    share = counts[counts > 0] / total
    rank = np.arange(1, size + 1)
    fullest_first = counts[::-1].astype(np.int64).tolist()
    gini = 2.0 / (size * total) * float((rank * counts).sum()) - (size + 1) / size
    return LevelSpread(
        size, len(share), float(np.exp(-(share * np.log(share)).sum())), gini, tuple(fullest_first)
    )


def _vector_neighbours(codes: Int64, vectors: Float32) -> SharedPrefixes | None:
    if len(codes) < 2:
        return None
    rows = np.unique(np.linspace(0, len(codes) - 1, min(MAX_NEIGHBOUR_QUERIES, len(codes))).astype(np.int64))
    neighbours = np.empty(len(rows), dtype=np.int64)
    for begin in range(0, len(rows), 512):
        part = rows[begin : begin + 512]
        similarities = vectors[part] @ vectors.T
        similarities[np.arange(len(part)), part] = -np.inf
        neighbours[begin : begin + 512] = similarities.argmax(axis=1)
    return _shared_prefixes(codes, rows, neighbours)


def _co_interacted_neighbours(codes: Int64, sequences: Sequence[Int64]) -> SharedPrefixes | None:
    counts = cooccurrence(sequences, len(codes), WINDOW)
    rows = np.flatnonzero(np.diff(counts.indptr))
    if not len(rows):
        return None
    return _shared_prefixes(codes, rows, np.asarray(counts.argmax(axis=1)).ravel()[rows])


def _shared_prefixes(codes: Int64, rows: Int64, others: Int64) -> SharedPrefixes:
    first = codes[rows, 0] == codes[others, 0]
    two = first & (codes[rows, 1] == codes[others, 1])
    share = np.bincount(codes[:, 0]) / len(codes)
    return SharedPrefixes(float(first.mean()), float(two.mean()), float((share**2).sum()), len(rows))


def round_floats(value: Any) -> Any:
    """Plain values for JSON: every float of dicts and lists to four places."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: round_floats(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [round_floats(inner) for inner in value]
    return value
