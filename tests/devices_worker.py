"""One of several processes that train a tiny shop together, as a launcher starts them.

    torchrun --nproc-per-node 2 -m tests.devices_worker FOLDER train

Every process leaves the weights that each training gave it as FOLDER/<training>-<rank>.safetensors.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
from safetensors.torch import save_file

from streams.errors import SidstreamError
from tests.tiny_shop import shop
from trainer.alignment.losses import DynamicBeta
from trainer.tuning import broadcast
from trainer.tuning.checkpoint import snapshot
from trainer.tuning.devices import Devices, launched_devices
from trainer.tuning.pretrain import pretrain_and_tune

# Nobody is held out: the kept weights are those of the last step, in every process.
SHOP: dict[str, Any] = {
    "arithmetic": "float32",
    "validation_users": 0, "epochs": 3, "weights": {"sid_to_title": 0.0, "title_to_sid": 0.0},
}  # fmt: skip
# Two stages, and dropout that must not depend on which process has a batch.
STAGES: dict[str, Any] = {"pretrain": {"share": 0.6, "recent_share": 0.5}}


def averaged(devices: Devices) -> list[list[float] | None]:
    """What two steps of `average` give: one with a batch in both processes, one in the main one alone."""
    made: list[list[float] | None] = []
    for own in (devices.rank + 1.0, 5.0 if devices.main else None):
        model = torch.nn.Linear(2, 1)
        loss = None if own is None else own * model.weight.sum()
        if loss is not None:
            loss.backward()
        shown = devices.average_gradients(model, None if own is None else torch.tensor(own))
        assert model.weight.grad is not None
        made += [model.weight.grad.flatten().tolist(), [float(shown)]]
        made.append(None if model.bias.grad is None else model.bias.grad.tolist())
    return made


# Gaps of preference pairs, a batch for each of two processes in every step.
GAPS = (((1.0, 2.0), (10.0, 20.0)), ((-3.0, 4.0), (0.0, 7.0)), ((5.0, 5.0), (-6.0, 1.0)))


def followed(devices: Devices) -> list[list[float]]:
    """Mean, deviation and beta of a dynamic beta after each step, over what all processes have."""
    dynamic, made = DynamicBeta(0.1, gather=accelerate.Accelerator(cpu=True).gather), []
    for step in GAPS:
        actual = dynamic(torch.tensor(step[devices.rank]), training=True)
        made.append([dynamic.mean, dynamic.deviation, float(actual.beta)])
    return made


def lead(devices: Devices, folder: Path) -> None:
    """Train unbroken in one stage, unbroken in two, and in two with a pause in the middle of each."""

    def run(name: str, within: Path, dropout: float, stages: dict[str, Any], until: int | None = None) -> int:
        tiny = shop(**SHOP | stages)
        model = tiny.model(dropout=dropout)
        broadcast.write_training_inputs(within, model, tiny.tokenizer, tiny.rows, tiny.settings)
        devices.send(within)
        calls = iter(range(1000))
        result = pretrain_and_tune(
            model, tiny.rows, tiny.sids, tiny.settings, folder=within, devices=devices,
            stop=lambda: next(calls) == until,
        )  # fmt: skip
        save_file(snapshot(model), folder / f"{name}-{devices.rank}.safetensors")
        steps = result.steps + (result.pretraining.steps if result.pretraining else 0)
        return steps

    run("one", folder / "a", 0.0, {})
    steps = run("two", folder / "b", 0.2, STAGES)
    cuts = [run("cut", folder / "c", 0.2, STAGES, until) for until in (3, 3, steps - 8)]
    run("resumed", folder / "c", 0.2, STAGES)
    devices.leave()
    environment = {
        "steps": steps, "cuts": cuts, "left": sorted(set(os.environ) & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}),
        "processes": accelerate.PartialState().num_processes, "joined": torch.distributed.is_initialized(),
    }  # fmt: skip
    (folder / "seen.json").write_text(json.dumps(environment))


def main() -> None:
    """Lead or follow; `lost` names a folder that is not there."""
    folder, what = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    devices = launched_devices()
    rank = devices.rank
    if what == "train":
        (folder / f"averaged-{rank}.json").write_text(json.dumps(averaged(devices)))
        (folder / f"followed-{rank}.json").write_text(json.dumps(followed(devices)))
    if not devices.main:
        names = iter(("one", "two", "cut", "cut", "cut", "resumed"))

        def train_and_save(model: Any, *args: Any, **more: Any) -> Any:
            result = pretrain_and_tune(model, *args, **more)
            save_file(snapshot(model), folder / f"{next(names)}-{rank}.safetensors")
            return result

        broadcast.pretrain_and_tune = train_and_save
        broadcast.follow_main_process(devices)
    elif what == "lost":
        devices.send(folder / "nowhere")
        devices.broadcast([0.0])
        devices.leave()
    else:
        lead(devices, folder)


if __name__ == "__main__":
    try:
        main()
    except SidstreamError as error:
        sys.exit(f"error: {error}")
