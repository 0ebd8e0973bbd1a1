import json
from itertools import islice, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from registry.bundles.codebook import Codebook, unit
from streams.errors import SidstreamError


def with_encoder(seed=0, collaborative=0):
    """8 dimensions -> 7 -> 6, and centroids that are not scaled."""
    random = np.random.default_rng(seed)
    layers = tuple(
        (random.normal(size=(a, b)).astype(np.float32), random.normal(size=b).astype(np.float32))
        for a, b in ((8, 7), (7, 6))
    )
    return Codebook("test", codebook_of().centroids, layers, scaled=False, collaborative_dims=collaborative)


def codebook_of(sizes=(4, 3, 5), dim=6, seed=0):
    random = np.random.default_rng(seed)
    return Codebook("test", tuple(random.normal(size=(size, dim)).astype(np.float32) for size in sizes))


def rows(count, dim=6, seed=1):
    return unit(np.random.default_rng(seed).normal(size=(count, dim))).astype(np.float32)


def test_every_slot_is_a_candidate_exactly_once_and_the_greedy_one_is_first():
    codebook = codebook_of()
    vector = rows(1)[0]
    every = list(codebook.candidates(vector))
    assert sorted(every) == sorted(product(range(4), range(3), range(5)))
    assert every[0] == tuple(codebook.quantise(vector[None])[0][0].tolist())


def test_candidates_fill_a_prefix_by_distance_before_the_next_nearest_prefix():
    codebook = codebook_of()
    vector = rows(1)[0].astype(np.float64)
    every = list(codebook.candidates(vector))
    prefixes = [sid[:2] for sid in every]
    # Each prefix is one unbroken stretch, and its second codes come in order of distance.
    assert [prefixes[n] for n in range(0, 60, 5)] == list(dict.fromkeys(prefixes))
    first = every[0][0]
    assert {sid[0] for sid in every[:15]} == {first}
    residual = unit(vector - codebook.centroids[0][first].astype(np.float64))
    seconds = [every[n][1] for n in (0, 5, 10)]
    assert seconds == np.argsort(((codebook.centroids[1] - residual) ** 2).sum(1)).tolist()
    residual = unit(residual - codebook.centroids[1][seconds[0]].astype(np.float64))
    lasts = [sid[2] for sid in every[:5]]
    assert lasts == np.argsort(((codebook.centroids[2] - residual) ** 2).sum(1)).tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 40), st.integers(0, 5))
def test_assign_gives_each_vector_its_first_free_candidate(count, reserved, seed):
    codebook = codebook_of()
    # Few distinct vectors: prefixes overflow, so that the spill is exercised too.
    vectors = rows(3, seed=seed)[np.random.default_rng(seed).integers(3, size=count)]
    taken = set(islice(product(range(4), range(3), range(5)), min(reserved, 60 - count)))
    before = set(taken)
    given_sids = codebook.assign(vectors, taken)
    assert taken == before
    for vector, sid in zip(vectors, given_sids, strict=True):
        assert sid == next(slot for slot in codebook.candidates(vector) if slot not in before)
        before.add(sid)
    assert len(set(given_sids)) == count


def test_a_full_codebook_says_so():
    with pytest.raises(SidstreamError, match="all 60 SIDs"):
        codebook_of().assign(rows(61))


def test_a_new_item_gets_the_same_sid_alone_and_in_a_batch():
    codebook = codebook_of((16, 16, 8), 32)
    vectors = rows(400, 32)
    codes, _ = codebook.quantise(vectors)
    for vector, row in zip(vectors, codes.tolist(), strict=True):
        assert next(codebook.candidates(vector)) == tuple(row)


def test_the_id_follows_the_content(tmp_path):
    codebook = codebook_of()
    assert codebook.id == codebook_of().id
    assert codebook.id != codebook_of(seed=1).id
    assert codebook.id != Codebook("other", codebook.centroids).id
    nudged = [level.copy() for level in codebook.centroids]
    nudged[2][4, 5] = np.nextafter(nudged[2][4, 5], np.float32(9))
    assert codebook.id != Codebook("test", tuple(nudged)).id


def test_saving_is_repeatable_and_loading_gives_the_same_codebook(tmp_path):
    codebook = codebook_of()
    codebook.save(tmp_path / "a")
    codebook.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = Codebook.load(tmp_path / "a")
    assert loaded.id == codebook.id
    assert list(loaded.candidates(rows(1)[0])) == list(codebook.candidates(rows(1)[0]))


def test_a_changed_file_is_refused(tmp_path):
    codebook_of().save(tmp_path / "a")
    with safe_open(str(tmp_path / "a"), framework="numpy") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in ("level_0", "level_1", "level_2")}
    tensors["level_1"][0, 0] += 1
    save_file(tensors, str(tmp_path / "b"), metadata=about)
    with pytest.raises(SidstreamError, match="was changed"):
        Codebook.load(tmp_path / "b")
    (tmp_path / "c").write_bytes(b"no safetensors at all")
    with pytest.raises(SidstreamError, match="is no codebook"):
        Codebook.load(tmp_path / "c")
    with pytest.raises(SidstreamError, match="is no codebook"):
        Codebook.load(tmp_path / "absent")


def test_an_encoder_is_a_chain_of_products_with_relu_between_them():
    codebook, vectors = with_encoder(), rows(20, 8)
    (first, b1), (second, b2) = codebook.encoder
    latent = np.maximum(vectors @ first + b1, 0) @ second + b2
    assert codebook.dim == 8
    assert np.allclose(codebook.encode(vectors), latent, atol=1e-5)
    plain = Codebook("test", codebook.centroids, scaled=False)
    assert codebook.assign(vectors) == plain.assign(latent)


def test_a_residual_that_is_not_scaled_keeps_its_length():
    levels = (np.array([[1, 0]], np.float32), np.array([[0.1, 0], [1, 0]], np.float32))
    vector = np.array([[1.2, 0]])
    assert Codebook("test", levels, scaled=False).quantise(vector)[0].tolist() == [[0, 0]]
    assert Codebook("test", levels).quantise(vector)[0].tolist() == [[0, 1]]


def test_the_text_alone_stands_for_an_item_that_nobody_touched():
    codebook = with_encoder(collaborative=3)
    texts = rows(10, 5)
    padded = np.pad(texts, ((0, 0), (0, 3)))
    assert codebook.assign(texts) == codebook.assign(padded)
    assert list(codebook.candidates(texts[0])) == list(codebook.candidates(padded[0]))
    with pytest.raises(SidstreamError, match="8 dimensions"):
        with_encoder().assign(texts)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.booleans(), st.integers(0, 5), st.data())
def test_items_that_are_replayed_get_the_sids_that_they_got_before(count, encoded, seed, data):
    codebook = with_encoder(seed) if encoded else codebook_of(seed=seed)
    vectors = rows(3, codebook.dim, seed)[np.random.default_rng(seed).integers(3, size=count)]
    cut = data.draw(st.integers(0, count))
    first = codebook.assign(vectors[:cut])
    assert first + codebook.assign(vectors[cut:], set(first)) == codebook.assign(vectors)


def test_what_is_new_in_a_codebook_survives_its_file_and_counts_in_its_id(tmp_path):
    codebook = with_encoder(collaborative=2)
    codebook.save(tmp_path / "a")
    loaded = Codebook.load(tmp_path / "a")
    assert (loaded.id, loaded.scaled, loaded.collaborative_dims) == (codebook.id, False, 2)
    assert loaded.assign(rows(9, 8)) == codebook.assign(rows(9, 8))
    changed = [
        Codebook("test", codebook.centroids, codebook.encoder, True, 2),
        Codebook("test", codebook.centroids, codebook.encoder, False, 0),
        Codebook("test", codebook.centroids, with_encoder(1).encoder, False, 2),
        Codebook("test", codebook.centroids),
    ]
    assert len({codebook.id, *(other.id for other in changed)}) == 5


def test_a_file_of_the_first_format_is_read_and_written_as_ever(tmp_path):
    codebook = Codebook("test", tuple(np.arange(6, dtype=np.float32).reshape(3, 2) for _ in range(2)))
    assert codebook.id == "750394ba59e15faa"
    codebook.save(tmp_path / "a")
    with safe_open(str(tmp_path / "a"), framework="numpy") as file:
        assert json.loads(file.metadata()["codebook"]) == {"format": 1, "id": codebook.id, "embedder": "test"}
        assert sorted(file.keys()) == ["level_0", "level_1"]


def test_a_newer_format_says_that_an_update_is_needed(tmp_path):
    codebook_of().save(tmp_path / "a")
    with safe_open(str(tmp_path / "a"), framework="numpy") as file:
        about = json.loads(file.metadata()["codebook"]) | {"format": 3}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, str(tmp_path / "b"), metadata={"codebook": json.dumps(about)})
    with pytest.raises(SidstreamError, match="update sidstream"):
        Codebook.load(tmp_path / "b")


def test_an_encoder_that_does_not_lead_to_the_centroids_is_refused():
    (first, bias), second = with_encoder().encoder
    for layers in (((first, bias),), ((first, bias[:3]), second), ((first * np.nan, bias), second)):
        with pytest.raises(SidstreamError):
            Codebook("test", codebook_of().centroids, tuple(layers))
    with pytest.raises(SidstreamError, match="collaborative"):
        Codebook("test", codebook_of().centroids, collaborative_dims=6)


@pytest.mark.parametrize(
    "levels",
    [
        (),
        (np.zeros((2, 3), np.float64),),
        (np.full((2, 3), np.nan, np.float32),),
        (np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32)),
    ],
)
def test_centroids_that_make_no_codebook_are_refused(levels):
    with pytest.raises(SidstreamError):
        Codebook("test", levels)
