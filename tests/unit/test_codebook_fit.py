import numpy as np
import pytest

from registry.settings import CodebookSettings
from streams.errors import SidstreamError
from streams.events import CatalogItem
from trainer.codebook import fill, fit_codebook, last_size


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


def items(count, distinct=None):
    words = ["lamp", "mug", "box", "bag", "red", "blue", "tin", "set", "heart", "garden", "paper", "zinc"]
    random = np.random.default_rng(0)
    titles = [" ".join(random.choice(words, 4)) for _ in range(distinct or count)]
    return [CatalogItem.new(item_id=f"i{n:05}", title=titles[n % len(titles)]) for n in range(count)]


def test_every_item_has_a_sid_of_its_own():
    catalogue = items(500)
    seen = []
    codebook, sids = fit_codebook(catalogue, Letters(), CodebookSettings(size=8), seen.append)
    assert [item for item, _ in sids] == sorted(item.item_id for item in catalogue)
    assert len({sid for _, sid in sids}) == 500
    assert all(0 <= code < size for _, sid in sids for code, size in zip(sid, codebook.sizes, strict=True))
    assert sum(seen) == 3
    assert codebook.embedder == "letters"


def test_the_last_level_has_room_for_the_fullest_prefix_and_more():
    catalogue = items(500, distinct=40)
    codebook, _ = fit_codebook(catalogue, Letters(), CodebookSettings(size=4, headroom=1.5))
    found = fill(codebook, Letters().embed([item.title for item in catalogue]))
    assert codebook.sizes[:2] == (4, 4)
    assert codebook.sizes[2] >= 1.5 * found.largest_prefix
    assert found.items == 500


@pytest.mark.parametrize(
    ("largest", "headroom", "size"), [(1, 1.5, 16), (11, 1.5, 32), (32, 1.0, 32), (33, 1, 64)]
)
def test_the_last_level_is_the_next_power_of_two(largest, headroom, size):
    assert last_size(largest, headroom) == size


def test_a_prefix_beyond_any_code_is_an_error_with_a_remedy():
    with pytest.raises(SidstreamError, match="SIDSTREAM_CODEBOOK__SIZE"):
        last_size(60_000, 1.5)


def test_the_order_and_repetition_of_catalogue_records_do_not_matter():
    catalogue = items(200)
    one = fit_codebook(catalogue, Letters(), CodebookSettings(size=8))
    two = fit_codebook([*catalogue[::-1], catalogue[3]], Letters(), CodebookSettings(size=8))
    assert one[0].id == two[0].id
    assert one[1] == two[1]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_tiny_catalogue_gets_a_codebook_with_room(count):
    codebook, sids = fit_codebook(items(count), Letters(), CodebookSettings(size=8))
    assert len(set(sids)) == count
    assert codebook.sizes == (8, 8, 16)
    taken = {sid for _, sid in sids}
    later = codebook.assign(Letters().embed([item.title for item in items(60)]), taken)
    assert not taken & set(later)


def test_an_empty_catalogue_is_an_error_with_a_remedy():
    with pytest.raises(SidstreamError, match="the catalogue is empty"):
        fit_codebook([], Letters(), CodebookSettings())
