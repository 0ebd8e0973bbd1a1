"""An empty registry on the session's MLflow server for each test."""

from __future__ import annotations

import uuid

import pytest

from harness.registry_support import Outbox, bundle
from registry.bundles.store import Registry
from registry.settings import RegistrySettings


@pytest.fixture
def registry(mlflow_server, tmp_path) -> Registry:
    """An empty registry: a recommender name of its own on the shared server."""
    name = f"r{uuid.uuid4().hex[:8]}"
    return Registry(RegistrySettings(tracking_uri=mlflow_server.address, name=name, cache=tmp_path / "cache"))


@pytest.fixture
def outbox() -> Outbox:
    return Outbox()


@pytest.fixture
def three(registry, tmp_path) -> list[str]:
    """Versions of three bundles."""
    return [
        registry.register(bundle(tmp_path, seed, kind)) for seed, kind in enumerate(("base", "sft", "dpo"))
    ]
