"""The generator of a bundle in ONNX Runtime: one graph encodes the prompt, one graph a level scores codes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from registry.bundles.prompt import Prompt
from registry.decoding.item_vectors import ITEMS, Floats, ItemVectors
from registry.decoding.sid_index import Ints, Sid
from streams.errors import SidstreamError


class OnnxGenerator:
    """`registry.decoding.beam.Generator` over a bundle's encode.onnx and step_<l>.onnx.

    encode: codes (B, P, L) int64 token ids padded with 0 on the right, lengths (B,) int64; where the bundle
    has a dense head, the items' own vectors as extras (B, P, D) float32; where it has a context, context
    (B, C) int64 token ids padded with 0 -> state (B, D) float32. step_l: state (N, D), prefix (N, l) int64
    token ids -> log_probs (N, K_l) float32.
    """

    def __init__(self, folder: Path, sizes: Sequence[int], max_items: int, threads: int = 1) -> None:
        """Open the graphs in `folder`; raises SidstreamError naming the file that does not open."""
        self.sizes = tuple(sizes)
        prompt = Prompt(self.sizes, max_items)
        self._bases = np.array([prompt.code_base(level) for level in range(len(self.sizes))], dtype=np.int64)
        self._encode = _session(folder / "encode.onnx", threads)
        self.takes_context = "context" in [port.name for port in self._encode.get_inputs()]
        self.items = ItemVectors(folder, self.sizes) if (folder / ITEMS).exists() else None
        self._steps = [_session(folder / f"step_{level}.onnx", threads) for level in range(len(self.sizes))]

    def encode(
        self, prompts: Sequence[Sequence[Sid]], contexts: Sequence[Sequence[int]] | None = None
    ) -> NDArray[np.generic]:
        """B prompts of SIDs, oldest first, and contexts (B, C) of token ids -> states (B, D) float32.

        An empty prompt is BOS alone. None for the contexts: no request has a context.
        """
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        # At least one column: the graph has no shape for P = 0, and `lengths` says that nothing is in it.
        codes = np.zeros((len(prompts), max(1, int(lengths.max())), len(self.sizes)), dtype=np.int64)
        inputs: dict[str, NDArray[np.generic]] = {"codes": codes, "lengths": lengths}
        if self.items is not None:
            own_vectors = np.zeros((*codes.shape[:2], self.items.width), dtype=np.float32)
            inputs["extras"] = own_vectors
        if self.takes_context:
            context_tokens = np.zeros((len(prompts), 1)) if contexts is None else contexts
            inputs["context"] = np.asarray(context_tokens, dtype=np.int64)
        for row, prompt in enumerate(prompts):
            if len(prompt):
                sids = np.asarray(prompt, dtype=np.int64)
                codes[row, : len(prompt)] = sids + self._bases
                if self.items is not None:
                    own_vectors[row, : len(prompt)] = self.items.own_vectors(sids)
        state: NDArray[np.float32] = self._encode.run(["state"], inputs)[0]
        return state

    def step(self, state: NDArray[np.generic], prefix: Ints) -> Floats:
        """States (N, D) and chosen codes (N, l) -> log-probabilities (N, K_l) over the whole vocabulary."""
        level = prefix.shape[1]
        inputs = {"state": state}
        if level:
            inputs["prefix"] = prefix + self._bases[:level]
        log_probs: Floats = self._steps[level].run(["log_probs"], inputs)[0]
        return log_probs


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Threads that spin between calls take the core from Kafka and from the event loop.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors only
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (
        Exception
    ) as error:  # ONNX Runtime raises its own kinds, one for each status, without a common base
        raise SidstreamError(
            f"{path} does not open in ONNX Runtime ({error}); export the bundle again"
        ) from error
