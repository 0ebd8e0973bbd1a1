"""Fit the codebook to a catalogue: residual k-means or an RQ-VAE on the items' vectors, then one SID an item.

The last level is sized from the fullest prefix, because a prefix holds no more items than the last level has
codes; head-room lets later items in below their own prefix.

A codebook that replaces another begins at the means of the old codes, and an item whose first code stays
what it was keeps its whole SID (the rule of DACT, SIGIR 2026), so that weights trained on the old SIDs stay
mostly valid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from registry.bundles.codebook import MAX_CODES, Codebook
from registry.bundles.embedder import Embedder, item_text
from registry.bundles.prompt import Sid
from registry.settings import CodebookSettings
from streams.errors import SidstreamError
from streams.events import CatalogItem
from trainer.codebooks.collaborative import collaborative_vectors, fuse_vectors
from trainer.codebooks.kmeans import (
    code_means,
    kmeans,
    mask_changed_codes,
    nearest_centroids,
    residual_kmeans,
)

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ReplacedCodebook:
    """The codebook that is replaced, and the SIDs that items have under it."""

    codebook: Codebook
    sids: Mapping[str, Sid]


@dataclass(frozen=True)
class FittedCodebook:
    """A fitted codebook; items in order of item_id with their vectors (N, D) and SIDs."""

    codebook: Codebook
    items: list[str]
    vectors: Float32
    sids: list[Sid]

    def unchanged_sids(self, old: ReplacedCodebook) -> int:
        """The number of items whose SID is the same as under `old`."""
        return sum(old.sids.get(item) == sid for item, sid in zip(self.items, self.sids, strict=True))


def fit_codebook(
    items: Sequence[CatalogItem],
    embedder: Embedder,
    settings: CodebookSettings,
    progress: Callable[[int], None] | None = None,
    *,
    sequences: Sequence[Sequence[str]] = (),
    old: ReplacedCodebook | None = None,
    runs: Path | None = None,
) -> FittedCodebook:
    """The codebook of a catalogue and a SID for each of its items.

    `sequences`: item_ids of each user in order of time, for the collaborative part. An `old` codebook with
    another number of levels is ignored. `progress(1)` is called once a level. `runs`: where an RQ-VAE keeps
    its checkpoint (trainer.codebooks.rqvae). Raises SidstreamError for an empty catalogue.
    """
    # SIDs are assigned in this order, so that they do not depend on the order of the records.
    ordered = sorted({item.item_id: item for item in items}.values(), key=lambda item: item.item_id)
    if not ordered:
        raise SidstreamError(
            "the catalogue is empty: publish items on topic catalog first (`sidstream replay`)"
        )
    names = [item.item_id for item in ordered]
    vectors = embedder.embed([item_text(item) for item in ordered])
    collaborative_dim = settings.collaborative_dim if settings.collaborative else 0
    if collaborative_dim:
        place = {name: row for row, name in enumerate(names)}
        rows = [np.array([place[i] for i in sequence if i in place], np.int64) for sequence in sequences]
        vectors = fuse_vectors(
            vectors, collaborative_vectors(rows, len(names), collaborative_dim), settings.collaborative
        )
    if old is not None and len(old.codebook.sizes) != settings.levels:
        old = None
    replaced = old.codebook if old else None
    before = [None if old is None else old.sids.get(name) for name in names]
    codebook = fit_codebook_to_vectors(
        vectors, embedder.id, settings, collaborative_dim, replaced, before, progress, runs
    )
    return FittedCodebook(codebook, names, vectors, assign_keeping(codebook, vectors, before))


def fit_codebook_to_vectors(
    vectors: Float32,
    embedder: str,
    settings: CodebookSettings,
    collaborative: int = 0,
    old: Codebook | None = None,
    sids: Sequence[Sid | None] = (),
    progress: Callable[[int], None] | None = None,
    runs: Path | None = None,
) -> Codebook:
    """The codebook of vectors (N, D), whose last `collaborative` columns later items may lack.

    `old`: the codebook that it replaces, with the same number of levels; `sids`: the vectors' SIDs under it.
    """
    seed, last_level = settings.seed, settings.levels - 1
    # No level has fewer codes than before, since SIDs of the old codebook are kept.
    min_sizes = old.sizes if old else (1,) * settings.levels
    sizes = [max(settings.size, size) for size in min_sizes]
    codes = None
    if old is not None:
        codes = np.array([sid or (-1,) * settings.levels for sid in sids], dtype=np.int64)
    if settings.method == "kmeans":
        levels, residual, prefixes = residual_kmeans(vectors, sizes[:-1], seed, old=codes, progress=progress)
        partial_codebook = Codebook(
            embedder, (*levels, np.zeros_like(levels[0][:1])), collaborative_dims=collaborative
        )
    else:
        partial_codebook = _rqvae_codebook(vectors, embedder, sizes, seed, collaborative, old, codes, runs)
        quantised, residual = partial_codebook.quantise(vectors)
        prefixes = quantised[:, :-1]
        if progress:
            progress(last_level)
    largest_prefix = max(Counter(map(tuple, prefixes.tolist())).values())
    size = max(last_level_size(largest_prefix, settings.headroom, settings.last), min_sizes[-1])
    start = None
    if codes is not None:
        same = (codes[:, :-1] == prefixes).all(axis=1)
        start = code_means(residual, np.where(same, codes[:, -1], -1), size, seed + last_level)
    levels = [*partial_codebook.centroids[:-1], kmeans(residual, size, seed + last_level, start)]
    if progress:
        progress(1)
    return Codebook(embedder, tuple(levels), partial_codebook.encoder, partial_codebook.scaled, collaborative)


def _rqvae_codebook(
    vectors: Float32, embedder: str, sizes: Sequence[int], seed: int, collaborative: int,
    old: Codebook | None, codes: Int64 | None, runs: Path | None,
) -> Codebook:  # fmt: skip
    """An RQ-VAE's codebook. The encoder of the replaced codebook stays where it fits these vectors.

    A new encoder, or the old one trained further, would give many items other codes (of 320 toy items 289
    kept their SID with the encoder as it was, 184 after 20 steps of a tenth of the usual rate). The axes of
    collaborative vectors differ between fits, so an encoder of the old vectors does not fit the new ones.
    """
    stays = old and old.encoder and old.embedder == embedder
    if old and codes is not None and stays and not collaborative and not old.collaborative_dims:
        return Codebook(
            embedder, _update_centroids(old, vectors, sizes, seed, codes), old.encoder, scaled=False
        )
    from trainer.codebooks.rqvae import fit_rqvae

    fitted = fit_rqvae(vectors, sizes, seed, optional=collaborative, old=codes, runs=runs)
    return Codebook(
        embedder, fitted.centroids, fitted.encoder, scaled=False, collaborative_dims=collaborative
    )


def _update_centroids(
    old: Codebook, vectors: Float32, sizes: Sequence[int], seed: int, codes: Int64
) -> tuple[Float32, ...]:
    """Centroids at the means of the current residuals of the items with each old code, level by level."""
    residual, old_codes, levels = old.encode(vectors), codes, []
    for level, size in enumerate(sizes):
        centroids = code_means(residual, old_codes[:, level], size, seed + level)
        codes_now = nearest_centroids(residual, centroids)
        old_codes = mask_changed_codes(old_codes, codes_now, level)
        residual = residual - centroids[codes_now].astype(np.float64)
        levels.append(centroids)
    return tuple(levels)


def assign_keeping(codebook: Codebook, vectors: Float32, old: Sequence[Sid | None]) -> list[Sid]:
    """A SID for each vector (N, D): the `old` one where its first code is still the nearest, else a free one.

    Kept SIDs are reserved before any other is assigned.
    """
    codes, _ = codebook.quantise(vectors)
    unchanged = [
        sid if sid is not None and sid[0] == first else None
        for sid, first in zip(old, codes[:, 0].tolist(), strict=True)
    ]
    rows_to_assign = [row for row, sid in enumerate(unchanged) if sid is None]
    assigned = iter(codebook.assign(vectors[rows_to_assign], {sid for sid in unchanged if sid is not None}))
    return [next(assigned) if sid is None else sid for sid in unchanged]


def last_level_size(largest: int, headroom: float, minimum: int) -> int:
    """Codes of the last level: the next power of two at or above head-room times the fullest prefix."""
    required = max(minimum, int(np.ceil(largest * headroom)))
    size = 1 << (required - 1).bit_length()
    if size > MAX_CODES:
        raise SidstreamError(
            f"{largest} items share one prefix; raise SIDSTREAM_CODEBOOK__SIZE so that they spread"
        )
    return size
