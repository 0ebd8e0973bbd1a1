"""How a SID becomes tokens and text: one place, for the trainer and for serving."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from streams.errors import SidstreamError

PAD, BOS, EOS, TITLE, ITEM, UNK = range(6)
# Ids 6..15 are kept free, so that a new special token does not move the codes of trained weights.
FIRST_CODE = 16
# One letter a level; an SID has at most eight codes (streams.events.Sid).
LEVELS = "abcdefgh"

Sid = tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """The vocabulary of one codebook: `sizes[l]` codes at level l, and how many items a prompt takes.

    Token ids: 0 pad, 1 bos, 2 eos, 3 title, 4 item, 5 unk, 6..15 reserved, then the codes level by level,
    then words.
    """

    sizes: tuple[int, ...]
    max_items: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.sizes) <= len(LEVELS) or min(self.sizes) < 1:
            raise SidstreamError(
                f"an SID has 1 to {len(LEVELS)} levels of at least one code, not {self.sizes}"
            )
        if self.max_items < 1:
            raise SidstreamError(f"max_items is {self.max_items}; a prompt takes at least one item")

    def code_base(self, level: int) -> int:
        """Token id of code 0 of `level`."""
        return FIRST_CODE + sum(self.sizes[:level])

    @property
    def first_word(self) -> int:
        """The first token id after the codes."""
        return self.code_base(len(self.sizes))

    def _check(self, sid: Sequence[int]) -> None:
        if len(sid) != len(self.sizes) or any(
            not 0 <= code < size for code, size in zip(sid, self.sizes, strict=True)
        ):
            raise SidstreamError(f"{tuple(sid)} is no SID of a codebook with sizes {self.sizes}")

    def tokens(self, sid: Sequence[int]) -> list[int]:
        """Token ids of an SID, one a level. Raises SidstreamError for a code that the level does not have."""
        self._check(sid)
        return [self.code_base(level) + code for level, code in enumerate(sid)]

    def sid(self, tokens: Sequence[int]) -> Sid:
        """The SID that `tokens` (one a level) spell. Raises SidstreamError where they spell none."""
        if len(tokens) != len(self.sizes):
            raise SidstreamError(f"{list(tokens)} are not the {len(self.sizes)} tokens of an SID")
        sid = tuple(token - self.code_base(level) for level, token in enumerate(tokens))
        self._check(sid)
        return sid

    def text(self, sid: Sequence[int]) -> str:
        """An SID as text: `<a_12><b_7><c_201>`."""
        self._check(sid)
        return "".join(f"<{LEVELS[level]}_{code}>" for level, code in enumerate(sid))

    def parse(self, text: str) -> Sid:
        """The SID written in `text`. Raises SidstreamError for any other text."""
        pattern = "".join(rf"<{letter}_(0|[1-9]\d*)>" for letter in LEVELS[: len(self.sizes)])
        match = re.fullmatch(pattern, text, re.ASCII)
        if match is None:
            raise SidstreamError(
                f"{text[:80]!r} is no SID of {len(self.sizes)} levels; write it as <a_12><b_7>..."
            )
        sid = tuple(int(code) for code in match.groups())
        self._check(sid)
        return sid


def prompt_sids(history: Sequence[Sid], trigger: Sid | None, max_items: int) -> list[Sid]:
    """The SIDs that a request shows the model, oldest first: the history, then the trigger.

    A trigger that is the newest of the history already (the click that opened the page) is not repeated.
    Only the newest `max_items` are kept.
    """
    sids = [tuple(sid) for sid in history]
    if trigger is not None and (not sids or sids[-1] != tuple(trigger)):
        sids.append(tuple(trigger))
    return sids[-max_items:]
