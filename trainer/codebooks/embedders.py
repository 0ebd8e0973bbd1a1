"""The text embedder that the settings name, exported as ONNX for the agents where it needs torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from registry.bundles.embedder import WordLlamaEmbedder
from registry.bundles.encoder import GRAPH, PREFIX, TOKENIZER, SentenceEmbedder, write_about
from streams.errors import SidstreamError
from trainer.codebooks.embedding_cache import CachedEmbedder

SENTENCES = "sentence-transformers:"
# Float32 sums in another order differ by some 1e-6; 1e-4 is another function.
TOLERANCE = 1e-4
_OPSET = 18


def open_embedder(name: str, cache: Path) -> CachedEmbedder:
    """The embedder with the name of SIDSTREAM_CODEBOOK__EMBEDDER; its vectors are cached below `cache`.

    A sentence encoder is exported there, too.
    Raises SidstreamError for another name, or for a model that cannot be loaded or exported.
    """
    if name == "wordllama":
        return CachedEmbedder(WordLlamaEmbedder(), cache / "embeddings")
    if not name.startswith(SENTENCES):
        raise SidstreamError(
            f"codebook.embedder is {name!r}; set SIDSTREAM_CODEBOOK__EMBEDDER to wordllama or to "
            f"{SENTENCES}<folder or model id>"
        )
    exported = SentenceEmbedder(export_encoder(name.removeprefix(SENTENCES), cache / "encoders"))
    return CachedEmbedder(exported, cache / "embeddings")


def encoder_folder(embedder: CachedEmbedder) -> Path | None:
    """The folder of the exported encoder for the agents; None where the embedder is one of their own."""
    return embedder.embedder.folder if isinstance(embedder.embedder, SentenceEmbedder) else None


class _Encoder(nn.Module):
    """Every module of a sentence-transformers model but the tokenizer: ids (B, T) -> vectors (B, D)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        for module in self.model:
            features = module(features)
        return features["sentence_embedding"]


def export_encoder(source: str, folder: Path) -> Path:
    """The folder below `folder` with the ONNX graph of a sentence-transformers folder or model id.

    Its name is a hash of the weights, the tokenizer and the modules, so the same model is exported once. The
    graph's outputs are compared with torch's. Raises SidstreamError where the model cannot be loaded, or the
    graph differs.
    """
    model = _load(source)
    id = f"{PREFIX}{_dim(model)}-{_content(model)}"
    encoder = folder / id
    if encoder.is_dir():
        with contextlib.suppress(SidstreamError):
            SentenceEmbedder(encoder)
            return encoder
        shutil.rmtree(encoder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
        export_folder = Path(temporary)
        model.tokenizer.backend_tokenizer.save(str(export_folder / TOKENIZER))
        _export(model, export_folder / GRAPH)
        write_about(export_folder, id, _dim(model), int(model.max_seq_length))
        _check(model, SentenceEmbedder(export_folder))
        # Another process may have been faster: the same folder name means the same content.
        with contextlib.suppress(OSError):
            export_folder.rename(encoder)
            export_folder.mkdir()
    return encoder


def _load(source: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        raise SidstreamError(f"{error.name} is not installed: pip install 'sidstream[train]'") from error
    for name in ("sentence_transformers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return SentenceTransformer(source, device="cpu").eval()
    except Exception as error:  # what a damaged folder or an absent model raises is not of one kind
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise SidstreamError(
            f"codebook.embedder: {source!r} is no sentence-transformers model that can be loaded ({first}); "
            f"set SIDSTREAM_CODEBOOK__EMBEDDER to {SENTENCES}<folder with modules.json, or model id>"
        ) from error


def _dim(model: Any) -> int:
    return int(model.get_embedding_dimension())


def _content(model: Any) -> str:
    digest = hashlib.sha256(json.dumps([repr(model), int(model.max_seq_length)]).encode())
    digest.update(model.tokenizer.backend_tokenizer.to_str().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _export(model: Any, path: Path) -> None:
    from trainer.generator.export import silent_exporter

    ids = torch.tensor([[0, 1, 2], [2, 1, 0]])
    with silent_exporter(), torch.no_grad():
        torch.onnx.export(
            _Encoder(model), (ids, torch.ones_like(ids)), str(path),
            input_names=["input_ids", "attention_mask"], output_names=["embedding"],
            dynamic_axes={
                "input_ids": {0: "B", 1: "T"}, "attention_mask": {0: "B", 1: "T"}, "embedding": {0: "B"},
            },
            opset_version=_OPSET, dynamo=False, external_data=False,
        )  # fmt: skip


def _check(model: Any, exported: SentenceEmbedder) -> None:
    texts = [
        "white metal lantern",
        "a",
        "red retrospot tea towel " * 40,
        "\U0001f9f8 1 2 3",
    ]
    expected = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    largest_difference = float(np.abs(exported.embed(texts) - expected).max())
    # A NaN compares false: written so that it fails too.
    if not largest_difference < TOLERANCE:
        raise SidstreamError(
            f"the exported encoder differs from sentence-transformers by {largest_difference:.2g} "
            f"(at most {TOLERANCE} is accepted); use wordllama, and report the model and the version of torch"
        )
