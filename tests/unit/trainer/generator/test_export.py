"""The exported graphs compute what torch computes, at sizes that the tracer never saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from streams.errors import SidstreamError
from tests.tiny_shop import SIZES, shop
from trainer.generator.export import TOLERANCE, check_parity, export_generator


def test_graphs_equal_torch_and_have_the_shapes_of_the_contract(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_shop = shop()
    model = tiny_shop.model(dropout=0.5)
    export_generator(model, tmp_path)
    assert check_parity(model, tmp_path) < TOLERANCE
    assert capfd.readouterr() == ("", "")
    encode = onnx.load(tmp_path / "encode.onnx")
    assert [port.name for port in encode.graph.input] == ["codes", "lengths", "extras"]
    assert [port.name for port in encode.graph.output] == ["state"]
    assert encode.opset_import[0].version >= 17
    for level in range(len(SIZES)):
        graph = onnx.load(tmp_path / f"step_{level}.onnx").graph
        assert [port.name for port in graph.input] == ["state", "prefix"][: 2 if level else 1]
        shape = graph.output[0].type.tensor_type.shape.dim
        assert shape[0].dim_param
        assert shape[1].dim_value == SIZES[level]


def test_graphs_of_other_weights_fail_the_parity_check(tmp_path: Path) -> None:
    tiny_shop = shop()
    export_generator(tiny_shop.model(seed=1), tmp_path)
    with pytest.raises(SidstreamError, match="differ from torch"):
        check_parity(tiny_shop.model(seed=2), tmp_path)


def test_a_step_keeps_the_mass_of_other_tokens(tmp_path: Path) -> None:
    tiny_shop = shop()
    model = tiny_shop.model()
    with torch.no_grad():
        logs = model.step(0, torch.zeros(2, 32), None)
    assert np.all(logs.exp().sum(-1).numpy() < 0.999)
