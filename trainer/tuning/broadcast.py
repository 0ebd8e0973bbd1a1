"""The inputs of a training, which the main process reads once: written to a folder for the other processes.

Arrays are safetensors, words are JSON, the model and its tokenizer are as in a bundle. Held-out events,
users and SIDs are the main process's alone. The folder has to be one that every process can read.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerFast

from registry.bundles.prompt import Prompt
from streams.errors import SidstreamError
from trainer.generator.build import load_model
from trainer.generator.constrained import SidSet
from trainer.generator.model import GeneratorForCausalLM
from trainer.sequences.held_out import HeldOut, TrainingSplit
from trainer.sequences.interactions import Interactions, TrainingCatalogue
from trainer.sequences.labelled_answers import LabelledAnswers
from trainer.sequences.rows import TrainingRows
from trainer.settings import TrainerSettings
from trainer.tuning.devices import Devices
from trainer.tuning.pretrain import pretrain_and_tune

_NAME, _ANSWERS = "handover", "answers."


def write_training_inputs(
    run: Path, model: GeneratorForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: TrainingRows,
    settings: TrainerSettings,
) -> None:  # fmt: skip
    """Put the inputs that the other processes need below a run's folder, in place of older ones."""
    folder = run / _NAME
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    log = rows.log
    arrays = {
        "codes": rows.catalogue.codes, "starts": log.starts, "items": log.items, "ts": log.ts,
        "fresh": log.fresh,
        "bought": log.bought, "context": log.context, "rewards": log.rewards,
    }  # fmt: skip
    if rows.labelled_answers is not None:
        arrays |= {_ANSWERS + name: value for name, value in vars(rows.labelled_answers).items()}
    save_file(
        {name: np.ascontiguousarray(value) for name, value in arrays.items()}, folder / "log.safetensors"
    )
    about = {
        "sizes": list(rows.prompt.sizes), "max_items": rows.prompt.max_items, "titles": rows.catalogue.titles,
        "settings": settings.model_dump(mode="json"),
    }  # fmt: skip
    (folder / "about.json").write_text(json.dumps(about))


def read_training_inputs(run: Path) -> tuple[GeneratorForCausalLM, TrainingRows, TrainerSettings]:
    """What `write_training_inputs` left there. Raises SidstreamError where this process does not find it."""
    folder = run / _NAME
    try:
        about = json.loads((folder / "about.json").read_text())
        arrays = load_file(folder / "log.safetensors")
    except OSError as error:
        raise SidstreamError(
            f"{folder} cannot be read here ({error.strerror}): set SIDSTREAM_TRAINER__HOME to a folder that "
            "every process of the training can read"
        ) from error
    settings = TrainerSettings.model_validate(about["settings"])
    prompt = Prompt(tuple(about["sizes"]), about["max_items"])
    model, tokenizer = load_model(folder / "model")
    catalogue = TrainingCatalogue([], [], arrays["codes"], about["titles"])
    names = ("starts", "items", "ts", "fresh", "bought", "context", "rewards")
    log = Interactions([], *(arrays[name] for name in names))
    no_held_out = HeldOut([], np.zeros(0, dtype=np.int64), [], [])
    split = TrainingSplit(log, no_held_out)
    answer_arrays = {
        name.removeprefix(_ANSWERS): array for name, array in arrays.items() if name.startswith(_ANSWERS)
    }
    answers = LabelledAnswers(**answer_arrays) if answer_arrays else None
    return model, TrainingRows(split, catalogue, tokenizer, prompt, settings, answers), settings


def follow_main_process(devices: Devices) -> None:
    """All processes but the main one: take part in each training that the main one sends, then leave."""
    while (run := devices.receive()) is not None:
        model, rows, settings = read_training_inputs(run)
        torch.set_num_threads(settings.threads or torch.get_num_threads())
        # Only the main process validates: no SID is needed here.
        pretrain_and_tune(model, rows, SidSet([], rows.prompt), settings, folder=run, devices=devices)
    devices.leave()
