"""Checkpoints of a training: tensors as safetensors, the rest as JSON, no pickle, and never half of one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from streams.errors import SidstreamError
from trainer.files import digest, write_atomically

_NEWEST = "newest.json"
Tensors = dict[str, Tensor]


def snapshot(model: nn.Module) -> Tensors:
    """A copy of the weights, each tensor once: lm_head shares the memory of the embeddings."""
    return {name: value.detach().clone().contiguous() for name, value in model.named_parameters()}


def trained_weights(model: nn.Module) -> Tensors:
    """`snapshot` of the weights that are trained: beside adapters the others stay what they are."""
    return {
        name: value.detach().clone().contiguous()
        for name, value in model.named_parameters()
        if value.requires_grad
    }


def restore(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put a snapshot back, all of its tensors; weights that it lacks stay."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The moments and step counts of an optimizer, named by the number of their parameter."""
    return {
        f"{number}/{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, moments in optimizer.state_dict()["state"].items()
        for key, value in moments.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put moments back, each on the device that the optimizer keeps it on."""
    state: dict[int, Tensors] = {}
    for name, value in tensors.items():
        number, _, key = name.partition("/")
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def seed_of(*numbers: int) -> int:
    """The seed of one step of a training: what is drawn there is the same after a pause."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: groups of tensors on the CPU, and what is known besides."""

    tensors: dict[str, Tensors]
    state: dict[str, Any]


class Checkpoint:
    """The newest checkpoint of a stage, below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkpoint"

    def save(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Write one beside the old one, then name it as the newest: a crash leaves one of the two."""
        last = self._newest()
        fresh = self.folder / f"{int(last['folder']) + 1 if last else 0:08d}"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        digests = {}
        for name, group in tensors.items():
            path = fresh / f"{name}.safetensors"
            save_file(dict(group), path)
            digests[name] = digest(path)
        about = {"folder": fresh.name, "sha256": digests, "state": dict(state)}
        write_atomically(self.folder / _NEWEST, json.dumps(about).encode())
        for other in self.folder.iterdir():
            if other.is_dir() and other != fresh:
                shutil.rmtree(other, ignore_errors=True)

    def load(self) -> Saved | None:
        """The newest checkpoint; None where there is none. Raises SidstreamError where it is damaged."""
        newest = self._newest()
        if newest is None:
            return None
        tensors = {}
        for name, expected in newest["sha256"].items():
            path = self.folder / newest["folder"] / f"{name}.safetensors"
            if not path.exists() or digest(path) != expected:
                raise self._damaged(f"{path.name} is missing or was changed")
            tensors[name] = load_file(path)
        return Saved(tensors, newest["state"])

    def _newest(self) -> dict[str, Any] | None:
        path = self.folder / _NEWEST
        if not path.exists():
            return None
        try:
            newest: dict[str, Any] = json.loads(path.read_bytes())
        except ValueError as error:
            raise self._damaged(f"{_NEWEST} is no JSON") from error
        return newest

    def _damaged(self, reason: str) -> SidstreamError:
        return SidstreamError(
            f"checkpoint {self.folder} is damaged ({reason}): remove it to begin the stage anew"
        )
