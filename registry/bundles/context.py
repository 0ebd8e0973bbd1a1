"""The context of a request, beside the history: the scene of the page, and attributes of the user's profile.

A `Context` is a vocabulary: the values of each field that a generator has learned, and the token of each
value. The bundle keeps it in `context.json`. A value without a token contributes nothing to an answer.
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
    """The context of a request or an event, value by field: `scene` and `profile.<attribute>`."""
    fields = {} if scene is None else {SCENE: scene}
    return fields | {PROFILE + name: value for name, value in (attributes or {}).items()}


@dataclass(frozen=True)
class Context:
    """The values of each of C fields that have a token; `first` is the token id of the first value.

    Token ids run on over the fields, in their order. Without fields there is no token.
    """

    first: int = 0
    fields: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return sum(map(len, self.fields.values()))

    @cached_property
    def _tokens(self) -> dict[tuple[str, str], int]:
        pairs = [(name, value) for name, values in self.fields.items() for value in values]
        return {pair: self.first + at for at, pair in enumerate(pairs)}

    def known_fields(self, fields: Mapping[str, str]) -> dict[str, str]:
        """The fields of a request whose value has a token."""
        return {name: value for name, value in fields.items() if (name, value) in self._tokens}

    def row(self, fields: Mapping[str, str]) -> list[int]:
        """(C,) token ids, one a field; 0 where the request has no value, or a value without a token."""
        return [self._tokens.get((name, fields.get(name, "")), 0) for name in self.fields]

    def rows(
        self, scenes: Sequence[str | None], users: Sequence[str], profiles: Mapping[str, Attributes]
    ) -> npt.NDArray[np.int32]:
        """`row` of N events, each of a scene and a user: (N, C)."""
        rows: dict[tuple[str | None, str], list[int]] = {}
        tokens = np.zeros((len(users), len(self.fields)), dtype=np.int32)
        if self.fields:
            for at, key in enumerate(zip(scenes, users, strict=True)):
                row = rows.get(key)
                if row is None:
                    row = rows[key] = self.row(context_fields(key[0], profiles.get(key[1])))
                tokens[at] = row
        return tokens


def count_values(scenes: Mapping[str, int], profiles: Iterable[Attributes]) -> dict[str, Counter[str]]:
    """How often each value of each field occurs: scenes are counted by events, attributes by users."""
    counts = {SCENE: Counter(scenes)}
    for attributes in profiles:
        for name, value in attributes.items():
            counts.setdefault(PROFILE + name, Counter())[value] += 1
    return counts


def vocabulary(counts: Counts, first: int, min_count: int, max_values: int, max_fields: int) -> Context:
    """The `max_values` most frequent values of each field, for the `max_fields` fields with most occurrences.

    A value needs `min_count` occurrences, and a field needs one such value. Ties are in the order of names.
    Token ids count from `first`.
    """
    frequent: dict[str, dict[str, int]] = {}
    for name, values in counts.items():
        enough = [(value, count) for value, count in values.items() if count >= min_count]
        best = dict(sorted(enough, key=lambda pair: (-pair[1], pair[0]))[:max_values])
        if best:
            frequent[name] = best
    order = sorted(frequent, key=lambda name: (-sum(frequent[name].values()), name))
    return Context(first, {name: list(frequent[name]) for name in order[:max_fields]})


def write(context: Context, folder: Path) -> None:
    """Write the context into a bundle's folder. A context without fields writes no file."""
    if context.fields:
        text = msgspec.json.encode(
            {
                "first": context.first,
                "fields": {name: list(values) for name, values in context.fields.items()},
            }
        )
        (folder / CONTEXT).write_bytes(msgspec.json.format(text, indent=1) + b"\n")


def read(folder: Path) -> Context:
    """Read the context of a bundle; empty without the file. Raises SidstreamError for a damaged file."""
    path = folder / CONTEXT
    if not path.exists():
        return Context()
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise SidstreamError(f"{path} is no context ({error}); fetch the bundle again") from error
    return Context(file.first, file.fields)
