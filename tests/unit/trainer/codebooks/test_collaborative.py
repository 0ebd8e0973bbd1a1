"""Vectors of what users did together are the same each time: SIDs are made of them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tiny_sequences import chains
from trainer.codebooks.collaborative import collaborative_vectors
from trainer.evaluation.splits import split_by_time


@pytest.mark.parametrize("dim", [4, 64])
def test_the_same_sequences_give_the_same_vectors(dim: int) -> None:
    # A chain's matrix has pairs of equal singular values: any rotation of their vectors would do as well.
    split = split_by_time(chains())
    first, *others = (collaborative_vectors(split.train, split.dataset.size, dim) for _ in range(4))
    assert all(np.array_equal(first, other) for other in others)
    lengths = np.linalg.norm(first, axis=1)
    assert np.all((lengths == 0) | (abs(lengths - 1) < 1e-5))
    assert lengths.any()
