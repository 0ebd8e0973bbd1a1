"""Text of an item -> unit vector, on the CPU and without torch."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from registry.bundles.codebook import Codebook
from registry.bundles.encoder import ID_PREFIX, SentenceEmbedder
from streams.errors import SidstreamError
from streams.events import CatalogItem


class Embedder(Protocol):
    """Turns texts into vectors. A codebook names the `id` of the embedder that it was fitted with."""

    @property
    def id(self) -> str:
        """Names the weights and the way that text is prepared: another id, other vectors."""
        ...

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    def embed(self, texts: list[str]) -> npt.NDArray[np.float32]:
        """Unit rows, float32 (N, dim), in the order of `texts`."""
        ...


class WordLlamaEmbedder:
    """WordLlama's token vectors averaged over the text; its wheel carries weights and tokenizer."""

    dim = 256

    @cached_property
    def id(self) -> str:
        """Names the weights by their content."""
        weights = _wordllama_folder() / "weights" / "l2_supercat_256.safetensors"
        return f"wordllama-l2_supercat-256-{hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}"

    @cached_property
    def _model(self) -> Any:
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        from wordllama import WordLlama

        # Its import turns the whole process's logging on.
        root.handlers[:] = handlers
        root.setLevel(level)
        # The package holds the tokenizer too: as cache folder it saves a download.
        return WordLlama.load(cache_dir=_wordllama_folder(), dim=self.dim, disable_download=True)

    def embed(self, texts: list[str]) -> npt.NDArray[np.float32]:
        """Unit rows, float32 (N, 256). A text without a known token gets the first axis."""
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        rows = np.asarray(self._model.embed(texts, norm=False), dtype=np.float32)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        vectors = (rows / np.where(length > 0, length, 1.0)).astype(np.float32)
        vectors[length[:, 0] == 0, 0] = 1.0
        return vectors


def _wordllama_folder() -> Path:
    spec = importlib.util.find_spec("wordllama")
    if spec is None or spec.origin is None:
        raise SidstreamError("wordllama is not installed: pip install sidstream")
    return Path(spec.origin).parent


def load_embedder(codebook: Codebook, encoder: Callable[[str], Path]) -> Embedder:
    """Load the embedder that a codebook was fitted with; `encoder` fetches a codebook's encoder by its id.

    Raises SidstreamError where this version has another embedder, or the fetched encoder is damaged.
    """
    embedder: Embedder
    if codebook.embedder.startswith(ID_PREFIX):
        embedder = SentenceEmbedder(encoder(codebook.id))
    else:
        embedder = WordLlamaEmbedder()
    if embedder.id != codebook.embedder:
        raise SidstreamError(
            f"codebook {codebook.id} was fitted with embedder {codebook.embedder}, this version has "
            f"{embedder.id}: fit it again with `sidstream codebook fit --replace`"
        )
    # An embedder that cannot be loaded fails here, before a batch of items is read.
    embedder.embed(["item"])
    return embedder


def title_vectors(titles: Sequence[str]) -> npt.NDArray[np.float32]:
    """The generator's input for titles: unit rows, float32 (N, 256), the same in the trainer and in serving.

    Always WordLlama's vectors, whatever the codebook was fitted with: serving has no other embedder.
    """
    return _word_llama().embed([title.lower() for title in titles])


@cache
def _word_llama() -> WordLlamaEmbedder:
    return WordLlamaEmbedder()


def item_text(item: CatalogItem) -> str:
    """The text that an item's SID is made from: title, then category and brand where the title lacks them.

    Lower case: the tokenizer cuts capitals into letter groups that carry little meaning.
    """
    text = _plain(item.title)
    for part in (_plain(item.category), _plain(item.brand)):
        if part and part not in text:
            text = f"{text} {part}"
    return text


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
