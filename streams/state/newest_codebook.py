"""Which codebook is the newest: the one whose first SID has the latest time."""

from __future__ import annotations

from streams.events import SidAssignment


class NewestCodebook:
    """`codebook` after the assignments that were seen, in whichever order they came."""

    def __init__(self) -> None:
        self._first_ts: dict[str, int] = {}
        self.codebook: str | None = None

    def observe(self, event: SidAssignment) -> None:
        """Take note of one assignment.

        By first appearance: an item that is given its SID under an old codebook late does not bring it back.
        """
        known = self._first_ts.get(event.codebook)
        if known is None or event.ts < known:
            self._first_ts[event.codebook] = event.ts
            self.codebook = max(self._first_ts, key=lambda codebook: (self._first_ts[codebook], codebook))
