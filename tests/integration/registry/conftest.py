"""One MLflow server for the session, and an empty registry on it for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.registry_support import Outbox, bundle
from harness.servers import local_mlflow
from registry.bundles.store import Registry
from registry.settings import RegistrySettings


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """An MLflow server: its address, and the folder of its artifacts."""
    folder = tmp_path_factory.mktemp("mlflow")
    with local_mlflow(folder) as address:
        yield address, folder / "artifacts"


@pytest.fixture
def registry(server, tmp_path) -> Registry:
    """An empty registry: a recommender name of its own on the shared server."""
    name = f"r{uuid.uuid4().hex[:8]}"
    return Registry(RegistrySettings(tracking_uri=server[0], name=name, cache=tmp_path / "cache"))


@pytest.fixture
def outbox() -> Outbox:
    return Outbox()


@pytest.fixture
def three(registry, tmp_path) -> list[str]:
    """Versions of three bundles."""
    return [
        registry.register(bundle(tmp_path, seed, kind)) for seed, kind in enumerate(("base", "sft", "dpo"))
    ]
