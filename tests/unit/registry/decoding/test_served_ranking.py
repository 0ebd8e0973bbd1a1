"""What serving ranks from an exported bundle is what the trainer ranked when it judged the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from registry.bundles.embedder import title_vectors
from registry.decoding.beam import DenseHead, beam_search
from registry.decoding.item_vectors import ItemVectors
from registry.decoding.onnx_generator import OnnxGenerator
from registry.decoding.sid_index import SidIndex
from streams.errors import SidstreamError
from tests.tiny_shop import ITEMS, SIZES, Shop
from trainer.generator.export import export_generator
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.ranking import CatalogueRanker

HISTORIES = [[3, 4, 5], [7], [2, 9, 2, 2, 11, 0, 5, 1], []]
EXACT = 1000


@pytest.fixture(scope="module")
def model(tiny_shop: Shop) -> GeneratorForCausalLM:
    return tiny_shop.outspoken(seed=5)


@pytest.fixture(scope="module")
def served(
    tiny_shop: Shop, model: GeneratorForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> OnnxGenerator:
    folder = tmp_path_factory.mktemp("bundle")
    export_generator(model, folder)
    return OnnxGenerator(folder, SIZES, 8)


@pytest.fixture(scope="module")
def index(tiny_shop: Shop) -> SidIndex:
    return SidIndex.build(np.array(tiny_shop.catalogue.sids), tiny_shop.catalogue.item_ids)


@pytest.mark.parametrize("weight", [0.2, 0.7, 1.0])
def test_serving_and_trainer_agree_on_every_place(
    tiny_shop: Shop, model: GeneratorForCausalLM, served: OnnxGenerator, index: SidIndex, weight: float
) -> None:
    assert served.items is not None
    candidates = CatalogueRanker(model, tiny_shop.catalogue.codes, tiny_shop.sids, ITEMS).candidates(
        [np.array(h, int) for h in HISTORIES]
    )
    order = candidates.order(weight)
    prompts = [[tiny_shop.catalogue.sids[item] for item in history] for history in HISTORIES]
    rankings = beam_search(
        served, index, prompts, [[]] * 4, [ITEMS] * 4, 5, DenseHead(served.items, EXACT), weight
    )
    for row, ranking in enumerate(rankings):
        expected = [f"i{item:02}" for item in order[row].tolist() if item >= 0]
        assert [index.item(leaf) for leaf in ranking.leaves.tolist()] == expected
        assert np.all(np.diff(ranking.scores) <= 0)


def test_the_dense_heads_best_item_is_answered_though_no_beam_reaches_it(
    model: GeneratorForCausalLM, served: OnnxGenerator, index: SidIndex
) -> None:
    assert served.items is not None
    (dense,) = beam_search(served, index, [[]], [[]], [1], 1, DenseHead(served.items, EXACT), 1.0)
    state = served.encode([[]])
    logits = (served.items.project_queries(state) @ served.items.item_matrix(index).T)[0]
    assert dense.leaves[0] == logits.argmax()
    (beam_only,) = beam_search(served, index, [[]], [[]], [1], 1)
    assert beam_only.leaves[0] != dense.leaves[0]


def test_what_is_left_out_or_inactive_is_never_ranked(served: OnnxGenerator, index: SidIndex) -> None:
    assert served.items is not None
    active = np.ones(ITEMS, dtype=bool)
    active[[0, 9]] = False
    fewer = index.with_active(active)
    inactive = {fewer.leaf_of("i00"), fewer.leaf_of("i09")}
    for exact in (EXACT, 0):
        (ranking,) = beam_search(
            served, fewer, [[]], [[3, 4]], [ITEMS], 30, DenseHead(served.items, exact), 0.5
        )
        assert len(ranking.leaves) == ITEMS - 2 - len({3, 4} - inactive)
        assert not set(ranking.leaves.tolist()) & (inactive | {3, 4})
        assert np.isfinite(ranking.scores).all()


def test_a_large_catalogue_is_ordered_among_the_beams_items(
    tiny_shop: Shop, model: GeneratorForCausalLM, served: OnnxGenerator, index: SidIndex
) -> None:
    assert served.items is not None
    prompts = [[tiny_shop.catalogue.sids[item] for item in history] for history in HISTORIES]
    exact = beam_search(
        served, index, prompts, [[]] * 4, [ITEMS] * 4, ITEMS, DenseHead(served.items, EXACT), 0.4
    )
    beams = beam_search(served, index, prompts, [[]] * 4, [ITEMS] * 4, ITEMS, DenseHead(served.items, 0), 0.4)
    # Every item is in the beam here, so both know all candidates.
    for ranking, other in zip(exact, beams, strict=True):
        assert ranking.leaves.tolist() == other.leaves.tolist()


def test_a_new_item_is_scored_by_its_codes(served: OnnxGenerator, tiny_shop: Shop) -> None:
    assert served.items is not None
    new = (3, 2, 4)
    assert new not in tiny_shop.catalogue.sids
    assert not served.items.own_vectors(np.array([new])).any()
    index = SidIndex.build(np.array([*tiny_shop.catalogue.sids, new]), [*tiny_shop.catalogue.item_ids, "new"])
    (ranking,) = beam_search(
        served,
        index,
        [[tiny_shop.catalogue.sids[0]]],
        [[]],
        [ITEMS + 1],
        30,
        DenseHead(served.items, EXACT),
        1.0,
    )
    assert index.leaf_of("new") in ranking.leaves.tolist()


def test_a_new_item_is_met_by_its_title_as_the_trainer_would_know_it(tiny_shop: Shop, tmp_path: Path) -> None:
    new, title = (3, 2, 4), "A New Red Lantern"
    model = tiny_shop.model(seed=6, text_size=256)
    known = torch.from_numpy(tiny_shop.catalogue.codes)
    model.set_items(known, torch.from_numpy(title_vectors(tiny_shop.catalogue.titles)))
    export_generator(model, tmp_path)
    items = ItemVectors(tmp_path, SIZES)
    index = SidIndex.build(np.array([*tiny_shop.catalogue.sids, new]), [*tiny_shop.catalogue.item_ids, "new"])
    leaf = index.leaf_of("new")
    codes = torch.tensor([tiny_shop.prompt.tokens(new)])
    with torch.no_grad():
        without_title = model.model.embed_items(codes)[0].numpy()
        model.set_items(
            torch.cat((known, codes)), torch.from_numpy(title_vectors([*tiny_shop.catalogue.titles, title]))
        )
        with_title = model.model.embed_items(codes)[0].numpy()
    # While its title is not there, it is its codes; another item's coming is the next chance.
    items.add_new_items(index, lambda _: "")
    np.testing.assert_allclose(items.item_matrix(index)[leaf], without_title, atol=1e-5)
    later = SidIndex.build(index.sids[index.row_leaf], index.item_ids)
    items.add_new_items(later, {"new": title}.get)
    np.testing.assert_allclose(items.item_matrix(later)[later.leaf_of("new")], with_title, atol=1e-5)
    np.testing.assert_allclose(items.own_vectors(np.array(new)), with_title - without_title, atol=1e-5)


def test_a_file_of_another_codebook_is_named(model: GeneratorForCausalLM, tmp_path: Path) -> None:
    export_generator(model, tmp_path)
    with pytest.raises(SidstreamError, match=r"items\.safetensors"):
        ItemVectors(tmp_path, (4, 3, 9))
    (tmp_path / "items.safetensors").write_bytes(b"no")
    with pytest.raises(SidstreamError, match=r"items\.safetensors"):
        ItemVectors(tmp_path, SIZES)


def test_items_of_an_earlier_generator_are_refused_by_name(tiny_shop: Shop, tmp_path: Path) -> None:
    export_generator(tiny_shop.outspoken(), tmp_path)
    path = tmp_path / "items.safetensors"
    tensors = load_file(path)
    # What is added to the past was a number a distance.
    save_file(tensors | {"again": np.zeros(8, dtype=np.float32)}, path)
    with pytest.raises(SidstreamError, match=r"items\.safetensors is not .* earlier generator; export"):
        ItemVectors(tmp_path, SIZES)
