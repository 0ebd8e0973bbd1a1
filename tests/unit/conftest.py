"""Fixtures that unit tests of several rooms share."""

from __future__ import annotations

import pytest

from tests.tiny_shop import Shop, shop


@pytest.fixture(scope="module")
def tiny_shop() -> Shop:
    """A shop of a few items, its log and the rows that a generator learns from it."""
    return shop()
