"""A bundle whose files do not answer as the model is refused: items, order, scores, newcomers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from registry.bundles.embedder import title_vectors
from registry.bundles.ranking import Ranking
from registry.decoding.beam import RankedLeaves
from streams.errors import SidstreamError
from tests.tiny_shop import ITEMS, Shop, shop
from trainer.generator.export import check_parity, export_generator
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.bundle_parity import SCORE_TOLERANCE, check_served_lists, list_difference
from trainer.sequences.held_out import HeldOut

RANKING = Ranking(dense_weight=0.7, repeats="never")


@pytest.fixture(scope="module")
def tiny() -> Shop:
    return shop()


@pytest.fixture(scope="module")
def model(tiny: Shop) -> GeneratorForCausalLM:
    """A generator that reads texts, and to which every part of the dense head matters."""
    model = tiny.model(seed=5, text_size=256)
    model.set_items(
        torch.from_numpy(tiny.catalogue.codes), torch.from_numpy(title_vectors(tiny.catalogue.titles))
    )
    with torch.no_grad():
        model.model.items.own.normal_(0, 0.5)
        model.model.items.query_proj.weight.normal_(0, 0.3)
        model.model.items.repeat_vectors.normal_(0, 1)
    return model


@pytest.fixture(scope="module")
def exported(model: GeneratorForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_generator(model, folder)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    rng = np.random.default_rng(0)
    histories = [rng.integers(ITEMS, size=rng.integers(1, 12)) for _ in range(250)]
    ages = [np.arange(len(row))[::-1] * 1000 for row in histories]
    return HeldOut(histories, rng.integers(ITEMS, size=250), ages, [row % 2 == 0 for row in histories])


def test_an_exported_model_answers_as_in_torch(
    tiny: Shop, model: GeneratorForCausalLM, folder: Path, held_out: HeldOut
) -> None:
    for ranking in (RANKING, Ranking(), Ranking(dense_weight=1.0)):
        difference = check_served_lists(model, folder, held_out, tiny.catalogue, tiny.prompt, ranking)
        assert 0 < difference < SCORE_TOLERANCE


@pytest.mark.parametrize("array", ["again", "query", "text", "extras", "codes"])
def test_a_damaged_array_of_the_dense_head_is_refused(
    tiny: Shop, model: GeneratorForCausalLM, folder: Path, held_out: HeldOut, array: str
) -> None:
    path = folder / "items.safetensors"
    tensors = load_file(path)
    save_file(tensors | {array: tensors[array] * np.float32(1.05)}, path)
    # The graphs know nothing of it.
    check_parity(model, folder)
    with pytest.raises(SidstreamError, match="the model was not registered"):
        check_served_lists(model, folder, held_out, tiny.catalogue, tiny.prompt, RANKING)


def test_items_that_changed_places_are_refused(
    tiny: Shop, model: GeneratorForCausalLM, folder: Path, held_out: HeldOut
) -> None:
    path = folder / "items.safetensors"
    tensors = load_file(path)
    swapped = tensors["extras"][[1, 0, *range(2, ITEMS)]]
    save_file(tensors | {"extras": swapped}, path)
    with pytest.raises(SidstreamError, match="another vector than the model for 2 of"):
        check_served_lists(model, folder, held_out, tiny.catalogue, tiny.prompt, RANKING)


def test_a_bundle_of_other_weights_is_refused(
    tiny: Shop, folder: Path, held_out: HeldOut, model: GeneratorForCausalLM
) -> None:
    other = tiny.model(seed=6)
    with pytest.raises(SidstreamError, match="the model was not registered"):
        check_served_lists(other, folder, held_out, tiny.catalogue, tiny.prompt, Ranking())


def test_lists_may_differ_among_ties_alone() -> None:
    def ranked(*pairs: tuple[int, float]) -> RankedLeaves:
        leaves, scores = zip(*pairs, strict=True)
        return RankedLeaves(np.array(leaves), np.array(scores, dtype=np.float32), ())

    tie = SCORE_TOLERANCE / 2
    base = ranked((1, -1.0), (2, -2.0), (3, -2.0 - tie), (4, -3.0))
    for same in (
        base,
        ranked((1, -1.0), (3, -2.0), (2, -2.0 - tie), (4, -3.0)),
        ranked((1, -1.0), (2, -2.0), (3, -2.0 - tie), (9, -3.0)),
    ):
        assert list_difference(base, same) <= SCORE_TOLERANCE
    for other in (
        ranked((2, -1.0), (1, -2.0), (3, -2.0 - tie), (4, -3.0)),
        ranked((1, -1.0), (2, -2.0), (9, -2.0 - tie), (4, -3.0)),
        ranked((1, -1.0), (2, -2.1), (3, -2.1 - tie), (4, -3.0)),
        ranked((1, -1.0), (2, -2.0), (3, -2.0 - tie)),
        ranked((1, -1.0), (2, -2.0), (3, -2.0 - tie), (4, float("nan"))),
    ):
        assert not list_difference(base, other) <= SCORE_TOLERANCE
