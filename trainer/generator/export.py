"""The generator as ONNX graphs: encode.onnx reads a prompt, step_<level>.onnx spells; held against torch."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from registry.bundles.prompt import Prompt
from streams.errors import SidstreamError
from trainer.generator.model import GeneratorForCausalLM
from trainer.sequences.batches import pad_items

_OPSET = 18
# Float32 sums in another order differ by some 1e-6 on these graphs; 1e-4 is another function.
TOLERANCE = 1e-4


class _Encode(nn.Module):
    def __init__(self, model: GeneratorForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, codes: Tensor, lengths: Tensor, beyond_codes: Tensor, context: Tensor | None = None
    ) -> Tensor:
        return self.model.encode(codes, lengths, beyond_codes, context)


class _Step(nn.Module):
    def __init__(self, model: GeneratorForCausalLM, level: int) -> None:
        super().__init__()
        self.model, self.level = model, level

    def forward(self, state: Tensor, prefix: Tensor | None = None) -> Tensor:
        return self.model.step(self.level, state, prefix)


@contextlib.contextmanager
def silent_exporter() -> Iterator[None]:
    """A context without the exporter's own output and warnings, which are for torch's developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def export_generator(model: GeneratorForCausalLM, folder: Path) -> None:
    """Write encode.onnx, step_0.onnx .. step_{L-1}.onnx and items.safetensors into `folder`.

    Every leading dimension is dynamic. encode: codes (B, P, L) int64, lengths (B,) int64, extras (B, P, D)
    float32, which are `ItemTable.beyond_codes`, and, where the model has context tokens, context (B, C)
    int64 padded with 0 -> state (B, D) float32. step_l: state (N, D) and, for l > 0, prefix (N, l) int64 ->
    log_probs (N, K_l) float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    levels, width = model.config.levels, model.config.hidden_size
    # Sizes of two and more: the tracer takes a dimension of one for a constant.
    first = model.config.code_base
    codes = torch.full((2, 3, levels), first, dtype=torch.int64)
    inputs: dict[str, Tensor] = {
        "codes": codes, "lengths": torch.tensor([3, 2]), "extras": torch.zeros(2, 3, width),
    }  # fmt: skip
    axes = {"codes": {0: "B", 1: "P"}, "lengths": {0: "B"}, "extras": {0: "B", 1: "P"}, "state": {0: "B"}}
    if model.config.num_context:
        inputs["context"] = torch.full((2, 2), model.config.vocab_size - 1, dtype=torch.int64)
        axes["context"] = {0: "B", 1: "C"}
    with silent_exporter(), torch.no_grad():
        torch.onnx.export(
            _Encode(model), tuple(inputs.values()), str(folder / "encode.onnx"),
            input_names=list(inputs), output_names=["state"], dynamic_axes=axes,
            opset_version=_OPSET, dynamo=False, external_data=False,
        )  # fmt: skip
        for level in range(levels):
            step_inputs: tuple[Tensor, ...] = (torch.zeros(3, width),)
            step_names = ["state"]
            if level:
                step_inputs += (torch.full((3, level), first, dtype=torch.int64),)
                step_names.append("prefix")
            torch.onnx.export(
                _Step(model, level), step_inputs, str(folder / f"step_{level}.onnx"),
                input_names=step_names, output_names=["log_probs"],
                dynamic_axes={name: {0: "N"} for name in [*step_names, "log_probs"]},
                opset_version=_OPSET, dynamo=False, external_data=False,
            )  # fmt: skip

    _save_items(model, folder / "items.safetensors")


def _save_items(model: GeneratorForCausalLM, path: Path) -> None:
    """What registry.decoding.item_vectors reads: sids (I, L) uint16, extras (I, D), codes (sum K, D),
    query (D, D), again (8 + 5, D) and, where the generator sees texts, text (D, T)."""
    base, config = model.model, model.config
    table = base.items
    starts = torch.tensor([config.code_range(level)[0] for level in range(config.levels)])
    end = config.code_range(config.levels - 1)[1]
    rows = torch.arange(len(table.keys))
    text = {} if table.text_proj is None else {"text": table.text_proj.weight.detach().numpy()}
    save_file(
        text
        | {
            "sids": (table.codes - starts).numpy().astype(np.uint16),
            "extras": table.beyond_codes(rows).detach().numpy(),
            "codes": base.embed_tokens.weight[config.code_base : end].detach().numpy().copy(),
            "query": table.query_proj.weight.detach().numpy(),
            "again": (table.repeat_vectors * table.repeat_strength).detach().numpy(),
        },
        str(path),
    )


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def check_parity(model: GeneratorForCausalLM, folder: Path, seed: int = 0) -> float:
    """The largest absolute difference of the graphs to torch, on random histories of SIDs, under random
    contexts where the model has any.

    Lengths 0 to max_items, batches of one and of many. Raises SidstreamError above `TOLERANCE`. What the
    bundle then answers to users is compared by trainer.offline_checks.bundle_parity.
    """
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    config = model.config
    prompt = Prompt(tuple(config.sizes), config.max_items)
    rng = np.random.default_rng(seed)
    sizes = np.array(config.sizes)
    lengths = [0, 1, 2, config.max_items, *rng.integers(0, config.max_items + 1, size=12).tolist()]
    all_histories = [
        [tuple(row) for row in rng.integers(0, sizes, size=(n, len(sizes))).tolist()] for n in lengths
    ]
    encode = _session(folder / "encode.onnx")
    steps = [_session(folder / f"step_{level}.onnx") for level in range(config.levels)]
    largest_difference = 0.0
    for batch in ([all_histories[0]], [all_histories[3]], all_histories):
        spelled = np.array([prompt.tokens(sid) for history in batch for sid in history], dtype=np.int64)
        bounds = np.cumsum([0, *(len(history) for history in batch)])
        codes, counts = pad_items(
            [np.arange(low, high) for low, high in pairwise(bounds)], spelled.reshape(-1, config.levels)
        )
        beyond_codes = model.model.items.beyond_codes(model.model.items.rows(codes))
        encode_inputs = {"codes": codes.numpy(), "lengths": counts.numpy(), "extras": beyond_codes.numpy()}
        context = None
        if config.num_context:
            first = config.vocab_size - config.num_context
            context_tokens = rng.integers(first, config.vocab_size, size=(len(batch), 3))
            encode_inputs["context"] = np.where(
                rng.random(context_tokens.shape) < 0.5, context_tokens, config.pad_token_id
            )
            context = torch.from_numpy(encode_inputs["context"])
        state = model.encode(codes, counts, context=context)
        (exported_state,) = encode.run(["state"], encode_inputs)
        largest_difference = max(largest_difference, float(np.abs(exported_state - state.numpy()).max()))
        chosen = torch.from_numpy(rng.integers(0, sizes, size=(len(batch), len(sizes))))
        tokens = chosen + torch.tensor([prompt.code_base(level) for level in range(config.levels)])
        for level, session in enumerate(steps):
            prefix = tokens[:, :level] if level else None
            expected = model.step(level, state, prefix)
            step_inputs = {"state": state.numpy()} | (
                {"prefix": prefix.numpy()} if prefix is not None else {}
            )
            (log_probs,) = session.run(["log_probs"], step_inputs)
            largest_difference = max(largest_difference, float(np.abs(log_probs - expected.numpy()).max()))
    # A NaN compares false: written so that it fails too.
    if not largest_difference < TOLERANCE:
        raise SidstreamError(
            f"the exported graphs differ from torch by {largest_difference:.2g} (at most {TOLERANCE} is "
            "accepted); the model was not registered; train it again, and report the versions of torch and "
            "onnxruntime"
        )
    return largest_difference
