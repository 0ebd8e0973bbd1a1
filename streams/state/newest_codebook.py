"""Which codebook is the newest: the one whose first SID has the latest time."""

from __future__ import annotations

from streams.events import SidAssignment


class NewestCodebook:
    """`codebook` is the newest one among the observed assignments, in whatever order they came."""

    def __init__(self) -> None:
        self._first_ts: dict[str, int] = {}
        self.codebook: str | None = None

    def observe(self, event: SidAssignment) -> None:
        """Note one assignment.

        A codebook's age is its first SID's: a late SID under an old codebook does not make that the newest.
        """
        first_ts = self._first_ts.get(event.codebook)
        if first_ts is None or event.ts < first_ts:
            self._first_ts[event.codebook] = event.ts
            self.codebook = max(self._first_ts, key=lambda codebook: (self._first_ts[codebook], codebook))
