"""A bundle answers what its model answers: whole lists of held-out users, and every item's vector.

The files of a bundle are read by the code of serving (ONNX Runtime and numpy), the model by torch, and one
search ranks both (trainer.offline_checks.served_lists). Items that came after the training are in the index,
too, with titles of items that are there: serving makes their vectors from the titles.

`trainer.generator.export.check_parity` compares the graphs alone, on random histories of every length.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from registry.bundles.embedder import title_vectors
from registry.bundles.prompt import Prompt, Sid
from registry.bundles.ranking import Ranking, RepeatRule
from registry.decoding.beam import RankedLeaves
from registry.decoding.onnx_generator import OnnxGenerator
from registry.decoding.sid_index import SidIndex
from streams.errors import SidstreamError
from trainer.generator.export import TOLERANCE
from trainer.generator.model import GeneratorForCausalLM
from trainer.generator.torch_generator import TorchGenerator
from trainer.offline_checks.served_lists import LIST_LENGTH, HeldOutRequests, ServedLists
from trainer.sequences.held_out import HeldOut
from trainer.sequences.interactions import TrainingCatalogue

PARITY_USERS = 200
# A score is a sum of some log-probabilities, each of which differs by some 1e-5 between the two; a thousandth
# of a nat is a thousandth of a probability, and reorders no two items that a user could tell apart.
SCORE_TOLERANCE = 1e-3
# Newcomers in the index of the comparison.
_NEWCOMERS = 20
# Beside the bundle's own weight: neither head goes unlooked-at.
_BOTH_HEADS = 0.5


def check_served_lists(
    model: GeneratorForCausalLM, folder: Path, held_out: HeldOut, catalogue: TrainingCatalogue,
    prompt: Prompt, ranking: Ranking,
) -> float:  # fmt: skip
    """The largest difference of a score between a model and its exported files, in the lists of the first
    200 held-out users, under the bundle's ranking and with all items of the past.

    Items and their order must be the same but among scores that tie within SCORE_TOLERANCE. Raises
    SidstreamError where a list, a score or an item's vector is another.
    """
    sids, titles = _newcomers(catalogue, prompt)
    index = SidIndex.build(
        np.array([*catalogue.sids, *sids], dtype=np.int64).reshape(-1, len(prompt.sizes)),
        [*catalogue.item_ids, *titles],
        None if catalogue.active is None else np.append(catalogue.active, np.ones(len(sids), dtype=np.bool_)),
    )
    trained = TorchGenerator(_with_newcomers(model, catalogue, prompt, sids, list(titles.values())))
    bundle = OnnxGenerator(folder, prompt.sizes, prompt.max_items)
    events = held_out.take(np.arange(min(PARITY_USERS, len(held_out.targets))))
    largest = 0.0
    if bundle.items is not None and trained.items is not None:
        bundle.items.add_new_items(index, lambda item: titles.get(item, ""))
        largest = _vector_difference(trained.item_matrix(index), bundle.items.item_matrix(index), index)
    expected, actual = (
        ServedLists(scorer, events, catalogue, prompt.max_items, index) for scorer in (trained, bundle)
    )
    requests = expected.requests([ranking, RepeatRule()])
    weights = (ranking.dense_weight, _BOTH_HEADS if trained.items is not None else 0.0)
    numbers, beam_width = np.arange(len(requests.user)), catalogue.limits.beam
    if not len(numbers):
        return largest
    # Two prefixes may tie at the border of the beam; they do not at that of a beam twice as wide.
    for beam in (beam_width, 2 * beam_width):
        part = requests.take(numbers)
        pairs = zip(*(_answers(lists, part, weights, beam) for lists in (expected, actual)), strict=True)
        differences = np.max(
            [[list_difference(*pair) for pair in zip(*lists, strict=True)] for lists in pairs], axis=0
        )
        # A NaN compares false: written so that it fails too.
        agree = differences <= SCORE_TOLERANCE
        largest = max(largest, float(differences[agree].max(initial=0.0)))
        if agree.all():
            return largest
        numbers = numbers[~agree]
    raise SidstreamError(
        f"the exported bundle does not answer as its model: {len(numbers)} of {len(requests.user)} lists of "
        f"held-out users have other items, another order or other scores (at most {SCORE_TOLERANCE} is "
        "accepted); the model was not registered; train it again, and report the versions of torch and "
        "onnxruntime"
    )


def _newcomers(catalogue: TrainingCatalogue, prompt: Prompt) -> tuple[list[Sid], dict[str, str]]:
    """Free SIDs beside those of items evenly spread over the catalogue, and a title by new item id."""
    taken, sids, titles = set(catalogue.sids), [], {}
    rows = np.unique(np.linspace(0, len(catalogue.sids) - 1, _NEWCOMERS).astype(np.int64)).tolist()
    for row in rows:
        prefix = catalogue.sids[row][:-1]
        free = next((code for code in range(prompt.sizes[-1]) if (*prefix, code) not in taken), None)
        if free is not None:
            taken.add((*prefix, free))
            sids.append((*prefix, free))
            # No item of a shop has a name with a line break.
            titles[f"\n{row}"] = catalogue.titles[row]
    return sids, titles


def _with_newcomers(
    model: GeneratorForCausalLM, catalogue: TrainingCatalogue, prompt: Prompt, sids: list[Sid],
    titles: list[str],
) -> GeneratorForCausalLM:  # fmt: skip
    """A copy of the model in float32 on the CPU, whose item table has the new items by their texts."""
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    items = model.model.items
    if not sids or not len(items.keys):
        return model
    new_codes = torch.tensor([prompt.tokens(sid) for sid in sids], dtype=torch.long)
    text = None
    if items.text_proj is not None:
        # Serving gives an item without a title no text, and so does the item table with zeros.
        vectors = torch.from_numpy(title_vectors(titles))
        vectors[[not title for title in titles]] = 0
        text = torch.cat((items.text, vectors.float()))
    model.set_items(torch.cat((items.codes, new_codes)), text)
    return model


def _vector_difference(
    trained: npt.NDArray[np.float32], bundle: npt.NDArray[np.float32], index: SidIndex
) -> float:
    """The largest difference of items' vectors (N, D). Raises SidstreamError where one is another."""
    difference = np.abs(trained - bundle).max(axis=1)
    wrong = np.flatnonzero(~(difference <= TOLERANCE))
    if len(wrong):
        raise SidstreamError(
            f"items.safetensors has another vector than the model for {len(wrong)} of {len(index)} items, "
            f"the first with the SID {index.sid(int(wrong[0]))}; the model was not registered; train it again"
        )
    return float(difference.max(initial=0.0))


def _answers(
    lists: ServedLists, requests: HeldOutRequests, weights: tuple[float, ...], beam: int
) -> list[list[RankedLeaves]]:
    """The lists of the requests under each of the weights."""
    parts = lists.candidates(requests, replace(lists.catalogue.limits, beam=beam))
    return [
        [
            ranked
            for part in parts
            for ranked in part.ranked(weight, [LIST_LENGTH] * part.invalid_mass.shape[1])
        ]
        for weight in weights
    ]


def list_difference(expected: RankedLeaves, actual: RankedLeaves) -> float:
    """The largest difference of two lists' scores, place by place; infinity where the items are others.

    Items may change places, or be cut off at the end, among scores within SCORE_TOLERANCE.
    """
    if len(expected.leaves) != len(actual.leaves):
        return np.inf
    if not len(expected.leaves):
        return 0.0
    both = np.isfinite(expected.scores) & np.isfinite(actual.scores)
    same_infinite = (expected.scores == actual.scores) | both
    if not same_infinite.all():
        return np.inf
    difference = float(np.abs(expected.scores - actual.scores, where=both, out=np.zeros(len(both))).max())
    score_of: dict[int, float] = dict(zip(actual.leaves.tolist(), actual.scores.tolist(), strict=True))
    last = float(actual.scores[-1])
    for leaf, score in zip(expected.leaves.tolist(), expected.scores.tolist(), strict=True):
        # An item that the other list does not have may have been cut off at its end.
        if not abs(score - score_of.get(leaf, last)) <= SCORE_TOLERANCE and score != score_of.get(leaf):
            return np.inf
    return difference
