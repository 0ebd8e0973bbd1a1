"""The dense head of a bundle: one vector for each item, as one matrix for each index.

An item's vector is the sum of its codes' embeddings and of its own vector, which was learned in training. An
item that came after the training has a projection of its title's embedding in the place of its own vector.
The product of a state with all vectors scores the whole catalogue at once (LIGER, Yang et al. 2024, arXiv
2411.18814). The head adds a repeat-consumption bias for items of the history (Anderson et al. 2014).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from registry.bundles.embedder import title_vectors
from registry.bundles.ranking import COUNT_STARTS, DISTANCE_STARTS
from registry.decoding.sid_index import Ints, SidIndex
from streams.errors import SidstreamError

ITEMS = "items.safetensors"
# Rows of the tensor `again`: those for the last distance of an item in the history, then those for its count.
_REPEAT_ROWS = len(DISTANCE_STARTS) + len(COUNT_STARTS)
Floats = NDArray[np.float32]


def _bucket(numbers: Ints, starts: Sequence[int]) -> Ints:
    """The bucket (n,) of each number (n,), where bucket b begins at starts[b]."""
    return np.searchsorted(starts, numbers, side="right") - 1


class ItemVectors:
    """The vectors, of width D, of items with L codes, read from a bundle's items.safetensors.

    The file holds the own vectors of the items that the training saw (tensor `extras`, by SID), the codes'
    embeddings, the query projection, the weights of the repeat bias (`again`) and the projection of titles.
    """

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        """Raises SidstreamError where the file is damaged or of another codebook."""
        path = folder / ITEMS
        try:
            with safe_open(str(path), framework="numpy") as file:
                self._codes: Floats = file.get_tensor("codes")
                self._query: Floats = file.get_tensor("query")
                sids = file.get_tensor("sids")
                self._repeat_weights: Floats = file.get_tensor("again")
                own_vectors: Floats = file.get_tensor("extras")
                self._title_projection: Floats | None = (
                    file.get_tensor("text") if "text" in set(file.keys()) else None
                )
        except (OSError, SafetensorError) as error:
            raise SidstreamError(f"{path} does not open ({error}); export the bundle again") from error
        self._sizes = tuple(sizes)
        fits = self._codes.shape[0] == sum(sizes) and sids.shape == (len(own_vectors), len(sizes))
        if not fits or self._repeat_weights.ndim != 2 or len(self._repeat_weights) != _REPEAT_ROWS:
            raise SidstreamError(
                f"{path} is not of a codebook of {self._sizes}, or of an earlier generator; "
                "export the bundle again"
            )
        self._bases = np.cumsum([0, *self._sizes[:-1]])
        keys = self._keys(sids)
        order = np.argsort(keys, kind="stable")
        # Sorted SID keys and their own vectors. Replaced as a whole: other threads read it meanwhile.
        self._own_vector_table: tuple[Ints, Floats] = (keys[order], own_vectors[order])
        self._completed_sids: NDArray[np.uint16] | None = None
        self._cached_matrix: tuple[NDArray[np.uint16], Floats] | None = None

    @property
    def width(self) -> int:
        """D, the length of a vector."""
        return int(self._codes.shape[1])

    def _keys(self, sids: NDArray[np.integer]) -> Ints:
        key = np.zeros(sids.shape[:-1], dtype=np.int64)
        for level, size in enumerate(self._sizes):
            key = key * size + sids[..., level]
        return key

    def own_vectors(self, sids: NDArray[np.integer]) -> Floats:
        """SIDs (..., L) -> own vectors (..., D) float32; zeros for items without one."""
        vectors = np.zeros((*sids.shape[:-1], self.width), dtype=np.float32)
        table_keys, table_vectors = self._own_vector_table
        if len(table_keys):
            keys = self._keys(sids)
            positions = np.minimum(np.searchsorted(table_keys, keys), len(table_keys) - 1)
            has_own_vector = table_keys[positions] == keys
            vectors[has_own_vector] = table_vectors[positions[has_own_vector]]
        return vectors

    def add_new_items(self, index: SidIndex, title_of: Callable[[str], str]) -> None:
        """Give items that came after the training an own vector from their titles; once for each tree.

        An item without a title stays without an own vector until the tree changes.
        """
        if self._title_projection is None or self._completed_sids is index.sids:
            return
        table_keys, table_vectors = self._own_vector_table
        keys = self._keys(index.sids.astype(np.int64))
        leaves = np.flatnonzero(~np.isin(keys, table_keys))
        titles = [title_of(index.item(int(leaf))) for leaf in leaves]
        titled_rows = [row for row, title in enumerate(titles) if title]
        if titled_rows:
            title_vectors_of_new = (
                title_vectors([titles[row] for row in titled_rows]) @ self._title_projection.T
            )
            keys, rows = (
                np.concatenate((table_keys, keys[leaves[titled_rows]])),
                np.concatenate((table_vectors, title_vectors_of_new)),
            )
            order = np.argsort(keys, kind="stable")
            self._own_vector_table = (keys[order], rows[order].astype(np.float32))
        self._completed_sids = index.sids

    def project_queries(self, state: NDArray[np.generic]) -> Floats:
        """States (R, D) -> queries (R, D) float32, to be multiplied with the items' vectors."""
        projected: Floats = state.astype(np.float32) @ self._query.T
        return projected

    def repeat_bias(self, query: Floats, owner: Ints, distances: Ints, counts: Ints) -> Floats:
        """The addend (n,) to the logits of n items of the histories, float32.

        query (R, D); owner (n,): row of the query that each item's history belongs to; distances (n,): from
        the end of the history, 1 for the newest item; counts (n,): how often the history has the item.
        """
        repeat_logits = query @ self._repeat_weights.T
        distance_rows = _bucket(distances, DISTANCE_STARTS)
        count_rows = len(DISTANCE_STARTS) + _bucket(counts, COUNT_STARTS)
        bias: Floats = repeat_logits[owner, distance_rows] + repeat_logits[owner, count_rows]
        return bias

    def item_matrix(self, index: SidIndex) -> Floats:
        """The vectors of an index's items, (N, D) float32 in leaf order; computed once for each tree."""
        # The table of SIDs is one object as long as no item came: a change of active items keeps it.
        if self._cached_matrix is None or self._cached_matrix[0] is not index.sids:
            sids = index.sids.astype(np.int64)
            vectors = self.own_vectors(sids)
            for level in range(sids.shape[1]):
                vectors += self._codes[sids[:, level] + self._bases[level]]
            self._cached_matrix = (index.sids, vectors)
        return self._cached_matrix[1]
