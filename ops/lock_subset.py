"""Print the part of requirements.lock that one image needs, hashes included.

    python ops/lock_subset.py                     the core dependencies, without any extra
    python ops/lock_subset.py --extra train       the core dependencies and an extra's
    python ops/lock_subset.py --only mlflow       one locked package and what it needs

The lock says under each package who asked for it (`# via`), so its parts are found without an index, and an
image can never hold a version or a hash that the lock does not. Standard library only: it runs before
anything is installed.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_NAME = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)")


def normalised(requirement: str) -> str:
    """The package that a requirement asks for, spelt as the lock spells it (PEP 503)."""
    found = _NAME.match(requirement.strip())
    if not found:
        raise ValueError(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", found.group(1)).lower()


def blocks(lock: str) -> dict[str, str]:
    """The lock's text by package: the pin, its hashes and who asked for it."""
    found: dict[str, str] = {}
    name = ""
    for line in lock.splitlines(keepends=True):
        if line.startswith("#"):
            continue
        if line[:1].strip():
            name = normalised(line)
        if name:
            found[name] = found.get(name, "") + line
    return found


def parents(block: str) -> set[str]:
    """Who asked for the package of `block` (the project itself left out)."""
    comments = (
        line.strip().removeprefix("#").strip() for line in block.splitlines() if line.strip()[:1] == "#"
    )
    named = (text.removeprefix("via").strip() for text in comments)
    return {normalised(text) for text in named if text and "(" not in text}


def subset(lock: str, roots: Iterable[str]) -> dict[str, str]:
    """The blocks of `roots` and of all that they need. Raises ValueError for a root not in the lock."""
    packages = blocks(lock)
    asked_by = {name: parents(block) for name, block in packages.items()}
    kept = {normalised(root) for root in roots}
    if missing := sorted(kept - packages.keys()):
        raise ValueError(f"not in the lock: {', '.join(missing)}; compile requirements.lock again")
    while grown := {name for name, by in asked_by.items() if by & kept} - kept:
        kept |= grown
    return {name: packages[name] for name in sorted(kept)}


def roots_of(project: dict[str, object], extras: Iterable[str]) -> list[str]:
    """What the project asks for by itself, with these extras. Raises ValueError for an unknown extra."""
    table = project["project"]
    assert isinstance(table, dict)
    optional = table.get("optional-dependencies", {})
    wanted = list(table["dependencies"])
    for extra in extras:
        if extra not in optional:
            raise ValueError(f"no extra named {extra!r}; there are {', '.join(sorted(optional))}")
        wanted += optional[extra]
    return wanted


def main() -> int:
    """Print the subset that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--extra", action="append", default=[], help="an extra of pyproject.toml")
    parser.add_argument("--only", action="append", default=[], help="a locked package, instead of the core")
    asked = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    try:
        roots = asked.only or roots_of(project, asked.extra)
        chosen = subset((ROOT / "requirements.lock").read_text(), roots)
    except ValueError as error:
        print(f"lock_subset: {error}", file=sys.stderr)
        return 1
    sys.stdout.write("".join(chosen.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
