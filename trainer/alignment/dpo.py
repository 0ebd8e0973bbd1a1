"""Preference alignment with TRL: DPO, Softmax-DPO and beta-DPO, jointly with the chosen answer's own loss.

Plain DPO on SIDs has been published as harmful: the next-token term holds the chosen SID up, one epoch is
all, and the stage stops where the chosen SID's log-probability, the hit rate on held-out users or the share
of real SIDs falls too far (`trainer.alignment.stop_rules`).

The same code aligns the generator, in full, and a Hugging Face causal LM, by LoRA: the losses ask for no more
than the log-probability of an answer (`trainer.alignment.scores`). The reference is the model that the stage
starts from; where adapters are trained, it is the model without them.
"""

from __future__ import annotations

import copy
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer

from streams.errors import SidstreamError
from trainer.alignment.losses import LOSSES, DynamicBeta, gaps
from trainer.alignment.rows import PreferenceRow, collate
from trainer.alignment.scores import Head, heads_of
from trainer.alignment.stop_rules import Watch
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline.probe import Probe
from trainer.sequences.rows import TrainingRows
from trainer.settings import DpoSettings, TrainerSettings
from trainer.tuning.next_item import LogReplay

# Steps between looks at the chosen SID's log-probability.
_LOOK = 5
_PINNED = "install trl>=1.16,<1.17"


@dataclass(frozen=True)
class DpoResult:
    """What the stage did; `drop` is in nats below the reference, `margin` in beta-scaled reward."""

    pairs: int
    rejected: int
    steps: int
    kept: int  # the step whose weights are kept; 0: those that the stage began with
    seconds: float
    loss: float
    margin: float
    accuracy: float
    drop: float
    beta: float  # of the last look: it moves where it is dynamic
    stopped: str
    # A point for each look: step, loss, margin, accuracy, drop, and what a probe found.
    curve: list[dict[str, float]] = field(default_factory=list)

    def failed(self, max_drop: float) -> str | None:
        """Why a stop rule leaves nothing to be used; None: there is something."""
        return self.stopped if self.drop > max_drop or not self.kept else None


class _PreferenceTrainer(DPOTrainer):
    """DPOTrainer with losses over 1 + K answers, for rows that are token ids already."""

    def __init__(self, dpo: DpoSettings, replay: LogReplay | None, **given: Any) -> None:
        super().__init__(**given)
        self.dpo, self.replay = dpo, replay
        self.dynamic = DynamicBeta(
            dpo.beta, dpo.beta_scale, dpo.beta_momentum, dpo.left_out, gather=self.accelerator.gather
        )
        self.draws = torch.Generator().manual_seed(self.args.seed)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        heads = heads_of(self._asked(model), inputs)
        with torch.no_grad():
            before = self._reference(model, inputs)
        dpo, beta, kept = self.dpo, self.dpo.beta, torch.ones(len(inputs["real"]), dtype=torch.bool)
        kept = kept.to(inputs["real"].device)
        pulls = [_margins(head, held) for head, held in zip(heads, before, strict=False)]
        if dpo.dynamic_beta:
            beta, kept = self.dynamic(gaps(pulls[0], heads[0].real), model.training, self.draws)
        loss = torch.zeros((), device=kept.device)
        for head, pull in zip(heads, pulls, strict=True):
            used = kept & head.real.any(-1)
            if bool(used.any()):
                loss = loss + dpo.weight * LOSSES[dpo.loss](pull[used], head.real[used], beta).mean()
            loss = loss + dpo.sft_weight * head.nll
        if self.replay is not None and model.training:
            loss = loss + dpo.replay_weight * self.replay.loss(self.accelerator.unwrap_model(model))
        self._note(heads[0], before[0], pulls[0], beta, model.training)
        return (loss, None) if return_outputs else loss

    def _asked(self, model: Any) -> Any:
        inner = self.accelerator.unwrap_model(model)
        return inner if isinstance(inner, GeneratorForCausalLM) else model

    def _reference(self, model: Any, inputs: dict[str, Tensor]) -> list[Head]:
        if self.ref_model is not None:
            return heads_of(self.accelerator.unwrap_model(self.ref_model), inputs, with_nll=False)
        inner = self.accelerator.unwrap_model(model)
        with inner.disable_adapter() if isinstance(inner, PeftModel) else nullcontext():
            return heads_of(model, inputs, with_nll=False)

    def _note(self, head: Head, before: Head, pull: Tensor, beta: float, training: bool) -> None:
        """What TRL averages over the steps between two looks."""
        real, risen = head.real, head.scores[0].detach() - before.scores[0]
        noted = {
            "risen": risen, "margin": gaps(pull.detach(), real),
            "accuracy": ((pull > 0) & real).sum(-1) / real.sum(-1), "logps/chosen": head.scores[0].detach(),
        }  # fmt: skip
        metrics = self._metrics["train" if training else "eval"]
        for name, values in noted.items():
            metrics[name].append(float(self.accelerator.gather(values.float()).mean()))
        metrics["beta"].append(beta)


def _margins(head: Head, before: Head) -> Tensor:
    """(B, K): how much more the chosen answer has risen over the reference than each rejected one."""
    risen = head.scores - before.scores
    return (risen[0] - risen[1:]).T


def check_trl(trainer: type[DPOTrainer] = DPOTrainer) -> None:
    """Raise SidstreamError where TRL's internals are not those that this module was written for."""
    try:
        made = inspect.getsource(trainer.__init__)
        columns = inspect.getsource(trainer._set_signature_columns_if_needed)
        caller = inspect.getsource(trainer.compute_loss)
        logged = inspect.getsource(trainer.log)
        prepared = list(inspect.signature(trainer._prepare_dataset).parameters)
        computed = list(inspect.signature(trainer._compute_loss).parameters)
    except AttributeError as error:
        raise SidstreamError(f"this TRL has no DPOTrainer.{error.name}: {_PINNED}") from error
    for wanted, text in (
        ("self._prepare_dataset(train_dataset", made), ('"prompt_ids"', columns), ('"chosen_ids"', columns),
        ('"rejected_ids"', columns), ("self._compute_loss(", caller), ("self._metrics[mode]", logged),
    ):  # fmt: skip
        if wanted not in text:
            raise SidstreamError(f"this TRL's DPOTrainer does not use {wanted}: {_PINNED}")
    for name, found, expected in (
        ("_prepare_dataset", prepared[:2], ["self", "dataset"]),
        ("_compute_loss", computed, ["self", "model", "inputs", "return_outputs"]),
    ):
        if found != expected:
            raise SidstreamError(f"this TRL's DPOTrainer.{name} has other arguments: {_PINNED}")


def align(
    model: GeneratorForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PreferenceRow],
    settings: TrainerSettings,
    folder: Path,
    *,
    sequences: TrainingRows | None = None,
    probe: Probe | None = None,
    progress: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[GeneratorForCausalLM, DpoResult]:
    """A copy of `model` aligned to rows of token ids, in full; `model` itself is the frozen reference.

    `folder` is where TRL may keep files; `sequences` are what the model was fine-tuned on, whose next-item
    loss joins at `dpo.replay_weight` and keeps the clicks; `probe` looks at the policy every
    `dpo.probe_steps`. Where a stop rule ends the stage, the weights are those of the last look that passed.
    Raises SidstreamError when there are no rows.
    """
    policy, reference = copy.deepcopy(model).float(), copy.deepcopy(model).float().eval()
    # Not a part of the preference: dropped items would move the policy alone.
    policy.model.items.item_dropout = 0.0
    replay = LogReplay(policy, sequences) if sequences is not None and settings.dpo.replay_weight else None
    _, result = _run(
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
    probe: Probe | None = None,
    progress: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[Any, DpoResult]:
    """A causal LM aligned to rows in its own token ids: by `adapters`, which are merged, or in full (None).

    `model` is used up where there are adapters, and stays as it is without them. Otherwise as `align`.
    """
    policy = model if adapters is not None else copy.deepcopy(model)
    reference = None if adapters is not None else copy.deepcopy(model).eval()
    made, result = _run(
        policy, reference, tokenizer, rows, settings, folder, probe, progress, stop, adapters, None
    )
    return (made.merge_and_unload() if adapters is not None else made).cpu().eval(), result


def _run(
    policy: Any, reference: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PreferenceRow],
    settings: TrainerSettings, folder: Path, probe: Probe | None, progress: Callable[[str], None] | None,
    stop: Callable[[], bool] | None, adapters: PeftConfig | None, replay: LogReplay | None,
) -> tuple[Any, DpoResult]:  # fmt: skip
    """The model as TRL trained it (with its adapters, where there are any), and what the stage did."""
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
        gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), lr_scheduler_type="cosine",
        # The rate of the first of them is 0: a stage of a few steps has none.
        warmup_steps=steps // 10, max_grad_norm=1.0, logging_steps=_LOOK, save_strategy="no",
        report_to="none", disable_tqdm=True, log_level="error", dataloader_pin_memory=False,
    )  # fmt: skip
    # Where a machine has several GPUs, transformers would copy the model to all of them in every step.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    watch = Watch(dpo, probe, progress, stop)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with _Quiet():
        trainer = _PreferenceTrainer(
            dpo, replay, model=policy, ref_model=reference, args=arguments,
            train_dataset=Dataset.from_list([dict(row) for row in rows]), processing_class=tokenizer,
            data_collator=lambda batch: collate(batch, pad), callbacks=[watch], peft_config=adapters,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        watch.begin(trainer.model)
        began = time.monotonic()
        outcome = trainer.train()
        watch.end(trainer.model, outcome.global_step)
    return trainer.model, DpoResult(
        pairs=len(rows), rejected=sum(len(row["rejected_ids"]) for row in rows), steps=outcome.global_step,
        kept=watch.kept(outcome.global_step), seconds=time.monotonic() - began,
        loss=float(outcome.training_loss), margin=watch.margin,
        accuracy=watch.last.get("accuracy", 0.0), drop=watch.drop, beta=watch.last.get("beta", dpo.beta),
        stopped=watch.stopped, curve=watch.curve,
    )  # fmt: skip


class _Quiet:
    """Transformers and TRL say nothing while this is entered."""

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
