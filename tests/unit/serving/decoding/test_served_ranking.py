"""What serving ranks from an exported bundle is what the trainer ranked when it judged the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from registry.bundles.embedder import title_vectors
from serving.decoding.beam import Dense, search
from serving.decoding.index import SidIndex
from serving.decoding.items import Items
from serving.decoding.onnx_generator import OnnxGenerator
from streams.errors import SidstreamError
from tests.tiny_shop import ITEMS, SIZES, Shop, shop
from trainer.generator.export import export_generator
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline.ranking import CatalogueRanker

HISTORIES = [[3, 4, 5], [7], [2, 9, 2, 2, 11, 0, 5, 1], []]
EXACT = 1000


@pytest.fixture(scope="module")
def made() -> Shop:
    return shop()


@pytest.fixture(scope="module")
def model(made: Shop) -> GeneratorForCausalLM:
    return made.outspoken(seed=5)


@pytest.fixture(scope="module")
def served(
    made: Shop, model: GeneratorForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> OnnxGenerator:
    folder = tmp_path_factory.mktemp("bundle")
    export_generator(model, folder)
    return OnnxGenerator(folder, SIZES, 8)


@pytest.fixture(scope="module")
def index(made: Shop) -> SidIndex:
    return SidIndex.build(np.array(made.catalogue.sids), made.catalogue.item_ids)


@pytest.mark.parametrize("weight", [0.2, 0.7, 1.0])
def test_serving_and_trainer_agree_on_every_place(
    made: Shop, model: GeneratorForCausalLM, served: OnnxGenerator, index: SidIndex, weight: float
) -> None:
    assert served.items is not None
    found = CatalogueRanker(model, made.catalogue.codes, made.sids, ITEMS).candidates(
        [np.array(h, int) for h in HISTORIES]
    )
    order = found.order(weight)
    prompts = [[made.catalogue.sids[item] for item in history] for history in HISTORIES]
    rankings = search(served, index, prompts, [[]] * 4, [ITEMS] * 4, 5, Dense(served.items, weight, EXACT))
    for row, ranking in enumerate(rankings):
        wanted = [f"i{item:02}" for item in order[row].tolist() if item >= 0]
        assert [index.item(leaf) for leaf in ranking.leaves.tolist()] == wanted
        assert np.all(np.diff(ranking.scores) <= 0)


def test_the_dense_heads_best_item_is_answered_though_no_beam_reaches_it(
    model: GeneratorForCausalLM, served: OnnxGenerator, index: SidIndex
) -> None:
    assert served.items is not None
    (dense,) = search(served, index, [[]], [[]], [1], 1, Dense(served.items, 1.0, EXACT))
    state = served.encode([[]])
    logits = (served.items.queries(state) @ served.items.matrix(index).T)[0]
    assert dense.leaves[0] == logits.argmax()
    (spelled,) = search(served, index, [[]], [[]], [1], 1)
    assert spelled.leaves[0] != dense.leaves[0]


def test_what_is_left_out_or_inactive_is_never_ranked(served: OnnxGenerator, index: SidIndex) -> None:
    assert served.items is not None
    active = np.ones(ITEMS, dtype=bool)
    active[[0, 9]] = False
    fewer = index.with_active(active)
    gone = {fewer.leaf_of("i00"), fewer.leaf_of("i09")}
    for exact in (EXACT, 0):
        (ranking,) = search(served, fewer, [[]], [[3, 4]], [ITEMS], 30, Dense(served.items, 0.5, exact))
        assert len(ranking.leaves) == ITEMS - 2 - len({3, 4} - gone)
        assert not set(ranking.leaves.tolist()) & (gone | {3, 4})
        assert np.isfinite(ranking.scores).all()


def test_a_large_catalogue_is_ordered_among_the_beams_items(
    made: Shop, model: GeneratorForCausalLM, served: OnnxGenerator, index: SidIndex
) -> None:
    assert served.items is not None
    prompts = [[made.catalogue.sids[item] for item in history] for history in HISTORIES]
    exact = search(served, index, prompts, [[]] * 4, [ITEMS] * 4, ITEMS, Dense(served.items, 0.4, EXACT))
    beams = search(served, index, prompts, [[]] * 4, [ITEMS] * 4, ITEMS, Dense(served.items, 0.4, 0))
    # Every item is in the beam here, so both know all candidates.
    for one, other in zip(exact, beams, strict=True):
        assert one.leaves.tolist() == other.leaves.tolist()


def test_a_new_item_is_scored_by_its_codes(served: OnnxGenerator, made: Shop) -> None:
    assert served.items is not None
    new = (3, 2, 4)
    assert new not in made.catalogue.sids
    assert not served.items.extras(np.array([new])).any()
    index = SidIndex.build(np.array([*made.catalogue.sids, new]), [*made.catalogue.item_ids, "new"])
    (ranking,) = search(
        served, index, [[made.catalogue.sids[0]]], [[]], [ITEMS + 1], 30, Dense(served.items, 1.0, EXACT)
    )
    assert index.leaf_of("new") in ranking.leaves.tolist()


def test_a_new_item_is_met_by_its_title_as_the_trainer_would_know_it(made: Shop, tmp_path: Path) -> None:
    new, title = (3, 2, 4), "A New Red Lantern"
    model = made.model(seed=6, text_size=256)
    known = torch.from_numpy(made.catalogue.codes)
    model.set_items(known, torch.from_numpy(title_vectors(made.catalogue.titles)))
    export_generator(model, tmp_path)
    items = Items(tmp_path, SIZES)
    index = SidIndex.build(np.array([*made.catalogue.sids, new]), [*made.catalogue.item_ids, "new"])
    leaf = index.leaf_of("new")
    codes = torch.tensor([made.prompt.tokens(new)])
    with torch.no_grad():
        alone = model.model.embed_items(codes)[0].numpy()
        model.set_items(
            torch.cat((known, codes)), torch.from_numpy(title_vectors([*made.catalogue.titles, title]))
        )
        told = model.model.embed_items(codes)[0].numpy()
    # While its title is not there, it is its codes; another item's coming is the next chance.
    items.meet(index, lambda _: "")
    np.testing.assert_allclose(items.matrix(index)[leaf], alone, atol=1e-5)
    later = SidIndex.build(index.sids[index.row_leaf], index.item_ids)
    items.meet(later, {"new": title}.get)
    np.testing.assert_allclose(items.matrix(later)[later.leaf_of("new")], told, atol=1e-5)
    np.testing.assert_allclose(items.extras(np.array(new)), told - alone, atol=1e-5)


def test_a_file_of_another_codebook_is_named(model: GeneratorForCausalLM, tmp_path: Path) -> None:
    export_generator(model, tmp_path)
    with pytest.raises(SidstreamError, match=r"items\.safetensors"):
        Items(tmp_path, (4, 3, 9))
    (tmp_path / "items.safetensors").write_bytes(b"no")
    with pytest.raises(SidstreamError, match=r"items\.safetensors"):
        Items(tmp_path, SIZES)


def test_items_of_an_earlier_generator_are_refused_by_name(made: Shop, tmp_path: Path) -> None:
    export_generator(made.outspoken(), tmp_path)
    path = tmp_path / "items.safetensors"
    tensors = load_file(path)
    # What is added to the past was a number a distance.
    save_file(tensors | {"again": np.zeros(8, dtype=np.float32)}, path)
    with pytest.raises(SidstreamError, match=r"items\.safetensors is not .* earlier generator; export"):
        Items(tmp_path, SIZES)
