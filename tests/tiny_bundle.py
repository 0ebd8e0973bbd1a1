"""A bundle of a few kilobytes: its graphs are an embedding sum and a linear layer, its weights a seed's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from registry.bundles.bundle import Bundle, write_bundle
from registry.bundles.codebook import Codebook
from registry.bundles.context import Context
from registry.bundles.context import write as write_context
from registry.bundles.prompt import Prompt
from registry.bundles.rewards import Rewards
from registry.bundles.rewards import write as write_rewards

WIDTH = 8


class Weights:
    """What the graphs hold, so that a test can compute the same. V tokens: the codes, then 5 words."""

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        self.prompt = Prompt(tuple(sizes), 8)
        rng = np.random.default_rng(seed)
        tokens = self.prompt.first_word + 5
        self.table = rng.normal(size=(tokens, WIDTH)).astype(np.float32)
        self.table[0] = 0  # padding adds nothing
        self.output = rng.normal(size=(WIDTH, tokens)).astype(np.float32)

    def encode(self, prompt: Sequence[Sequence[int]]) -> np.ndarray:
        """The state (WIDTH,) of one prompt of SIDs."""
        return self.table[1] + sum(
            (self.table[self.prompt.tokens(sid)].sum(axis=0) for sid in prompt), np.zeros(WIDTH, np.float32)
        )

    def log_probs(self, state: np.ndarray, prefix: Sequence[int]) -> np.ndarray:
        """(K_l,) log-probabilities after the codes of `prefix`."""
        tokens = [self.prompt.code_base(level) + code for level, code in enumerate(prefix)]
        logits = (state + self.table[tokens].sum(axis=0)) @ self.output
        base = self.prompt.code_base(len(prefix))
        top = logits.max()
        logs = logits - top - np.log(np.exp(logits - top).sum())
        return logs[base : base + self.prompt.sizes[len(prefix)]]


def tiny_codebook(sizes: Sequence[int], seed: int = 0) -> Codebook:
    """A codebook of those sizes; other seed, other id."""
    rng = np.random.default_rng(seed)
    return Codebook("test", tuple(rng.normal(size=(size, 4)).astype(np.float32) for size in sizes))


def write_tiny_bundle(
    folder: Path, sizes: Sequence[int], seed: int = 0, popular: Sequence[str] = (), codebook_seed: int = 0,
    fields: Mapping[str, Sequence[str]] | None = None, rewards: Rewards | None = None,
) -> Bundle:  # fmt: skip
    """Write a whole bundle into `folder`; with `fields` of a context, whose values bend the state."""
    weights = Weights(sizes, seed)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    context = Context(len(weights.table), fields or {})
    write_context(context, folder)
    write_rewards(rewards, folder)
    _save(folder / "encode.onnx", *_encode(weights, context, seed))
    for level in range(len(sizes)):
        _save(folder / f"step_{level}.onnx", *_step(weights, level))
    return write_bundle(
        folder, kind="base", codebook=tiny_codebook(sizes, codebook_seed), popular=popular,
        max_items=weights.prompt.max_items, sids={}, window={}, seed=seed,
    )  # fmt: skip


def _constant(name: str, value: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value), name)


def _encode(weights: Weights, context: Context, seed: int) -> tuple:
    bent = np.random.default_rng(seed + 1).normal(0, 3, size=(context.size, WIDTH)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "codes"], ["vectors"]),
        helper.make_node("ReduceSum", ["vectors", "axes"], ["items"], keepdims=0),
        helper.make_node("Add", ["items", "bos"], ["read" if context.size else "state"]),
    ]
    if context.size:
        nodes += [
            helper.make_node("Gather", ["told_table", "context"], ["told"]),
            helper.make_node("ReduceSum", ["told", "one"], ["bend"], keepdims=0),
            helper.make_node("Add", ["read", "bend"], ["state"]),
        ]
    constants = [
        _constant("table", weights.table), _constant("axes", np.array([1, 2])),
        _constant("bos", weights.table[1]), _constant("one", np.array([1])),
        # Token ids go on behind those of codes and words; 0 says nothing.
        _constant("told_table", np.concatenate((np.zeros_like(weights.table), bent))),
    ]  # fmt: skip
    inputs = [
        helper.make_tensor_value_info("codes", TensorProto.INT64, ["B", "P", len(weights.prompt.sizes)]),
        helper.make_tensor_value_info("lengths", TensorProto.INT64, ["B"]),
    ]
    if context.size:
        inputs.append(helper.make_tensor_value_info("context", TensorProto.INT64, ["B", "C"]))
    return nodes, inputs, helper.make_tensor_value_info("state", TensorProto.FLOAT, ["B", WIDTH]), constants


def _step(weights: Weights, level: int) -> tuple:
    base, size = weights.prompt.code_base(level), weights.prompt.sizes[level]
    inputs = [helper.make_tensor_value_info("state", TensorProto.FLOAT, ["N", WIDTH])]
    nodes = []
    if level:
        inputs.append(helper.make_tensor_value_info("prefix", TensorProto.INT64, ["N", level]))
        nodes = [
            helper.make_node("Gather", ["table", "prefix"], ["chosen"]),
            helper.make_node("ReduceSum", ["chosen", "axes"], ["sum"], keepdims=0),
            helper.make_node("Add", ["state", "sum"], ["hidden"]),
        ]
    nodes += [
        helper.make_node("MatMul", ["hidden" if level else "state", "output"], ["logits"]),
        helper.make_node("LogSoftmax", ["logits"], ["all"], axis=-1),
        helper.make_node("Slice", ["all", "from", "to", "last"], ["log_probs"]),
    ]
    constants = [
        _constant("table", weights.table), _constant("output", weights.output),
        _constant("axes", np.array([1])), _constant("from", np.array([base])),
        _constant("to", np.array([base + size])), _constant("last", np.array([1])),
    ]  # fmt: skip
    return (
        nodes,
        inputs,
        helper.make_tensor_value_info("log_probs", TensorProto.FLOAT, ["N", size]),
        constants,
    )


def _save(path: Path, nodes: list, inputs: list, output: onnx.ValueInfoProto, constants: list) -> None:
    graph = helper.make_graph(nodes, path.stem, inputs, [output], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
