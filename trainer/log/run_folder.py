"""The folder of a run that is not done: its frozen window, and what its stages have done so far.

A run is named by what it is made from: the codebook, the model that it goes on from, and the settings. A
process that starts again after a stop or a kill -9 finds its run by this name and trains on the very window
that the run began with; newer events wait for the next run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from streams.errors import SidstreamError
from trainer.files import write_atomically
from trainer.log.interaction_log import InteractionLog, Offsets, Ranges
from trainer.log.window import TOPICS, Window

_WINDOW, _VERSIONS = "window.json", "versions.json"


class FrozenWindow(msgspec.Struct, frozen=True, kw_only=True):
    """The window of a run, and how far the log was when it was read."""

    ranges: Ranges
    incarnations: dict[str, int]
    logged: dict[str, Offsets]


@dataclass(frozen=True)
class RunFolder:
    """One folder below `runs`. One process works in it at a time (the lock of the trainer's home)."""

    path: Path

    @classmethod
    def open(cls, runs: Path, about: Mapping[str, Any], say: Callable[[str], None]) -> RunFolder:
        """The run that is made from `about` (JSON). `say` hears of each other one: it is removed."""
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        for other in sorted(runs.glob("*")):
            if other.name != name:
                say(
                    f"the unfinished run {other.name} is removed: it was of another champion, codebook or "
                    "other settings"
                )
                shutil.rmtree(other, ignore_errors=True)
        return cls(runs / name)

    def freeze(self, window: Window) -> None:
        """Keep a window for the case that the run is cut off."""
        frozen = FrozenWindow(
            ranges=window.ranges,
            incarnations=window.incarnations,
            logged={topic: window.log.ends(topic, window.incarnations[topic]) for topic in TOPICS},
        )
        write_atomically(self.path / _WINDOW, msgspec.json.encode(frozen))

    def window(
        self, log: InteractionLog, incarnations: Callable[[], Mapping[str, int]], say: Callable[[str], None]
    ) -> Window | None:
        """The frozen window; None where the run is new, or where what it was read from is gone.

        In that case `say` gets a sentence, and the run is removed. `incarnations()`: those of the topics
        now. Raises SidstreamError where the file is damaged.
        """
        path = self.path / _WINDOW
        if not path.exists():
            return None
        try:
            frozen = msgspec.json.decode(path.read_bytes(), type=FrozenWindow)
        except msgspec.DecodeError as error:
            raise SidstreamError(
                f"{path} is damaged ({error}): remove {self.path}, and the run begins anew"
            ) from error
        lives = incarnations()
        for topic in TOPICS:
            ends = log.ends(topic, frozen.incarnations[topic])
            if frozen.incarnations[topic] != lives.get(topic):
                reason = f"topic {topic} was deleted and made again"
            elif any(ends.get(number, 0) < end for number, end in frozen.logged[topic].items()):
                reason = f"{log.folder} lacks records of topic {topic} that it began with"
            else:
                continue
            say(f"the unfinished run {self.path.name} is removed: {reason} since")
            self.remove()
            return None
        say(
            f"run {self.path.name} goes on with the window that it began with: newer events wait for the next"
        )
        return Window(log, frozen.ranges, frozen.incarnations)

    def name_versions(self, versions: Mapping[str, str]) -> None:
        """Keep which versions of the registry (kind -> version) the run led to, before they are released."""
        write_atomically(self.path / _VERSIONS, json.dumps(dict(versions)).encode())

    def versions(self) -> dict[str, str]:
        """What `name_versions` kept; empty where the run has not come so far."""
        path = self.path / _VERSIONS
        if not path.exists():
            return {}
        versions: dict[str, str] = json.loads(path.read_bytes())
        return versions

    def remove(self) -> None:
        """Forget the run: it is done, or leads to nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
