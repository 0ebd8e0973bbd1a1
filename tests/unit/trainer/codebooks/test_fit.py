import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.bundles.codebook import Codebook
from registry.settings import CodebookSettings
from streams.errors import SidstreamError
from streams.events import CatalogItem
from trainer.codebooks.fit import ReplacedCodebook, assign_keeping, fit_codebook, last_level_size
from trainer.codebooks.kmeans import code_means, kmeans, nearest_centroids, residual_kmeans


class Letters:
    """Vectors from letter counts: quick, and similar titles are near."""

    id = "letters"
    dim = 26

    def embed(self, texts):
        rows = (
            np.array([[text.count(chr(97 + n)) for n in range(26)] for text in texts], dtype=np.float32)
            + 0.01
        )
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


WORDS = ["lamp", "mug", "box", "bag", "red", "blue", "tin", "set", "heart", "garden", "paper", "zinc"]


def items(count, distinct=None, seed=0):
    random = np.random.default_rng(seed)
    titles = [" ".join(random.choice(WORDS, 4)) for _ in range(distinct or count)]
    return [CatalogItem.new(item_id=f"i{n:05}", title=titles[n % len(titles)]) for n in range(count)]


def fitted(catalogue, old=None, sequences=(), **codebook_settings):
    return fit_codebook(
        catalogue,
        Letters(),
        CodebookSettings(**{"size": 8, **codebook_settings}),
        sequences=sequences,
        old=old,
    )


def unit_rows(count, dim=6, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("method", ["kmeans", "rqvae"])
def test_every_item_has_a_sid_of_its_own(method):
    catalogue = items(300)
    steps = []
    fit = fit_codebook(catalogue, Letters(), CodebookSettings(size=8, method=method), steps.append)
    assert fit.items == sorted(item.item_id for item in catalogue)
    assert len(set(fit.sids)) == 300
    sizes = fit.codebook.sizes
    assert all(0 <= code < size for sid in fit.sids for code, size in zip(sid, sizes, strict=True))
    assert sum(steps) == 3
    assert fit.codebook.embedder == "letters"


@pytest.mark.parametrize("method", ["kmeans", "rqvae"])
def test_the_last_level_has_room_for_the_fullest_prefix_and_more(method):
    fit = fitted(items(300, distinct=40), size=4, headroom=1.5, method=method)
    prefixes = fit.codebook.quantise(fit.vectors)[0][:, :2]
    largest = np.unique(prefixes, axis=0, return_counts=True)[1].max()
    assert fit.codebook.sizes[:2] == (4, 4)
    assert fit.codebook.sizes[2] >= 1.5 * largest


@pytest.mark.parametrize(
    ("largest", "headroom", "least", "size"),
    [(1, 1.5, 16, 16), (11, 1.5, 16, 32), (32, 1.0, 16, 32), (33, 1, 1, 64), (1, 1, 256, 256)],
)
def test_the_last_level_is_the_next_power_of_two(largest, headroom, least, size):
    assert last_level_size(largest, headroom, least) == size


def test_a_prefix_beyond_any_code_is_an_error_with_a_remedy():
    with pytest.raises(SidstreamError, match="SIDSTREAM_CODEBOOK__SIZE"):
        last_level_size(60_000, 1.5, 16)


@pytest.mark.parametrize("method", ["kmeans", "rqvae"])
def test_the_order_and_repetition_of_catalogue_records_do_not_matter(method):
    catalogue = items(200)
    first = fitted(catalogue, method=method)
    two = fitted([*catalogue[::-1], catalogue[3]], method=method)
    assert first.codebook.id == two.codebook.id
    assert first.sids == two.sids


@pytest.mark.parametrize("method", ["kmeans", "rqvae"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_tiny_catalogue_gets_a_codebook_with_room(count, method):
    fit = fitted(items(count), method=method)
    assert len(set(fit.sids)) == count
    assert fit.codebook.sizes == (8, 8, 16)
    taken_sids = set(fit.sids)
    later = fit.codebook.assign(Letters().embed([item.title for item in items(60)]), taken_sids)
    assert not taken_sids & set(later)


def test_an_empty_catalogue_is_an_error_with_a_remedy():
    with pytest.raises(SidstreamError, match="the catalogue is empty"):
        fitted([])


def test_centroids_are_the_means_of_the_rows_that_are_nearest_to_them():
    groups = unit_rows(4)
    rows = np.repeat(groups, 50, axis=0) + np.random.default_rng(1).normal(0, 0.01, size=(200, 6))
    centroids = kmeans(rows, 4, seed=0)
    codes = nearest_centroids(rows, centroids)
    assert [len(set(codes[at : at + 50])) for at in range(0, 200, 50)] == [1, 1, 1, 1]
    for code in range(4):
        assert np.allclose(centroids[code], rows[codes == code].mean(axis=0), atol=1e-5)


def test_a_code_starts_at_the_mean_of_the_rows_that_had_it():
    rows = unit_rows(6).astype(np.float64)
    centroids = code_means(rows, np.array([0, 0, 2, 2, -1, 2]), 4, seed=0)
    assert np.allclose(centroids[0], rows[:2].mean(axis=0), atol=1e-6)
    assert np.allclose(centroids[2], rows[[2, 3, 5]].mean(axis=0), atol=1e-6)
    assert all(np.abs(rows - centroids[code]).sum(axis=1).min() < 1e-6 for code in (1, 3))


def test_codes_keep_their_meaning_when_a_level_is_fitted_again():
    rows = unit_rows(400)
    before, _, codes = residual_kmeans(rows, [16, 16], seed=1)
    after, _, refitted_codes = residual_kmeans(rows, [16, 16], seed=99, old=codes)
    assert (refitted_codes[:, 0] == codes[:, 0]).mean() > 0.95
    assert np.abs(after[0] - before[0]).max() < 0.2


@pytest.mark.learning
@pytest.mark.parametrize(("method", "share"), [("kmeans", 0.8), ("rqvae", 0.6)])
def test_most_items_keep_their_sid_when_the_catalogue_grows(method, share):
    catalogue = items(400)
    first = fitted(catalogue[:320], method=method)
    old = ReplacedCodebook(first.codebook, dict(zip(first.items, first.sids, strict=True)))
    extended_fit = fitted(catalogue, old, method=method)
    fresh = fitted(catalogue, method=method, seed=11)
    assert len(set(extended_fit.sids)) == 400
    assert all(new >= was for new, was in zip(extended_fit.codebook.sizes, first.codebook.sizes, strict=True))
    assert extended_fit.unchanged_sids(old) > share * 320
    assert fresh.unchanged_sids(old) < 0.1 * 320


def test_sizes_never_shrink_below_those_of_the_codebook_that_is_replaced():
    first = fitted(items(200), size=16, last=64)
    old = ReplacedCodebook(first.codebook, dict(zip(first.items, first.sids, strict=True)))
    assert fitted(items(200), old, size=4, last=1).codebook.sizes == (16, 16, 64)


def test_a_codebook_of_another_length_begins_anew():
    first = fitted(items(100))
    old = ReplacedCodebook(first.codebook, dict(zip(first.items, first.sids, strict=True)))
    longer = fitted(items(100), old, levels=4)
    assert longer.unchanged_sids(old) == 0
    assert longer.codebook.id == fitted(items(100), levels=4).codebook.id


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_an_item_keeps_its_whole_sid_exactly_where_its_first_code_stays(data):
    random = np.random.default_rng(data.draw(st.integers(0, 50)))
    codebook = Codebook("test", tuple(random.normal(size=(size, 6)).astype(np.float32) for size in (4, 3, 5)))
    count = data.draw(st.integers(1, 40))
    vectors = unit_rows(count, seed=data.draw(st.integers(0, 50)))
    every = data.draw(st.permutations(range(60)))
    slots = [(n // 15, n // 5 % 3, n % 5) for n in every]
    has_old_sid = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    old = [slots[row] if had else None for row, had in enumerate(has_old_sid)]
    given_sids = assign_keeping(codebook, vectors, old)
    assert len(set(given_sids)) == count
    first = codebook.quantise(vectors)[0][:, 0]
    for row in range(count):
        if old[row] is not None and old[row][0] == first[row]:
            assert given_sids[row] == old[row]
    reserved = {sid for sid, code in zip(old, first, strict=True) if sid is not None and sid[0] == code}
    for row in range(count):
        if given_sids[row] not in reserved:
            earlier = reserved | set(given_sids[:row])
            assert given_sids[row] == next(s for s in codebook.candidates(vectors[row]) if s not in earlier)


def test_items_that_users_touch_together_share_codes_where_their_titles_say_nothing():
    catalogue = [CatalogItem.new(item_id=f"i{n:03}", title="thing") for n in range(120)]
    random = np.random.default_rng(0)
    groups = np.arange(120) % 6
    sequences = [
        [f"i{n:03}" for n in random.permutation(np.flatnonzero(groups == random.integers(6)))]
        for _ in range(300)
    ]
    fit = fitted(catalogue, sequences=sequences, collaborative=0.5, collaborative_dim=16)
    first = np.array([sid[0] for sid in fit.sids])
    for group in range(6):
        others = first[groups != group]
        assert not set(first[groups == group]) & set(others.tolist())
    # A new item has its text alone, and gets a SID by it.
    assert fit.codebook.collaborative_dims == 16
    assert next(fit.codebook.candidates(Letters().embed(["thing"])[0])) is not None
