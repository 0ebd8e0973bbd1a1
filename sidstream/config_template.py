"""The commented settings file `sidstream.example.toml`, rendered from the settings' own types.

    python -m sidstream.config_template > sidstream.example.toml

The file has every setting once, commented out, with its default, its meaning and its limits, so that it
always agrees with the program.
"""

from __future__ import annotations

import json
import sys
import textwrap
import types
from collections.abc import Iterator
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

_WIDTH = 108
_HEADER = """\
# Settings of sidstream. Copy this file to sidstream.toml, or name another with SIDSTREAM_CONFIG.
#
# A line that begins with "#name =" is a setting with its default; one without a value has no default.
# An environment variable wins over the file: SIDSTREAM_KAFKA__BOOTSTRAP is `bootstrap` in [kafka].
# Keep secrets out of this file: give passwords by the environment.
"""
_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_LENGTHS = {"min_length": "length at least", "max_length": "length at most"}


def render(settings: type[BaseModel]) -> str:
    """The whole file for a settings class whose fields are sections or plain settings."""
    return _HEADER + "".join(
        f"\n{line}\n" if line.startswith("[") else f"{line}\n" for line in _lines(settings, ())
    )


def _lines(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[str]:
    sections = {name: field for name, field in model.model_fields.items() if _section(field)}
    for name, field in model.model_fields.items():
        if name not in sections:
            yield from _setting(name, field)
    for name, field in sections.items():
        inner = _section(field)
        assert inner is not None
        yield f"[{'.'.join((*path, name))}]"
        yield from _prose(" ".join((inner.__doc__ or "").split()))
        yield from _lines(inner, (*path, name))


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model behind a field that is a section, else None."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _setting(name: str, field: FieldInfo) -> Iterator[str]:
    default = field.get_default(call_default_factory=True, validated_data={})
    # An absolute folder is of this machine and user: it would be another one in the next person's file.
    of_the_machine = isinstance(default, Path) and default.is_absolute()
    own = "empty: a folder of the user's own" if of_the_machine else ""
    yield ""
    yield from _prose("; ".join(part for part in (field.description, _allowed(field), own) if part))
    if default is PydanticUndefined or default is None or of_the_machine:
        yield f"#{name} ="
    else:
        yield f"#{name} = {literal(default)}"


def _prose(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH)]


def _allowed(field: FieldInfo) -> str:
    """What values a field takes, beyond its description: choices and limits."""
    limits = []
    if choices := list(_choices(field.annotation)):
        limits.append("one of " + ", ".join(str(choice) for choice in choices))
    for constraint in field.metadata:
        for attribute, words in (_LIMITS | _LENGTHS).items():
            limit = getattr(constraint, attribute, None)
            if limit is not None:
                limits.append(f"{words} {limit}")
    return ", ".join(limits)


def _choices(kind: Any) -> Iterator[Any]:
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    elif get_origin(kind) in (Union, types.UnionType):
        for part in get_args(kind):
            yield from _choices(part)


def literal(value: Any) -> str:
    """A default as TOML. Raises TypeError for a type that the settings do not use."""
    match value:
        case bool():
            return "true" if value else "false"
        case Enum():
            return literal(value.value)
        case int() | float():
            return repr(value)
        case str() | Path():
            return json.dumps(str(value), ensure_ascii=False)
        case SecretStr():
            raise TypeError("a secret has a default; a secret's default must be none")
        case timedelta():
            return repr(value.total_seconds())
        case list() | tuple() | set() | frozenset():
            return "[" + ", ".join(literal(part) for part in value) + "]"
        case dict():
            return (
                "{" + ", ".join(f"{json.dumps(key)} = {literal(part)}" for key, part in value.items()) + "}"
            )
    raise TypeError(f"{type(value).__name__} has no TOML form here")


def main() -> None:
    """Write the file to standard output."""
    from sidstream.settings import Settings

    sys.stdout.write(render(Settings))


if __name__ == "__main__":
    main()
