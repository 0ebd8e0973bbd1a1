"""Small bundles, users with known rates and a publisher that fails: what trials of the registry need."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from registry.bundles.bundle import Bundle, BundleKind, write_bundle
from registry.bundles.codebook import Codebook
from registry.experiment.outcomes import ArmOutcomes
from streams.errors import SidstreamError
from streams.events import Event


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


def bundle(folder: Path, seed: int, kind: BundleKind = "sft", codebook_seed: int = 0) -> Bundle:
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


def arm_outcomes(cvr: float, seed: int, users: int = 2000) -> ArmOutcomes:
    """What a trial has seen of one arm whose users buy a share `cvr` of what they click, in one cohort."""
    random = np.random.default_rng(seed)
    shown = 5 + random.poisson(15, users)
    clicked = random.binomial(shown, 0.2)
    return ArmOutcomes((0,), np.stack([shown, clicked, random.binomial(clicked, cvr)], axis=1)[:, None])
