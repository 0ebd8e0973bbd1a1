"""Vectors that were made once: kept on disk by the hash of the embedder's name and the text.

Files are only added, each written beside and renamed, so processes may use one folder at the same time.
Nobody needs the cache: a file that is missing or damaged means that its texts are embedded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from registry.bundles.embedder import Embedder

Float32 = npt.NDArray[np.float32]

# Above so many files they are put together into one.
MAX_FILES = 16
_SUFFIX = ".safetensors"


class CachedEmbedder:
    """An embedder that asks another one only for texts that it was never asked for."""

    def __init__(self, embedder: Embedder, folder: Path) -> None:
        """`folder`: of any embedders; each gets its own folder in it."""
        self.embedder = embedder
        self.id, self.dim = embedder.id, embedder.dim
        self._folder = folder / self.id

    def embed(self, texts: list[str]) -> Float32:
        """Unit rows, float32 (N, dim), in the order of `texts`."""
        known = self._read()
        keys = [self._key(text) for text in texts]
        lacking = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        if lacking:
            rows = self.embedder.embed(list(lacking.values()))
            made = dict(zip(lacking, rows, strict=True))
            self._write(made)
            known |= made
        return np.array([known[key] for key in keys], dtype=np.float32).reshape(len(texts), self.dim)

    def _key(self, text: str) -> bytes:
        return hashlib.sha256(f"{self.id}\0{text}".encode()).digest()[:16]

    def _read(self) -> dict[bytes, Float32]:
        files = sorted(self._folder.glob(f"*{_SUFFIX}"))
        known: dict[bytes, Float32] = {}
        for file in files:
            with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError):
                found = load_file(file)
                keys, rows = found["keys"], found["rows"]
                if keys.shape == (len(rows), 16) and rows.shape[1:] == (self.dim,):
                    known |= dict(zip((key.tobytes() for key in keys), rows, strict=True))
        if len(files) > MAX_FILES:
            kept = self._write(known)
            for file in files:
                if file != kept:
                    file.unlink(missing_ok=True)
        return known

    def _write(self, rows: dict[bytes, Float32]) -> Path:
        """Write one file, named by its keys: whoever writes the same rows writes the same file."""
        self._folder.mkdir(parents=True, exist_ok=True)
        ordered = sorted(rows)
        final = self._folder / f"{hashlib.sha256(b''.join(ordered)).hexdigest()[:16]}{_SUFFIX}"
        keys = np.frombuffer(b"".join(ordered), dtype=np.uint8).reshape(len(ordered), 16)
        with tempfile.TemporaryDirectory(dir=self._folder) as part:
            path = Path(part) / "rows"
            save_file({"keys": keys, "rows": np.array([rows[key] for key in ordered], np.float32)}, path)
            path.replace(final)
        return final
