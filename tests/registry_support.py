"""What tests of the registry share: an MLflow server, small bundles, users with known rates."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from registry.bundle import Bundle, Kind, write_bundle
from registry.codebook import Codebook
from registry.outcomes import Seen
from sidstream.stack.servers import MLFLOW_ENVIRONMENT, http_answers, mlflow_command
from streams.children import spawn
from streams.errors import SidstreamError
from streams.events import Event
from tests.support import free_port, wait_until


@contextmanager
def local_mlflow(folder: Path) -> Iterator[str]:
    """An MLflow server in `folder`, running; its address. Its artifacts are in folder / "artifacts"."""
    port = free_port()
    child = spawn("mlflow", mlflow_command(folder, port), folder / "log", env=os.environ | MLFLOW_ENVIRONMENT)
    try:
        wait_until(lambda: http_answers(port, "/health") or not child.alive, 120, "MLflow")
        assert child.alive, (folder / "log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        child.stop(grace=10)


class Outbox:
    """Takes what a release publishes; fails once where it is told to."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.broken = False

    def publish(self, event: Event) -> None:
        if self.broken:
            self.broken = False
            raise SidstreamError("Kafka does not answer")
        self.events.append(event)


def codebook(seed: int = 0) -> Codebook:
    random = np.random.default_rng(seed)
    return Codebook("test", tuple(random.normal(size=(n, 8)).astype(np.float32) for n in (4, 3, 2)))


def bundle(folder: Path, seed: int, kind: Kind = "sft", codebook_seed: int = 0) -> Bundle:
    folder = folder / f"bundle-{seed}"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(bytes([seed]) * 100)
    for name in ("encode", "step_0", "step_1", "step_2"):
        (folder / f"{name}.onnx").write_bytes(name.encode())
    return write_bundle(
        folder, kind=kind, codebook=codebook(codebook_seed), popular=["a"], max_items=50, sids={0: 1},
        window={"clicks": {0: (0, 5)}}, seed=seed,
    )  # fmt: skip


def arm_seen(cvr: float, seed: int, users: int = 2000) -> Seen:
    """What a trial has seen of one arm whose users buy a share `cvr` of what they click, in one cohort."""
    random = np.random.default_rng(seed)
    shown = 5 + random.poisson(15, users)
    clicked = random.binomial(shown, 0.2)
    return Seen((0,), np.stack([shown, clicked, random.binomial(clicked, cvr)], axis=1)[:, None])
