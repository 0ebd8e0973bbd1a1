"""The dense head of a bundle: what its generator knows of items beyond their codes, as one matrix an index.

An item's vector is the sum of its codes' embeddings and what was learned of the item itself; an item that
came after the training is its codes and its text. A state's product with all vectors scores the whole
catalogue at once (LIGER, Yang et al. 2024, arXiv 2411.18814).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from registry.bundles.embedder import title_vectors
from registry.bundles.ranking import COUNT_STARTS, DISTANCE_STARTS
from serving.decoding.index import Ints, SidIndex
from streams.errors import SidstreamError

ITEMS = "items.safetensors"
Floats = NDArray[np.float32]


def _bucket(numbers: Ints, starts: Sequence[int]) -> Ints:
    """The bucket (n,) of each number (n,), where bucket b begins at starts[b]."""
    return np.searchsorted(starts, numbers, side="right") - 1


class Items:
    """I known items of L codes, width D, from a bundle's items.safetensors."""

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        """Raises SidstreamError where the file is damaged or of another codebook."""
        path = folder / ITEMS
        try:
            with safe_open(str(path), framework="numpy") as file:
                self._codes: Floats = file.get_tensor("codes")
                self._query: Floats = file.get_tensor("query")
                sids = file.get_tensor("sids")
                self._again: Floats = file.get_tensor("again")
                extras: Floats = file.get_tensor("extras")
                self._text: Floats | None = file.get_tensor("text") if "text" in set(file.keys()) else None
        except (OSError, SafetensorError) as error:
            raise SidstreamError(f"{path} does not open ({error}); export the bundle again") from error
        self._sizes = tuple(sizes)
        fits = self._codes.shape[0] == sum(sizes) and sids.shape == (len(extras), len(sizes))
        if not fits or self._again.ndim != 2 or len(self._again) != len(DISTANCE_STARTS) + len(COUNT_STARTS):
            raise SidstreamError(
                f"{path} is not of a codebook of {self._sizes}, or of an earlier generator; "
                "export the bundle again"
            )
        self._bases = np.cumsum([0, *self._sizes[:-1]])
        keys = self._keys(sids)
        order = np.argsort(keys, kind="stable")
        # Replaced as a whole: other threads read it while new items are met.
        self._known: tuple[Ints, Floats] = (keys[order], extras[order])
        self._met: NDArray[np.uint16] | None = None
        self._matrix: tuple[NDArray[np.uint16], Floats] | None = None

    @property
    def width(self) -> int:
        """D, the length of a vector."""
        return int(self._codes.shape[1])

    def _keys(self, sids: NDArray[np.integer]) -> Ints:
        key = np.zeros(sids.shape[:-1], dtype=np.int64)
        for level, size in enumerate(self._sizes):
            key = key * size + sids[..., level]
        return key

    def extras(self, sids: NDArray[np.integer]) -> Floats:
        """SIDs (..., L) -> what is known beyond their codes (..., D) float32; zeros for unknown items."""
        made = np.zeros((*sids.shape[:-1], self.width), dtype=np.float32)
        known, extras = self._known
        if len(known):
            keys = self._keys(sids)
            at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            found = known[at] == keys
            made[found] = extras[at[found]]
        return made

    def meet(self, index: SidIndex, title_of: Callable[[str], str]) -> None:
        """Give the items of an index that came after the training what their titles say; once for each tree.

        An item whose title is not there yet is its codes alone until the tree changes.
        """
        if self._text is None or self._met is index.sids:
            return
        known, extras = self._known
        keys = self._keys(index.sids.astype(np.int64))
        leaves = np.flatnonzero(~np.isin(keys, known))
        titles = [title_of(index.item(int(leaf))) for leaf in leaves]
        told = [row for row, title in enumerate(titles) if title]
        if told:
            vectors = title_vectors([titles[row] for row in told]) @ self._text.T
            keys, rows = np.concatenate((known, keys[leaves[told]])), np.concatenate((extras, vectors))
            order = np.argsort(keys, kind="stable")
            self._known = (keys[order], rows[order].astype(np.float32))
        self._met = index.sids

    def queries(self, state: NDArray[np.generic]) -> Floats:
        """States (R, D) -> what is multiplied with items' vectors (R, D)."""
        made: Floats = state.astype(np.float32) @ self._query.T
        return made

    def again(self, query: Floats, owner: Ints, distances: Ints, counts: Ints) -> Floats:
        """What is added to the logits (n,) of a past's items.

        query (R, D); owner (n,): whose past; distances (n,) from what comes next, 1 for the newest item;
        counts (n,): how often the item is there.
        """
        offered = query @ self._again.T
        near = _bucket(distances, DISTANCE_STARTS)
        often = len(DISTANCE_STARTS) + _bucket(counts, COUNT_STARTS)
        made: Floats = offered[owner, near] + offered[owner, often]
        return made

    def matrix(self, index: SidIndex) -> Floats:
        """The vectors of an index's items, (N, D) float32 in leaf order; made once for each tree."""
        # The table of SIDs is one object as long as no item came: a change of active items keeps it.
        if self._matrix is None or self._matrix[0] is not index.sids:
            sids = index.sids.astype(np.int64)
            made = self.extras(sids)
            for level in range(sids.shape[1]):
                made += self._codes[sids[:, level] + self._bases[level]]
            self._matrix = (index.sids, made)
        return self._matrix[1]
