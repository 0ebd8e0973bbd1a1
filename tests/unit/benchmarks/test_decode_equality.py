"""Serving's beam is transformers' beam: the same items in the same order, on a real year."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from benchmarks.decode import BEAM, online_retail_sids, serving_decoder, train_generator, transformers_decoder
from registry.bundles.prompt import Prompt, prompt_sids
from trainer.generator.export import export_generator

HISTORIES = 100


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The two decoders over one set of weights, and histories of the year: short ones and full prompts."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(2)
    sizes, sids, pasts = online_retail_sids()
    prompt = Prompt(sizes, 20)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "depth_size": 64}
    model = train_generator(prompt, pasts, steps=20, batch=8, **shape)
    folder = tmp_path_factory.mktemp("graphs")
    export_generator(model, folder)
    chosen = np.random.default_rng(1).permutation(len(pasts))[:HISTORIES]
    every = sorted(sids.values())
    histories = [prompt_sids(pasts[at], None, prompt.max_items) for at in chosen]
    return (
        serving_decoder(folder, prompt, every, 1),
        transformers_decoder(model, prompt, every),
        histories,
        set(every),
    )


def test_the_items_and_their_order_are_those_of_transformers_generate(both):
    ours, theirs, histories, known = both
    assert {len(history) for history in histories} >= {20}
    # In batches: what is compared is the same, and `generate` spends its time in Python.
    batches = [histories[at : at + 25] for at in range(0, HISTORIES, 25)]
    found = [pair for batch in batches for pair in zip(ours(batch), theirs(batch), strict=True)]
    assert len(found) == HISTORIES
    for mine, other in found:
        assert [sid for sid, _ in mine] == [sid for sid, _ in other]
        assert len({sid for sid, _ in mine}) == BEAM
        assert {sid for sid, _ in mine} <= known
        np.testing.assert_allclose([score for _, score in mine], [score for _, score in other], atol=1e-4)
