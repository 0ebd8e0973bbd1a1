"""Hard negatives of a preference pair: SIDs that share the longest prefix of codes with the chosen one.

Under one prompt the codes of a shared prefix have the same log-probability for both, so that they cancel in
the difference that DPO learns from: such a negative teaches the codes in which it differs, and these alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from registry.bundles.prompt import Sid
from streams.errors import SidstreamError


class SiblingSids:
    """The SIDs of a catalogue in the order of their codes: those that share a prefix stand together."""

    def __init__(self, sids: Sequence[Sid] | npt.NDArray[np.int64]) -> None:
        """`sids`: codes (I, L), each counts once. Raises SidstreamError for none or uneven ones."""
        if len({len(sid) for sid in sids}) != 1:
            raise SidstreamError(
                f"sids: {len(sids)} SIDs without one common number of codes; give at least one SID, and the "
                "SIDs of one codebook only"
            )
        # np.unique sorts rows by their first code, then the second, and so on. Kept level by level (L, I).
        ordered = np.unique(np.asarray(sids, dtype=np.int64), axis=0)
        self._codes: npt.NDArray[np.int64] = np.ascontiguousarray(ordered.T)

    def add_negatives(
        self, rejected: Sequence[Sid], chosen: Sid, interacted: Sequence[Sid], seed: str, count: int
    ) -> list[Sid]:
        """Up to `count` existing SIDs to reject against `chosen`, without repeats.

        First come those of `rejected`, in order. Then others are drawn: SIDs that share more leading codes
        with `chosen` come before SIDs that share fewer. No drawn SID is `chosen`, in `rejected` or in
        `interacted` (the user's own items). `seed` (a pair's event_id) and the SIDs decide the draw. Raises
        SidstreamError where `count` is negative or `chosen` has another number of codes.
        """
        if count < 0:
            raise SidstreamError(f"count is {count}: ask for 0 or more negatives")
        if len(chosen) != len(self._codes):
            raise SidstreamError(
                f"chosen is {tuple(chosen)}, {len(chosen)} codes, and these SIDs have {len(self._codes)}; "
                "give a SID of the same codebook"
            )
        chosen_sid = tuple(chosen)
        existing_rejected = [
            sid for sid in dict.fromkeys(map(tuple, rejected)) if sid != chosen_sid and self._exists(sid)
        ]
        negatives: list[Sid] = existing_rejected[:count]
        excluded = {chosen_sid, *existing_rejected, *map(tuple, interacted)}
        generator = np.random.default_rng(list(hashlib.sha256(seed.encode()).digest()))
        ranges = self._ranges(chosen_sid)
        # From the chosen SID itself, a range of one, outwards; the last holds all.
        for (near, near_end), (begin, end) in zip(ranges[::-1], ranges[-2::-1], strict=False):
            missing = count - len(negatives)
            if not missing:
                break
            inner = near_end - near
            others = end - begin - inner
            draws = (
                generator.choice(others, min(others, missing + len(excluded)), replace=False)
                if others
                else ()
            )
            rows = (begin + at + (inner if begin + at >= near else 0) for at in draws)
            candidates = (tuple(self._codes[:, row].tolist()) for row in rows)
            negatives += [sid for sid in candidates if sid not in excluded][:missing]
        return negatives

    def _exists(self, sid: Sid) -> bool:
        if len(sid) != len(self._codes):
            return False
        begin, end = self._ranges(sid)[-1]
        return end > begin

    def _ranges(self, sid: Sid) -> list[tuple[int, int]]:
        """Rows [begin, end) that share the first 0, 1, .. L codes of `sid`."""
        begin, end = 0, self._codes.shape[1]
        ranges = [(begin, end)]
        for level, code in enumerate(sid):
            column = self._codes[level, begin:end]
            begin, end = (
                begin + int(np.searchsorted(column, code, "left")),
                begin + int(np.searchsorted(column, code, "right")),
            )
            ranges.append((begin, end))
        return ranges
