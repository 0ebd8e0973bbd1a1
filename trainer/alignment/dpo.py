"""Preference alignment with TRL: DPO, Softmax-DPO and beta-DPO, jointly with the chosen answer's own loss.

Plain DPO on SIDs has been published as harmful: the next-token term keeps the chosen SID likely, one epoch is
enough, and the stage stops where the chosen SID's log-probability, the hit rate on held-out users or the
share of real SIDs falls too far (`trainer.alignment.stop_rules`).

The same code aligns the generator, in full, and a Hugging Face causal LM, by LoRA: the losses need only the
log-probability of an answer (`trainer.alignment.scores`). The reference is the model that the stage
starts from; where adapters are trained, it is the model without them.
"""

from __future__ import annotations

import copy
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer

from streams.errors import SidstreamError
from trainer.alignment.objective import PreferenceObjective
from trainer.alignment.rows import PreferenceRow, collate_preferences
from trainer.alignment.stop_rules import StopRules
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.probe import HeldOutProbe
from trainer.sequences.rows import TrainingRows
from trainer.settings import TrainerSettings
from trainer.tuning.devices import has_gpu
from trainer.tuning.next_item import LogReplay

# Steps between two checks of the chosen SID's log-probability.
_STEPS_BETWEEN_LOGS = 5
_INSTALL_HINT = "install trl>=1.16,<1.17"


@dataclass(frozen=True)
class DpoResult:
    """Counts and figures of the stage; `drop` in nats below the reference, `margin` times beta."""

    pairs: int
    rejected: int
    steps: int
    kept: int  # the step whose weights are kept; 0: those that the stage began with
    seconds: float
    loss: float
    margin: float
    accuracy: float
    drop: float
    beta: float  # at the last log: it changes where it is dynamic
    stopped: str
    # A point for each log (step, loss, margin, accuracy, drop, beta) and each probe (step, hr10, validity).
    curve: list[dict[str, float]] = field(default_factory=list)

    def failed(self, max_drop: float) -> str | None:
        """Why a stop rule leaves nothing to be used; None: there is something."""
        return self.stopped if self.drop > max_drop or not self.kept else None


class _PreferenceTrainer(DPOTrainer):
    """DPOTrainer with losses over 1 + K answers, for rows that are already token ids."""

    def __init__(self, objective: PreferenceObjective, **trainer_arguments: Any) -> None:
        super().__init__(**trainer_arguments)
        self.objective = objective
        objective.gather = objective.dynamic.gather = self.accelerator.gather

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        loss, figures = self.objective(self.accelerator.unwrap_model(model), inputs)
        # TRL averages them over the steps between two logs.
        metrics = self._metrics["train" if model.training else "eval"]
        for name, value in figures.items():
            metrics[name].append(value)
        return (loss, None) if return_outputs else loss


def check_trl(trainer: type[DPOTrainer] = DPOTrainer) -> None:
    """Raise SidstreamError where TRL's internals are not those that this module was written for."""
    try:
        constructor = inspect.getsource(trainer.__init__)
        columns = inspect.getsource(trainer._set_signature_columns_if_needed)
        caller = inspect.getsource(trainer.compute_loss)
        logged = inspect.getsource(trainer.log)
        prepared = list(inspect.signature(trainer._prepare_dataset).parameters)
        computed = list(inspect.signature(trainer._compute_loss).parameters)
    except AttributeError as error:
        raise SidstreamError(f"this TRL has no DPOTrainer.{error.name}: {_INSTALL_HINT}") from error
    for expected_text, source in (
        ("self._prepare_dataset(train_dataset", constructor), ('"prompt_ids"', columns),
        ('"chosen_ids"', columns), ('"rejected_ids"', columns),
        ("self._compute_loss(", caller), ("self._metrics[mode]", logged),
    ):  # fmt: skip
        if expected_text not in source:
            raise SidstreamError(f"this TRL's DPOTrainer does not use {expected_text}: {_INSTALL_HINT}")
    for name, arguments, expected in (
        ("_prepare_dataset", prepared[:2], ["self", "dataset"]),
        ("_compute_loss", computed, ["self", "model", "inputs", "return_outputs"]),
    ):
        if arguments != expected:
            raise SidstreamError(f"this TRL's DPOTrainer.{name} has other arguments: {_INSTALL_HINT}")


def align(
    model: GeneratorForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PreferenceRow],
    settings: TrainerSettings,
    folder: Path,
    *,
    sequences: TrainingRows | None = None,
    probe: HeldOutProbe | None = None,
    progress: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[GeneratorForCausalLM, DpoResult]:
    """A copy of `model` aligned to rows of token ids, in full; `model` itself is the frozen reference.

    `folder` is for TRL's files; `sequences` are the rows of the fine-tuning: their next-item loss is added
    with the weight `dpo.replay_weight`, so that clicks are not forgotten. `probe` measures the policy every
    `dpo.probe_steps`. Where a stop rule ends the stage, the weights are those of the last probe that passed.
    Raises SidstreamError when there are no rows.
    """
    policy, reference = copy.deepcopy(model).float(), copy.deepcopy(model).float().eval()
    replay = LogReplay(sequences) if sequences is not None and settings.dpo.replay_weight else None
    _, result = _train(
        policy, reference, tokenizer, rows, settings, folder, probe, progress, stop, None, replay
    )
    aligned = type(model)(model.config).eval()
    aligned.load_state_dict({name: value.cpu() for name, value in policy.state_dict().items()})
    return aligned, result


def align_language_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PreferenceRow],
    settings: TrainerSettings,
    folder: Path,
    adapters: PeftConfig | None,
    *,
    probe: HeldOutProbe | None = None,
    progress: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[Any, DpoResult]:
    """A causal LM aligned to rows in its own token ids: by `adapters`, which are merged, or in full (None).

    With adapters `model` itself is changed; without them it is copied first. Otherwise as `align`.
    """
    policy = model if adapters is not None else copy.deepcopy(model)
    reference = None if adapters is not None else copy.deepcopy(model).eval()
    aligned, result = _train(
        policy, reference, tokenizer, rows, settings, folder, probe, progress, stop, adapters, None
    )
    return (aligned.merge_and_unload() if adapters is not None else aligned).cpu().eval(), result


def _train(
    policy: Any, reference: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PreferenceRow],
    settings: TrainerSettings, folder: Path, probe: HeldOutProbe | None,
    progress: Callable[[str], None] | None, stop: Callable[[], bool] | None, adapters: PeftConfig | None,
    replay: LogReplay | None,
) -> tuple[Any, DpoResult]:  # fmt: skip
    """The model as TRL trained it, with adapters where there are any, and the outcome of the stage."""
    check_trl()
    if not rows:
        raise SidstreamError(
            "there are no preference rows to align to; check trainer.dpo.schemes and the codebook"
        )
    dpo = settings.dpo
    steps = -(-len(rows) // dpo.batch) * dpo.epochs
    arguments = DPOConfig(
        output_dir=str(folder), seed=settings.seed, num_train_epochs=dpo.epochs, learning_rate=dpo.lr,
        per_device_train_batch_size=dpo.batch, beta=dpo.beta, max_length=None, bf16=False,
        gradient_checkpointing=False, use_cpu=not has_gpu(), lr_scheduler_type="cosine",
        # The first warm-up step has a rate of 0: a stage of fewer than ten steps has no warm-up.
        warmup_steps=steps // 10, max_grad_norm=1.0, logging_steps=_STEPS_BETWEEN_LOGS, save_strategy="no",
        report_to="none", disable_tqdm=True, log_level="error", dataloader_pin_memory=has_gpu(),
        # Answers are scored without any; the replayed sequences are learned with it, as in fine-tuning.
        disable_dropout=False,
    )  # fmt: skip
    # Where a machine has several GPUs, transformers would copy the model to all of them in every step.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    stop_rules = StopRules(dpo, probe, progress, stop)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with _SilentTraining():
        objective = PreferenceObjective(dpo, reference, replay, settings.seed, settings.arithmetic)
        trainer = _PreferenceTrainer(
            objective, model=policy, ref_model=reference, args=arguments,
            train_dataset=Dataset.from_list([dict(row) for row in rows]), processing_class=tokenizer,
            data_collator=lambda batch: collate_preferences(batch, pad_id), callbacks=[stop_rules],
            peft_config=adapters,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        stop_rules.begin(trainer.model)
        started_at = time.monotonic()
        outcome = trainer.train()
        stop_rules.end(trainer.model, outcome.global_step)
    return trainer.model, DpoResult(
        pairs=len(rows), rejected=sum(len(row["rejected_ids"]) for row in rows), steps=outcome.global_step,
        kept=stop_rules.kept_step(outcome.global_step), seconds=time.monotonic() - started_at,
        loss=float(outcome.training_loss), margin=stop_rules.margin,
        accuracy=stop_rules.last_log.get("accuracy", 0.0), drop=stop_rules.drop,
        beta=stop_rules.last_log.get("beta", dpo.beta),
        stopped=stop_rules.stopped, curve=stop_rules.curve,
    )  # fmt: skip


class _SilentTraining:
    """A context in which transformers and TRL print and log nothing below errors."""

    def __enter__(self) -> None:
        self._verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._levels = {name: logging.getLogger(name).level for name in ("trl", "accelerate", "datasets")}
        for name in self._levels:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *error: object) -> None:
        transformers_logging.set_verbosity(self._verbosity)
        transformers_logging.enable_progress_bar()
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
