"""A cache of text vectors on disk, by the hash of the embedder's name and the text.

Files are only added, each written under a temporary name and renamed, so several processes may use one
folder. The texts of a missing or damaged file are embedded again.
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

# Above so many files their rows are merged into one file.
MAX_FILES = 16
_SUFFIX = ".safetensors"


class CachedEmbedder:
    """An embedder that passes only texts without a cached vector to another embedder."""

    def __init__(self, embedder: Embedder, folder: Path) -> None:
        """`folder` may be shared: each embedder has its own folder in it."""
        self.embedder = embedder
        self.id, self.dim = embedder.id, embedder.dim
        self._folder = folder / self.id

    def embed(self, texts: list[str]) -> Float32:
        """Unit rows, float32 (N, dim), in the order of `texts`."""
        cached = self._read_cache()
        keys = [self._key(text) for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in cached}
        if missing:
            rows = self.embedder.embed(list(missing.values()))
            new_rows = dict(zip(missing, rows, strict=True))
            self._write_rows(new_rows)
            cached |= new_rows
        return np.array([cached[key] for key in keys], dtype=np.float32).reshape(len(texts), self.dim)

    def _key(self, text: str) -> bytes:
        return hashlib.sha256(f"{self.id}\0{text}".encode()).digest()[:16]

    def _read_cache(self) -> dict[bytes, Float32]:
        files = sorted(self._folder.glob(f"*{_SUFFIX}"))
        cached: dict[bytes, Float32] = {}
        for file in files:
            with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError):
                stored = load_file(file)
                keys, rows = stored["keys"], stored["rows"]
                if keys.shape == (len(rows), 16) and rows.shape[1:] == (self.dim,):
                    cached |= dict(zip((key.tobytes() for key in keys), rows, strict=True))
        if len(files) > MAX_FILES:
            merged_file = self._write_rows(cached)
            for file in files:
                if file != merged_file:
                    file.unlink(missing_ok=True)
        return cached

    def _write_rows(self, rows: dict[bytes, Float32]) -> Path:
        """Write one file, named by a hash of its keys, so that the same rows have the same file name."""
        self._folder.mkdir(parents=True, exist_ok=True)
        ordered = sorted(rows)
        final = self._folder / f"{hashlib.sha256(b''.join(ordered)).hexdigest()[:16]}{_SUFFIX}"
        keys = np.frombuffer(b"".join(ordered), dtype=np.uint8).reshape(len(ordered), 16)
        with tempfile.TemporaryDirectory(dir=self._folder) as part:
            path = Path(part) / "rows"
            save_file({"keys": keys, "rows": np.array([rows[key] for key in ordered], np.float32)}, path)
            path.replace(final)
        return final
