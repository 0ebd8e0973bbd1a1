import socket
import subprocess
import sys

import numpy as np
import pytest

from registry.bundles.embedder import WordLlamaEmbedder, item_text
from streams.events import CatalogItem


@pytest.fixture(scope="module")
def embedder():
    return WordLlamaEmbedder()


def test_rows_are_unit_vectors_in_order_also_for_texts_without_words(embedder):
    texts = ["white metal lantern", "", "   ", "\U0001f9f8", "white metal lantern"]
    vectors = embedder.embed(texts)
    assert vectors.shape == (5, embedder.dim)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors[0] == vectors[4]).all()
    assert (embedder.embed(texts[:1])[0] == vectors[0]).all()
    assert embedder.embed([]).shape == (0, embedder.dim)


def test_similar_titles_are_nearer_than_others(embedder):
    lantern, lamp, mug = embedder.embed(["white metal lantern", "red metal lantern", "retrospot coffee mug"])
    assert lantern @ lamp > lantern @ mug


def test_it_loads_without_a_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    fresh = WordLlamaEmbedder()
    assert fresh.embed(["a lantern"]).shape == (1, 256)
    assert fresh.id.startswith("wordllama-l2_supercat-256-")


def test_the_text_of_an_item_is_lower_case_and_repeats_nothing():
    item = CatalogItem.new(item_id="1", title="  RED  Metal\tLantern ", category="Lanterns", brand="red")
    assert item_text(item) == "red metal lantern lanterns"
    assert item_text(CatalogItem.new(item_id="1", title="Lamp", brand="IKEA")) == "lamp ikea"


def test_it_does_not_turn_on_the_logging_of_other_libraries():
    code = (
        "import logging; from registry.bundles.embedder import WordLlamaEmbedder; e = WordLlamaEmbedder(); "
        "e.id; e.embed(['a lantern']); root = logging.getLogger(); assert not root.handlers; "
        "assert root.level == logging.WARNING"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
