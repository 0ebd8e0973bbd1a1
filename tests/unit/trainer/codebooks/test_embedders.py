"""A sentence encoder gives the same vectors by ONNX as by its library, and is refused where not whole."""

import json

import numpy as np
import pytest

from registry.bundles.codebook import Codebook
from registry.bundles.embedder import WordLlamaEmbedder, embedder_of
from registry.bundles.encoder import ABOUT, GRAPH, TOKENIZER, SentenceEmbedder
from streams.errors import SidstreamError
from trainer.codebooks.embedders import encoder_folder, export_encoder, open_embedder

WORDS = [*"white metal lantern red mug tea towel box heart".split(), "[UNK]", "[PAD]", "[CLS]", "[SEP]"]  # noqa: SIM905


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny encoder with random weights, as sentence-transformers writes it."""
    pytest.importorskip("sentence_transformers")
    import torch
    from sentence_transformers import SentenceTransformer, models
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {word: at for at, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(mark, vocabulary[mark]) for mark in ("[CLS]", "[SEP]")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32, pad_token_id=vocabulary["[PAD]"],
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    fast.save_pretrained(folder / "bert")
    bert = models.Transformer(str(folder / "bert"), max_seq_length=16)
    SentenceTransformer(modules=[bert, models.Pooling(16)], device="cpu").save(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    return export_encoder(str(source), tmp_path_factory.mktemp("cache"))


def test_rows_are_those_of_the_library_alone_and_in_any_company(source, exported):
    from sentence_transformers import SentenceTransformer

    texts = ["white metal lantern", "mug", "tea towel box heart " * 9, "", "mug"]
    expected = SentenceTransformer(str(source), device="cpu").encode(texts, normalize_embeddings=True)
    embedder = SentenceEmbedder(exported)
    rows = embedder.embed(texts)
    assert rows.dtype == np.float32
    assert np.abs(rows - expected).max() < 1e-5
    assert np.allclose(embedder.embed(["mug"])[0], rows[1], atol=1e-6)
    assert embedder.embed([]).shape == (0, 16)


def test_the_same_model_is_exported_once_and_another_has_another_name(source, exported):
    stamp = (exported / GRAPH).stat().st_mtime_ns
    assert export_encoder(str(source), exported.parent) == exported
    assert (exported / GRAPH).stat().st_mtime_ns == stamp
    assert exported.name == SentenceEmbedder(exported).id


@pytest.mark.parametrize("name", [GRAPH, TOKENIZER, ABOUT])
def test_a_folder_that_is_not_whole_is_refused_and_exported_anew(source, tmp_path, name):
    exported = export_encoder(str(source), tmp_path)
    (exported / name).write_bytes(b"{}")
    with pytest.raises(SidstreamError):
        SentenceEmbedder(exported)
    assert SentenceEmbedder(export_encoder(str(source), tmp_path)).dim == 16


def test_a_codebook_is_given_the_embedder_that_it_was_fitted_with(exported):
    id = json.loads((exported / ABOUT).read_text())["id"]
    book = Codebook(id, (np.eye(2, 16, dtype=np.float32),))
    assert embedder_of(book, lambda codebook: exported).id == id
    words = WordLlamaEmbedder()
    plain = Codebook(words.id, (np.eye(2, 256, dtype=np.float32),))
    assert embedder_of(plain, lambda codebook: pytest.fail("no encoder is needed")).id == words.id
    with pytest.raises(SidstreamError, match="codebook fit --replace"):
        embedder_of(Codebook("other", book.centroids), lambda codebook: exported)


def test_the_settings_name_the_embedder_and_agents_get_what_they_need(source, tmp_path):
    assert encoder_folder(open_embedder("wordllama", tmp_path)) is None
    opened = open_embedder(f"sentence-transformers:{source}", tmp_path)
    assert SentenceEmbedder(encoder_folder(opened)).id == opened.id
    with pytest.raises(SidstreamError, match="SIDSTREAM_CODEBOOK__EMBEDDER"):
        open_embedder("word2vec", tmp_path)
    with pytest.raises(SidstreamError, match="SIDSTREAM_CODEBOOK__EMBEDDER"):
        open_embedder(f"sentence-transformers:{tmp_path / 'absent'}", tmp_path)
