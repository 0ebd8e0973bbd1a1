from itertools import islice, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from registry.codebook import Codebook, unit
from streams.errors import SidstreamError


def made(sizes=(4, 3, 5), dim=6, seed=0):
    random = np.random.default_rng(seed)
    return Codebook("test", tuple(random.normal(size=(size, dim)).astype(np.float32) for size in sizes))


def rows(count, dim=6, seed=1):
    return unit(np.random.default_rng(seed).normal(size=(count, dim))).astype(np.float32)


def test_every_slot_is_a_candidate_exactly_once_and_the_greedy_one_is_first():
    codebook = made()
    vector = rows(1)[0]
    every = list(codebook.candidates(vector))
    assert sorted(every) == sorted(product(range(4), range(3), range(5)))
    assert every[0] == tuple(codebook.quantise(vector[None])[0][0].tolist())


def test_candidates_fill_a_prefix_by_distance_before_the_next_nearest_prefix():
    codebook = made()
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
    codebook = made()
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
        made().assign(rows(61))


def test_a_new_item_gets_the_same_sid_alone_and_in_a_batch():
    codebook = made((16, 16, 8), 32)
    vectors = rows(400, 32)
    codes, _ = codebook.quantise(vectors)
    for vector, row in zip(vectors, codes.tolist(), strict=True):
        assert next(codebook.candidates(vector)) == tuple(row)


def test_the_id_follows_the_content(tmp_path):
    codebook = made()
    assert codebook.id == made().id
    assert codebook.id != made(seed=1).id
    assert codebook.id != Codebook("other", codebook.centroids).id
    nudged = [level.copy() for level in codebook.centroids]
    nudged[2][4, 5] = np.nextafter(nudged[2][4, 5], np.float32(9))
    assert codebook.id != Codebook("test", tuple(nudged)).id


def test_saving_is_repeatable_and_loading_gives_the_same_codebook(tmp_path):
    codebook = made()
    codebook.save(tmp_path / "a")
    codebook.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    back = Codebook.load(tmp_path / "a")
    assert back.id == codebook.id
    assert list(back.candidates(rows(1)[0])) == list(codebook.candidates(rows(1)[0]))


def test_a_changed_file_is_refused(tmp_path):
    made().save(tmp_path / "a")
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
