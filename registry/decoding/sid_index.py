"""The SID table as a prefix tree in flat arrays: which codes may follow a prefix, and whose SID a leaf is.

Compressed sparse rows: the SIDs are sorted, the distinct prefixes of each length are that level's nodes,
and a node's children are one contiguous range of the next level. Expanding all beams of a level is one
gather, whose cost depends on the branching and not on the catalogue (STATIC, arXiv 2602.22647, section 4,
with ranges in the place of its child ids: sorted nodes need none).

Every node carries how many allowed (active) leaves lie below it. A search that only enters nodes with allowed
leaves never ends in a branch without an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

Sid = Sequence[int]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Exclusions:
    """Leaves that single requests leave out, counted at every node above them.

    keys[l]: (E_l,) ascending request * nodes(l) + node. counts[l]: (E_l,) allowed leaves lost below it.
    """

    keys: tuple[Ints, ...]
    counts: tuple[Ints, ...]


@dataclass(frozen=True)
class SidIndex:
    """A snapshot of one codebook's SID table: N items, L levels, n_l distinct prefixes of length l + 1.

    `item_ids` and `rows` may be longer than N (they are shared with a table that only grows); only their
    first N rows belong to this snapshot.
    """

    codes: tuple[Ints, ...]  # level l: (n_l,) the last code of each node
    children: tuple[Ints, ...]  # level l: (n_{l-1} + 1,) where a parent's children start; level 0: [0, n_0]
    leaves: tuple[Ints, ...]  # level l: (n_l + 1,) where each node's leaves start
    leaf_row: Ints  # (N,) leaf -> row of the item
    row_leaf: Ints  # (N,) row -> leaf
    sids: NDArray[np.uint16]  # (N, L) in leaf order
    active: NDArray[np.bool_]  # (N,) in leaf order
    allowed: tuple[Ints, ...]  # level l: (n_l,) active leaves below each node
    item_ids: Sequence[str]
    rows: Mapping[str, int]

    @classmethod
    def build(
        cls,
        sids: NDArray[np.integer],
        item_ids: Sequence[str],
        active: NDArray[np.bool_] | None = None,
        rows: Mapping[str, int] | None = None,
    ) -> Self:
        """Sort (N, L) SIDs, row i belonging to item_ids[i], into an index; `active` (N,) defaults to all.

        Codes are 0 to 65535. Raises ValueError where two items share an SID or the shapes disagree.
        """
        table = np.ascontiguousarray(sids, dtype=np.uint16)
        if table.ndim != 2 or table.shape[1] == 0 or len(item_ids) < len(table):
            raise ValueError(f"sids must be (N, L) with an item for each row, got {table.shape}")
        size, levels = table.shape
        order = _sorted_rows(table)
        table = table[order]
        # fresh[l][i]: leaf i starts a new prefix of length l + 1.
        fresh = np.ones((levels, size), dtype=bool)
        if size > 1:
            fresh[:, 1:] = np.logical_or.accumulate((table[1:] != table[:-1]).T, axis=0)
        if not fresh[-1].all():
            duplicate = int(np.flatnonzero(~fresh[-1])[0])
            first, second = item_ids[order[duplicate - 1]], item_ids[order[duplicate]]
            raise ValueError(f"items {first!r} and {second!r} share the SID {table[duplicate].tolist()}")
        leaves, codes, children = [], [], []
        above = np.array([0, size], dtype=np.int64)
        for level in range(levels):
            starts = np.flatnonzero(fresh[level])
            children.append(np.searchsorted(starts, above))
            codes.append(table[starts, level].astype(np.int64))
            above = np.append(starts, size)
            leaves.append(above)
        row_leaf = np.empty(size, dtype=np.int64)
        row_leaf[order] = np.arange(size)
        index = cls(
            tuple(codes), tuple(children), tuple(leaves), order, row_leaf, table,
            np.ones(size, dtype=bool), (),
            item_ids, {item: row for row, item in enumerate(item_ids)} if rows is None else rows,
        )  # fmt: skip
        return index.with_active(np.ones(size, dtype=bool) if active is None else active)

    def with_active(self, active: NDArray[np.bool_]) -> Self:
        """The same tree with other active items; `active` (N,) bool in row order."""
        by_leaf = np.asarray(active, dtype=bool)[self.leaf_row]
        before = np.concatenate(([0], np.cumsum(by_leaf)))
        allowed = tuple(before[starts[1:]] - before[starts[:-1]] for starts in self.leaves)
        return replace(self, active=by_leaf, allowed=allowed)

    @property
    def levels(self) -> int:
        """L, the length of an SID."""
        return len(self.codes)

    def __len__(self) -> int:
        return len(self.leaf_row)

    def nodes(self, level: int) -> int:
        """How many distinct prefixes of length level + 1 there are."""
        return len(self.codes[level])

    def leaf_of(self, item_id: str) -> int | None:
        """The leaf of an item, active or not; None where the item has no SID here."""
        row = self.rows.get(item_id)
        return int(self.row_leaf[row]) if row is not None and row < len(self) else None

    def leaf_of_sid(self, sid: Sid) -> int | None:
        """The leaf of an SID; None where no item has it."""
        if len(sid) != self.levels:
            return None
        leaf = int(self.leaves_of_sids(np.asarray(sid, dtype=np.int64)[None])[0])
        return leaf if leaf >= 0 else None

    def leaves_of_sids(self, sids: Ints) -> Ints:
        """The leaf (M,) of each SID (M, L); -1 where no item has it."""
        node = np.zeros(len(sids), dtype=np.int64)
        for level in range(self.levels):
            keys, size = self._child_keys[level]
            code = sids[:, level]
            key = node * size + code
            at = np.minimum(np.searchsorted(keys, key), max(0, len(keys) - 1))
            exists = (node >= 0) & (code >= 0) & (code < size)
            exists &= keys[at] == key if len(keys) else False
            node = np.where(exists, at, -1)
        return node

    @cached_property
    def _child_keys(self) -> tuple[tuple[Ints, int], ...]:
        """For each level the ascending keys (n_l,) `parent * size + code` of its nodes, and the size."""
        keys = []
        for level, codes in enumerate(self.codes):
            size = int(codes.max(initial=0)) + 1
            parent = np.repeat(np.arange(len(self.children[level]) - 1), np.diff(self.children[level]))
            keys.append((parent * size + codes, size))
        return tuple(keys)

    def item(self, leaf: int) -> str:
        """The item of a leaf."""
        return self.item_ids[int(self.leaf_row[leaf])]

    def sid(self, leaf: int) -> list[int]:
        """The SID of a leaf."""
        return [int(code) for code in self.sids[leaf]]

    def exclusions(self, leaves: Sequence[Iterable[int]]) -> Exclusions:
        """Count each request's excluded leaves at every node above them; inactive leaves are not counted."""
        pairs = [
            (request, leaf)
            for request, leaves_of_request in enumerate(leaves)
            for leaf in set(leaves_of_request)
        ]
        request, leaf = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        is_active = self.active[leaf]
        request, leaf = request[is_active], leaf[is_active]
        keys, counts = [], []
        for level in range(self.levels):
            node = np.searchsorted(self.leaves[level], leaf, side="right") - 1
            key, count = np.unique(request * self.nodes(level) + node, return_counts=True)
            keys.append(key)
            counts.append(count)
        return Exclusions(tuple(keys), tuple(counts))

    def expand(self, level: int, nodes: Ints, requests: Ints, exclusions: Exclusions) -> tuple[Ints, Ints]:
        """All children at `level` of M parents that have an allowed leaf for their request, in one gather.

        `nodes` (M,): parents at level - 1 (zeros for the root at level 0); `requests` (M,): whose beam each
        is. Returns (parent (C,): index into `nodes`, child (C,): node at `level`), in the parents' order
        and by ascending code below a parent.
        """
        start = self.children[level][nodes]
        count = self.children[level][nodes + 1] - start
        parent = np.repeat(np.arange(len(nodes)), count)
        # Position in the parent's range, without a loop: the overall position minus where the range began.
        child = np.arange(len(parent)) + np.repeat(start - (np.cumsum(count) - count), count)
        allowed_leaves = self.allowed[level][child]
        keys = exclusions.keys[level]
        if len(keys):
            child_keys = requests[parent] * self.nodes(level) + child
            key_positions = np.minimum(np.searchsorted(keys, child_keys), len(keys) - 1)
            allowed_leaves = allowed_leaves - np.where(
                keys[key_positions] == child_keys, exclusions.counts[level][key_positions], 0
            )
        has_allowed_leaf = allowed_leaves > 0
        return parent[has_allowed_leaf], child[has_allowed_leaf]


def _sorted_rows(table: NDArray[np.uint16]) -> Ints:
    """Rows in the order of their SIDs; codes are packed into one integer where 63 bits hold them: faster."""
    if not len(table):
        return np.zeros(0, dtype=np.int64)
    bits = [max(1, int(top).bit_length()) for top in table.max(axis=0)]
    if sum(bits) > 63:
        return np.lexsort(table.T[::-1])
    key = np.zeros(len(table), dtype=np.int64)
    for column, width in zip(table.T, bits, strict=True):
        key = (key << width) | column
    return np.argsort(key, kind="stable")
