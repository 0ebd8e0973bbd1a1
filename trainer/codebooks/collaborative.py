"""Collaborative vectors of items from user sequences, and their fusion with text vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.linalg import svds

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

# Two items of a user's sequence co-occur where they are at most so many places apart.
# On Amazon Beauty's training part the nearest ten held the next item of 7.7 % of users; with 50, of 5.6 %.
WINDOW = 5
# Subtracted, as its logarithm, from the pointwise mutual information; of little effect (7.4 % with 1).
SHIFT = 5.0
# Up to so many items the whole matrix is decomposed, which takes a second at most.
_MAX_ITEMS_FULL_SVD = 1000


def collaborative_vectors(
    sequences: Sequence[Int64], items: int, dim: int, *, window: int = WINDOW, shift: float = SHIFT
) -> Float32:
    """Unit rows, float32 (items, dim), near each other where users interact with the items close together.

    Truncated SVD of the shifted positive pointwise mutual information, max(0, log(P(i, j) / (P(i) P(j))) -
    log(shift)), rows scaled by the square root of the singular values (Levy and Goldberg 2014, "Neural word
    embedding as implicit matrix factorization"). `sequences`: rows of items of a user in order of time. A
    pair at distance n counts 1 / n. An item without neighbours gets a zero row. The same sequences give the
    same rows.
    """
    counts = cooccurrence(sequences, items, window)
    total = counts.sum()
    if total == 0:
        return np.zeros((items, dim), dtype=np.float32)
    item_totals = np.asarray(counts.sum(axis=1)).ravel()
    pairs = counts.tocoo()
    information = np.log(pairs.data * total / (item_totals[pairs.row] * item_totals[pairs.col])) - np.log(
        shift
    )
    positive = information > 0
    matrix = sparse.csr_matrix(
        (information[positive], (pairs.row[positive], pairs.col[positive])), shape=counts.shape
    )
    rank = min(dim, items - 1)
    if items <= _MAX_ITEMS_FULL_SVD:
        # With nearly as many vectors as items ARPACK runs out of directions and continues from random ones.
        left, values, _ = np.linalg.svd(matrix.toarray())
        left, values = left[:, :rank], values[:rank]
    else:
        # A fixed start vector: the default one is random in every process.
        left, values, _ = svds(matrix, k=rank, v0=np.full(items, items**-0.5))
    order = np.argsort(-values, kind="stable")
    rows = left[:, order] * np.sqrt(values[order])
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    has_neighbours = length > 1e-9
    rows = np.where(has_neighbours, rows / np.where(has_neighbours, length, 1.0), 0.0)
    return np.pad(rows, ((0, 0), (0, dim - rank))).astype(np.float32)


def cooccurrence(sequences: Sequence[Int64], items: int, window: int) -> sparse.csr_matrix:
    """Co-occurrence counts of items, symmetric (items, items), 1 / distance for each pair; zero diagonal."""
    rows, columns, weights = [], [], []
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    items_in_order = np.concatenate([np.zeros(0, np.int64), *sequences])
    user = np.repeat(np.arange(len(sequences)), lengths)
    for distance in range(1, window + 1):
        same = (user[distance:] == user[:-distance]) & (
            items_in_order[distance:] != items_in_order[:-distance]
        )
        rows.append(items_in_order[:-distance][same])
        columns.append(items_in_order[distance:][same])
        weights.append(np.full(int(same.sum()), 1.0 / distance))
    one_sided = sparse.coo_matrix(
        (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), shape=(items, items)
    ).tocsr()
    return one_sided + one_sided.T


def fuse_vectors(texts: Float32, collaborative: Float32, weight: float) -> Float32:
    """Unit rows, float32 (N, D + d): texts (N, D) beside collaborative rows (N, d).

    `weight`: the share of a row's squared length that is collaborative. A row without a collaborative part is
    its text's row and zeros, as for a new item without interactions.
    """
    has_interactions = np.linalg.norm(collaborative, axis=1, keepdims=True) > 0
    share = np.where(has_interactions, weight, 0.0)
    return np.concatenate([np.sqrt(1.0 - share) * texts, np.sqrt(share) * collaborative], axis=1).astype(
        np.float32
    )
