"""The ONNX generator computes what the weights say, for prompts of any length in one call."""

from __future__ import annotations

import numpy as np
import pytest

from registry.decoding.onnx_generator import OnnxGenerator
from serving.bundle_loader import open_bundle, warm_up
from streams.errors import SidstreamError
from tests.tiny_bundle import Weights, write_tiny_bundle

SIZES = (5, 4, 6)


def test_it_scores_as_the_weights_do_for_prompts_of_any_length(tmp_path):
    bundle = write_tiny_bundle(tmp_path, SIZES, seed=3)
    weights = Weights(SIZES, seed=3)
    generator = OnnxGenerator(bundle.path, SIZES, bundle.manifest.max_items)
    prompts = [[], [(4, 3, 5)], [(0, 0, 0), (1, 2, 3), (4, 3, 5)]]
    state = generator.encode(prompts)
    for level in range(3):
        prefix = np.array([(1, 2)[:level]] * len(prompts), dtype=np.int64).reshape(len(prompts), level)
        want = [weights.log_probs(weights.encode(prompt), (1, 2)[:level]) for prompt in prompts]
        np.testing.assert_allclose(generator.step(state, prefix), want, atol=1e-5)


def test_a_bundle_whose_graph_does_not_open_names_the_file(tmp_path):
    bundle = write_tiny_bundle(tmp_path, SIZES)
    (tmp_path / "step_1.onnx").write_bytes(b"not a graph")
    with pytest.raises(SidstreamError, match=r"step_1\.onnx does not open"):
        open_bundle(bundle, threads=1)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (np.zeros((2, 3), np.float32), "level 0 answers"),
        (np.zeros((2, 5), np.float64), "float64"),
        (np.zeros((2, 5), np.float32), "a probability of 5"),
        (np.full((2, 5), np.nan, np.float32), "a probability of nan"),
    ],
)
def test_a_model_that_breaks_the_interface_is_not_put_in_service(answer, complaint):
    class Broken:
        sizes = (5,)

        def encode(self, prompts):
            return np.zeros((len(prompts), 1))

        def step(self, state, prefix):
            return answer

    with pytest.raises(SidstreamError, match=complaint):
        warm_up(Broken(), 3, "b0")
