"""A sentence encoder as an ONNX graph and a tokenizer: texts -> unit vectors without torch.

The folder is written at `sidstream codebook fit` and kept beside the codebook; agents fetch it from there.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streams.errors import SidstreamError

GRAPH, TOKENIZER, DESCRIPTION = "encoder.onnx", "tokenizer.json", "encoder.json"
# How the id of every encoder of this kind begins.
ID_PREFIX = "sentences-"
# Tokens of one forward: a batch that stays in cache.
_TOKENS = 2048


class SentenceEmbedder:
    """The encoder in a folder that `write_description` completed."""

    def __init__(self, folder: Path) -> None:
        """Read the folder's description. Raises SidstreamError for another or a changed folder."""
        self.folder = folder
        try:
            description = json.loads((folder / DESCRIPTION).read_text())
            self.id, self.dim, self._max_tokens = (
                str(description["id"]), int(description["dim"]), int(description["max_tokens"]),
            )  # fmt: skip
            digests = {name: _digest(folder / name) for name in (GRAPH, TOKENIZER)}
            changed = digests != description["sha256"]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise SidstreamError(f"{folder} holds no sentence encoder ({error}); fetch it again") from error
        if changed:
            raise SidstreamError(f"{folder} was changed since it was written; remove it, it is fetched again")

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / TOKENIZER))
        tokenizer.no_padding()
        tokenizer.enable_truncation(self._max_tokens)
        return tokenizer

    @cached_property
    def _session(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # An agent's batches are small and its threads serve events: no threads that spin between them.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = str(self.folder / GRAPH)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def embed(self, texts: list[str]) -> npt.NDArray[np.float32]:
        """Unit rows, float32 (N, dim), in the order of `texts`."""
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        token_ids = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        by_length: dict[int, list[int]] = {}
        for row, ids in enumerate(token_ids):
            by_length.setdefault(len(ids), []).append(row)
        # Texts of one length at a time: without padding, a vector does not depend on the text's neighbours.
        for length, rows in by_length.items():
            step = max(1, _TOKENS // max(length, 1))
            for begin in range(0, len(rows), step):
                part = rows[begin : begin + step]
                ids = np.array([token_ids[row] for row in part], dtype=np.int64)
                (vectors[part],) = self._session.run(
                    ["embedding"], {"input_ids": ids, "attention_mask": np.ones_like(ids)}
                )
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.where(norms > 0, norms, 1.0)).astype(np.float32)


def write_description(folder: Path, id: str, dim: int, max_tokens: int) -> None:
    """Write the description of the graph and the tokenizer in `folder`: id, sizes and digests."""
    description = {
        "id": id, "dim": dim, "max_tokens": max_tokens,
        "sha256": {name: _digest(folder / name) for name in (GRAPH, TOKENIZER)},
    }  # fmt: skip
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1, sort_keys=True) + "\n")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
