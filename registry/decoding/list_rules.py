"""The rules of a served list: within which limits it is searched, and which items it leaves out.

Serving answers by them, and the trainer's offline checks rank held-out users by them, so that a figure is of
the list that users get.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from registry.bundles.ranking import RepeatRule, excluded_by_repeats
from registry.decoding.sid_index import Ints, Sid, SidIndex


@dataclass(frozen=True)
class ListLimits:
    """How far a list is searched, and what it may repeat; the defaults are those of the settings
    `serving.beam`, `serving.exact_items` and `serving.repeat`."""

    beam: int = 20  # beams kept a level; a request for more items widens it
    exact_items: int = 200_000  # in larger catalogues the dense head scores the beam's items alone
    repeats: RepeatRule | None = None  # of items of the history, in place of the bundle's rule


def excluded_leaves(
    index: SidIndex,
    named: Iterable[str | None],
    rule: RepeatRule,
    history: Sequence[Sid] | Ints,
    bought: npt.ArrayLike,
    ages_s: npt.ArrayLike,
) -> set[int]:
    """The leaves that one request's list leaves out.

    Those are the items that the request names (the page's own item and its exclusions; None and items without
    a leaf are passed over), and what the repeat rule leaves out of a history of H SIDs (H, L), which were
    `bought` (H,) or not, `ages_s` (H,) seconds before the request.
    """
    leaves = {leaf for item in named if item is not None and (leaf := index.leaf_of(item)) is not None}
    left_out = excluded_by_repeats(rule, bought, ages_s)
    if left_out.any():
        sids = np.asarray(history, dtype=np.int64)[left_out]
        leaves.update(leaf for leaf in index.leaves_of_sids(sids).tolist() if leaf >= 0)
    return leaves
