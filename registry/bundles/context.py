"""What a request says beside its history: the scene of the page, and attributes of the user's profile.

A context is a vocabulary of them: the values of each field that a generator has learned, and the token of
each. It is kept in the bundle (`context.json`). A value that it does not have contributes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from streams.errors import SidstreamError

CONTEXT = "context.json"
SCENE = "scene"
# Before the name of an attribute of a profile.
PROFILE = "profile."

Attributes = Mapping[str, str]
Counts = Mapping[str, Mapping[str, int]]


class _File(msgspec.Struct, forbid_unknown_fields=True):
    first: int
    fields: dict[str, list[str]]


def context_fields(scene: str | None, attributes: Attributes | None) -> dict[str, str]:
    """What a request or an event says, by field: `scene` and `profile.<attribute>`."""
    said = {} if scene is None else {SCENE: scene}
    return said | {PROFILE + name: value for name, value in (attributes or {}).items()}


@dataclass(frozen=True)
class Context:
    """The known values of each field, C fields in all; `first` is the token id of the first value.

    Token ids run on over the fields, in their order. Without fields nothing is known.
    """

    first: int = 0
    fields: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return sum(map(len, self.fields.values()))

    @cached_property
    def _tokens(self) -> dict[tuple[str, str], int]:
        every = [(name, value) for name, values in self.fields.items() for value in values]
        return {pair: self.first + at for at, pair in enumerate(every)}

    def known(self, said: Mapping[str, str]) -> dict[str, str]:
        """The part of what was said that has a token."""
        return {name: value for name, value in said.items() if (name, value) in self._tokens}

    def row(self, said: Mapping[str, str]) -> list[int]:
        """(C,) token ids, one a field; 0 where nothing was said, or nothing that is known."""
        return [self._tokens.get((name, said.get(name, "")), 0) for name in self.fields]

    def rows(
        self, scenes: Sequence[str | None], users: Sequence[str], profiles: Mapping[str, Attributes]
    ) -> npt.NDArray[np.int32]:
        """`row` of N events, each of a scene and a user: (N, C)."""
        made: dict[tuple[str | None, str], list[int]] = {}
        found = np.zeros((len(users), len(self.fields)), dtype=np.int32)
        if self.fields:
            for at, key in enumerate(zip(scenes, users, strict=True)):
                row = made.get(key)
                if row is None:
                    row = made[key] = self.row(context_fields(key[0], profiles.get(key[1])))
                found[at] = row
        return found


def count_values(scenes: Mapping[str, int], profiles: Iterable[Attributes]) -> dict[str, Counter[str]]:
    """How often each value of each field is there: scenes by events, attributes by users."""
    counts = {SCENE: Counter(scenes)}
    for attributes in profiles:
        for name, value in attributes.items():
            counts.setdefault(PROFILE + name, Counter())[value] += 1
    return counts


def vocabulary(counts: Counts, first: int, min_count: int, max_values: int, max_fields: int) -> Context:
    """The most frequent `max_values` values of a field, of the `max_fields` fields whose values have most.

    A value has `min_count` or more; a field has a value. Ties in the order of their names. Tokens from
    `first` on.
    """
    kept: dict[str, dict[str, int]] = {}
    for name, values in counts.items():
        enough = [(value, count) for value, count in values.items() if count >= min_count]
        best = dict(sorted(enough, key=lambda pair: (-pair[1], pair[0]))[:max_values])
        if best:
            kept[name] = best
    order = sorted(kept, key=lambda name: (-sum(kept[name].values()), name))
    return Context(first, {name: list(kept[name]) for name in order[:max_fields]})


def write(context: Context, folder: Path) -> None:
    """Put the context into a bundle's folder; one without fields is no file."""
    if context.fields:
        made = msgspec.json.encode(
            {
                "first": context.first,
                "fields": {name: list(values) for name, values in context.fields.items()},
            }
        )
        (folder / CONTEXT).write_bytes(msgspec.json.format(made, indent=1) + b"\n")


def read(folder: Path) -> Context:
    """The context of a bundle; one without the file has none. Raises SidstreamError."""
    path = folder / CONTEXT
    if not path.exists():
        return Context()
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise SidstreamError(f"{path} is no context ({error}); fetch the bundle again") from error
    return Context(file.first, file.fields)
