"""Users dealt by a hash of their id: the same in every process, generation and restart."""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec

# The salt of the validation users. It is not the anchor's: those who always see the first model, and those
# who are never learned from, are not the same people.
VALIDATION_SALT: Final = "validation"


def user_share(salt: str, user_id: str) -> float:
    """A number in [0, 1) from the hash of salt and user: uniform over users, independent between salts."""
    digest = hashlib.blake2b(user_id.encode(), key=hashlib.sha256(salt.encode()).digest(), digest_size=8)
    # 53 bits: what a double holds exactly, so the result never rounds up to 1.
    return (int.from_bytes(digest.digest(), "big") >> 11) / 2**53


class HoldOut(msgspec.Struct, frozen=True, kw_only=True):
    """The rule that deals a `share` (0 to 1) of all users. A greater share adds users and lets none go."""

    salt: str = VALIDATION_SALT
    share: float

    def has(self, user_id: str) -> bool:
        """Whether the user is one of them: a function of the rule and of the user alone."""
        return user_share(self.salt, user_id) < self.share

    def covers(self, other: HoldOut) -> bool:
        """Whether all users of `other` are users of this rule, too."""
        return other.share == 0 or (self.salt == other.salt and self.share >= other.share)
