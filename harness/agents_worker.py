"""An agents worker as a process of its own, with a codebook from a file in place of the registry's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from registry.bundles.codebook import Codebook
from streams.errors import SidstreamError
from streams.settings import KafkaSettings

DIM = 16


class WordEmbedder:
    """The sum of one fixed random vector a word, scaled to length 1: instant, and the same everywhere."""

    id = "words-16"
    dim = DIM

    def embed(self, texts: list[str]) -> np.ndarray:
        """float32 (N, 16)."""
        rows = np.stack([sum((_word_vector(word) for word in text.split()), np.zeros(DIM)) for text in texts])
        return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def _word_vector(word: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
    return np.random.default_rng(seed).standard_normal(DIM)


class FileCodebooks:
    """In place of the registry for the agents: the codebook of one file, as soon as the file exists."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def current_codebook(self) -> str | None:
        return self.codebook().id if self._path.exists() else None

    def codebook(self, id: str | None = None) -> Codebook:
        return Codebook.load(self._path)

    def encoder(self, codebook: str) -> Path:
        raise SidstreamError(f"codebook {codebook} has no encoder")


def word_embedder_of(codebook: Codebook, _encoder: object) -> WordEmbedder:
    """The tests' embedder, in the place of registry.bundles.embedder.load_embedder."""
    if codebook.embedder != WordEmbedder.id:
        raise SidstreamError(f"codebook {codebook.id} was fitted with embedder {codebook.embedder}")
    return WordEmbedder()


def write_codebook(path: Path, sizes: Sequence[int] = (8, 8, 256), seed: int = 0) -> Codebook:
    """Random centroids; the file appears whole."""
    rng = np.random.default_rng(seed)
    centroids = tuple((rng.standard_normal((size, DIM)) / DIM**0.5).astype(np.float32) for size in sizes)
    codebook = Codebook(WordEmbedder.id, centroids)
    codebook.save(path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    return codebook


@contextlib.contextmanager
def worker(
    kafka: KafkaSettings, redis_url: str, codebook: Path, log: Path, **agents_settings: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker process; SIGTERM ends it with the block. AssertionError where its exit code is not 0."""
    process = start_worker(kafka, redis_url, codebook, log, **agents_settings)
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        exit_code = process.wait(60)
        assert exit_code == 0, f"the worker ended with exit code {exit_code}:\n{log.read_text()[-3000:]}"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def start_worker(
    kafka: KafkaSettings, redis_url: str, codebook: Path, log: Path, **agents_settings: Any
) -> subprocess.Popen[bytes]:
    """A worker process without an end, for tests that kill it."""
    configuration = {
        "kafka": kafka.model_dump(mode="json"), "redis": redis_url, "codebook": str(codebook),
        "agents": agents_settings,
    }  # fmt: skip
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "harness.agents_worker", json.dumps(configuration)],
            stdout=out, stderr=subprocess.STDOUT, cwd=Path(__file__).parent.parent, env=os.environ,
        )  # fmt: skip


def main() -> None:
    """Run the worker that the argument describes."""
    from agents import sid_allocator
    from agents.app import create_app, run_worker
    from agents.settings import AgentsSettings
    from streams.settings import HistorySettings, RedisSettings

    sid_allocator.load_embedder = word_embedder_of  # type: ignore[assignment,attr-defined]
    configuration = json.loads(sys.argv[1])
    run_worker(
        lambda: create_app(
            KafkaSettings.model_validate(configuration["kafka"]),
            RedisSettings.model_validate({"url": configuration["redis"]}),
            HistorySettings(),
            AgentsSettings.model_validate(configuration["agents"]),
            FileCodebooks(Path(configuration["codebook"])),
        )
    )


if __name__ == "__main__":
    main()
