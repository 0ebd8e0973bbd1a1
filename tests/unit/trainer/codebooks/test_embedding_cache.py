from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.codebooks.embedding_cache import MAX_FILES, CachedEmbedder


class Counting:
    """Vectors from a text's hash, and every text that was asked for."""

    dim = 4

    def __init__(self, id="counting"):
        self.id, self.asked = id, []

    def embed(self, texts):
        self.asked += texts
        return np.array([self.vector(text) for text in texts], np.float32).reshape(len(texts), 4)

    def vector(self, text):
        return np.random.default_rng(list(f"{self.id} {text}".encode())).normal(size=4).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(requests=st.lists(st.lists(st.text(max_size=3), max_size=6), max_size=5))
def test_no_text_is_embedded_twice_and_every_row_is_what_it_would_be(requests, tmp_path_factory):
    folder, inner = tmp_path_factory.mktemp("cache"), Counting()
    for texts in requests:
        rows = CachedEmbedder(inner, folder).embed(texts)
        assert rows.dtype == np.float32
        assert np.array_equal(rows, Counting().embed(texts))
    assert len(inner.asked) == len(set(inner.asked)) == len({text for texts in requests for text in texts})


def test_another_embedder_has_its_own_rows(tmp_path):
    first, second = Counting("one"), Counting("two")
    assert not np.allclose(
        CachedEmbedder(first, tmp_path).embed(["a"]), CachedEmbedder(second, tmp_path).embed(["a"])
    )


@pytest.mark.parametrize("harm", [b"", b"no safetensors", None])
def test_a_damaged_or_missing_file_means_that_its_texts_are_embedded_again(tmp_path, harm):
    CachedEmbedder(Counting(), tmp_path).embed(["a", "b"])
    (file,) = tmp_path.rglob("*.safetensors")
    if harm is None:
        file.unlink()
    else:
        file.write_bytes(harm)
    second = Counting()
    assert np.array_equal(CachedEmbedder(second, tmp_path).embed(["a", "b"]), Counting().embed(["a", "b"]))
    assert second.asked == ["a", "b"]


def test_many_files_become_one_and_nothing_is_lost(tmp_path):
    inner = Counting()
    texts = [str(n) for n in range(MAX_FILES + 3)]
    for text in texts:
        CachedEmbedder(inner, tmp_path).embed([text])
    assert len(list(tmp_path.rglob("*.safetensors"))) <= 3
    assert np.array_equal(CachedEmbedder(inner, tmp_path).embed(texts), Counting().embed(texts))
    assert inner.asked == texts


def test_processes_that_share_the_folder_do_not_harm_each_other(tmp_path):
    def work(seed):
        random = np.random.default_rng(seed)
        for _ in range(20):
            texts = [str(n) for n in random.integers(60, size=5)]
            assert np.array_equal(CachedEmbedder(Counting(), tmp_path).embed(texts), Counting().embed(texts))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
