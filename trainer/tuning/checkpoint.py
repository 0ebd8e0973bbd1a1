"""Checkpoints of a training run: weights, optimizer and state, without pickle."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.generator.model import GeneratorForCausalLM


@dataclass
class TrainingState:
    """How far a training run is. The fields are the keys of a checkpoint's place.json."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    step: int = 0
    seconds: float = 0.0
    best_ndcg: float = -1.0
    validity: float = -1.0  # of the weights that are kept
    stale: int = 0  # validations since the best one
    loss: float | None = None  # running mean
    stopped: str | None = None  # why the run ended before its last epoch
    curve: list[dict[str, float]] = field(default_factory=list)  # a point for each validation


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights, each tensor once: lm_head shares the memory of the embeddings."""
    return {name: value.detach().clone().contiguous() for name, value in model.named_parameters()}


def restore(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put a snapshot back."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(weights[name])


class Checkpoint:
    """One folder that holds the newest checkpoint of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkpoint"
        self.best: dict[str, Tensor] | None = None

    def save(
        self,
        model: GeneratorForCausalLM,
        optimizer: torch.optim.Optimizer,
        state: TrainingState,
        best: dict[str, Tensor] | None,
    ) -> None:
        """Write all of it beside the old checkpoint, then put it in its place."""
        fresh = self.folder.with_name("checkpoint.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        save_file(snapshot(model), fresh / "weights.safetensors")
        moments: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                moments[f"{key}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
        save_file(moments, fresh / "optimizer.safetensors")
        if best is not None:
            save_file(best, fresh / "best.safetensors")
        (fresh / "place.json").write_text(json.dumps(asdict(state)))
        old = self.folder.with_name("checkpoint.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(old)
        fresh.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def load(self, model: GeneratorForCausalLM, optimizer: torch.optim.Optimizer) -> TrainingState | None:
        """Put the checkpoint into model and optimizer; None where there is none."""
        if not (self.folder / "place.json").exists():
            return None
        where = next(model.parameters()).device
        restore(model, load_file(self.folder / "weights.safetensors"))
        moments = load_file(self.folder / "optimizer.safetensors")
        parameters = dict(model.named_parameters())
        for name, value in moments.items():
            key, _, parameter = name.partition("/")
            optimizer.state[parameters[parameter]][key] = value.to(where)
        best = self.folder / "best.safetensors"
        self.best = load_file(best, device=str(where)) if best.exists() else None
        return TrainingState(**json.loads((self.folder / "place.json").read_text()))

    def remove(self) -> None:
        """Forget the run."""
        shutil.rmtree(self.folder, ignore_errors=True)
