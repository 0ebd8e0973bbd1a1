"""Preference alignment: DPO on the window's pairs with TRL, jointly with the chosen SID's next-token loss.

Plain DPO on SIDs has been published as harmful: the next-token term holds the chosen SID up, one epoch is
all, and the stage stops when the chosen SID's log-probability has fallen by a nat below the reference.
"""

from __future__ import annotations

import copy
import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer

from registry.context import Attributes, Context, told
from registry.prompt import BOS, Prompt, prompt_sids
from streams.errors import SidstreamError
from streams.events import PreferencePair
from trainer.dense_preference import dense_preference_loss
from trainer.generator import GeneratorForCausalLM
from trainer.settings import DpoSettings, TrainerSettings

# Steps between looks at the chosen SID's log-probability.
_LOOK = 5


@dataclass(frozen=True)
class DpoResult:
    """What the stage did; `drop` is in nats below the reference, `margin` in beta-scaled reward."""

    pairs: int
    rows: int
    steps: int
    seconds: float
    loss: float
    margin: float
    accuracy: float
    drop: float
    stopped: str
    # A point for each look: step, loss, margin, accuracy and drop.
    curve: list[dict[str, float]] = field(default_factory=list)


def preference_rows(
    pairs: Sequence[PreferencePair], codebook: str, prompt: Prompt, settings: DpoSettings,
    context: Context | None = None, profiles: Mapping[str, Attributes] | None = None,
) -> tuple[list[dict[str, list[int]]], int]:  # fmt: skip
    """Rows of token ids for TRL, and how many pairs they come from.

    The newest `max_pairs` pairs of this codebook and the wanted schemes; one row a rejected SID, up to
    `max_rejected`. A pair that repeats, or whose codes are not of this codebook, is left out. After the items
    of a prompt stand the tokens of `context` for the pair's scene and its user's profile.
    """
    seen: set[str] = set()
    used = []
    for pair in sorted(pairs, key=lambda pair: (pair.ts, pair.event_id), reverse=True):
        if pair.event_id in seen or pair.codebook != codebook or pair.scheme not in settings.schemes:
            continue
        seen.add(pair.event_id)
        used.append(pair)
        if len(used) == settings.max_pairs:
            break
    rows = []
    count = 0
    for pair in reversed(used):
        trigger = tuple(pair.trigger) if pair.trigger is not None else None
        # Rows are as long as their prompts, and the last items say most: a short prompt is a fast stage.
        length = min(settings.max_items, prompt.max_items)
        shown = prompt_sids([tuple(sid) for sid in pair.history], trigger, length)
        rejected = [sid for sid in dict.fromkeys(map(tuple, pair.rejected)) if sid != tuple(pair.chosen)]
        try:
            ids = [BOS, *(token for sid in shown for token in prompt.tokens(sid))]
            said = told(pair.scene, (profiles or {}).get(pair.user_id))
            ids += [token for token in (context or Context()).row(said) if token]
            chosen = prompt.tokens(pair.chosen)
            answers = [prompt.tokens(sid) for sid in rejected[: settings.max_rejected]]
        except SidstreamError:
            continue
        count += bool(answers)
        rows += [{"prompt_ids": ids, "chosen_ids": chosen, "rejected_ids": answer} for answer in answers]
    return rows, count


class _TokenDpoTrainer(DPOTrainer):
    """DPOTrainer for rows that are token ids already (TRL 1.16 tokenizes text only), and for both heads."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        made = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        weight, sft_weight = self.args.loss_weights
        dense = dense_preference_loss(
            self.accelerator.unwrap_model(model), self.accelerator.unwrap_model(self.ref_model),
            inputs["input_ids"], inputs["completion_mask"], self.args.beta, weight, sft_weight,
        )  # fmt: skip
        return (made[0] + dense, made[1]) if return_outputs else made + dense

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


class _Watch(TrainerCallback):
    """Reads TRL's own metrics: progress, the time budget, and the fall of the chosen log-probability."""

    def __init__(self, settings: DpoSettings, progress: Callable[[str], None] | None,
                 stop: Callable[[], bool] | None) -> None:  # fmt: skip
        self.settings, self.progress, self.stop = settings, progress, stop
        self.began = time.monotonic()
        self.last: dict[str, float] = {}
        self.drop = 0.0
        self.curve: list[dict[str, float]] = []
        self.stopped = "all pairs seen"

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kw: Any
    ) -> None:
        if not logs or "rewards/chosen" not in logs:
            return
        self.last = {key: float(value) for key, value in logs.items()}
        # rewards/chosen is beta times (policy minus reference) of the chosen SID's log-probability.
        if self.progress:
            margin = self.last["rewards/margins"]
            self.progress(f"step {state.global_step} of {state.max_steps}, margin {margin:.3f}")
        self.drop = -self.last["rewards/chosen"] / self.settings.beta
        # The last log of a run sums it up, and has no loss of its own.
        if "loss" in self.last:
            self.curve.append({
                "step": float(state.global_step), "loss": self.last["loss"], "drop": self.drop,
                "margin": self.last["rewards/margins"], "accuracy": self.last["rewards/accuracies"],
            })  # fmt: skip
        if self.drop > self.settings.max_drop:
            self.stopped = f"the chosen SID's log-probability fell {self.drop:.2f} nats below the reference"
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        budget = self.settings.max_seconds
        if budget is not None and time.monotonic() - self.began > budget:
            self.stopped = "time budget spent"
            control.should_training_stop = True
        if self.stop is not None and self.stop():
            self.stopped = "interrupted"
            control.should_training_stop = True


def check_trl(trainer: type[DPOTrainer] = DPOTrainer) -> None:
    """Raise SidstreamError where TRL's internals are not those that this module was written for."""
    try:
        source = inspect.getsource(trainer.__init__)
        columns = inspect.getsource(trainer._set_signature_columns_if_needed)
        parameters = list(inspect.signature(trainer._prepare_dataset).parameters)
    except AttributeError as error:
        raise SidstreamError(f"this TRL has no DPOTrainer.{error.name}: install trl>=1.16,<1.17") from error
    for wanted, text in (
        ("self._prepare_dataset(train_dataset", source), ('"prompt_ids"', columns),
        ('"chosen_ids"', columns), ('"rejected_ids"', columns),
    ):  # fmt: skip
        if wanted not in text:
            raise SidstreamError(f"this TRL's DPOTrainer does not use {wanted}: install trl>=1.16,<1.17")
    if parameters[:2] != ["self", "dataset"]:
        raise SidstreamError(
            "this TRL's DPOTrainer._prepare_dataset has other arguments: install trl>=1.16,<1.17"
        )


def align(
    model: GeneratorForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, list[int]]],
    settings: TrainerSettings,
    folder: Path,
    *,
    pairs: int = 0,
    progress: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[GeneratorForCausalLM, DpoResult]:
    """A copy of `model` aligned to `rows` of token ids; `model` itself is the frozen reference.

    `folder` is where TRL may keep files. Raises SidstreamError when there are no rows.
    """
    check_trl()
    if not rows:
        raise SidstreamError(
            "there are no preference rows to align to; check trainer.dpo.schemes and the codebook"
        )
    dpo = settings.dpo
    policy, reference = copy.deepcopy(model).float(), copy.deepcopy(model).float().eval()
    longest = max(len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in rows)
    arguments = DPOConfig(
        output_dir=str(folder), seed=settings.seed, num_train_epochs=dpo.epochs, learning_rate=dpo.lr,
        per_device_train_batch_size=dpo.batch, beta=dpo.beta, loss_type=["sigmoid", "sft"],
        loss_weights=[dpo.weight, dpo.sft_weight], max_length=longest, bf16=False,
        gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), lr_scheduler_type="cosine",
        warmup_steps=0.1, max_grad_norm=1.0, logging_steps=_LOOK, save_strategy="no", report_to="none",
        disable_tqdm=True, log_level="error", dataloader_pin_memory=False,
    )  # fmt: skip
    # Where a machine has several GPUs, transformers would copy the model to all of them in every step.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    watch = _Watch(dpo, progress, stop)
    with _Quiet():
        trainer = _TokenDpoTrainer(
            model=policy, ref_model=reference, args=arguments, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[watch],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        began = time.monotonic()
        outcome = trainer.train()
    seconds = time.monotonic() - began
    aligned = type(model)(model.config).eval()
    aligned.load_state_dict({name: value.cpu() for name, value in policy.state_dict().items()})
    return aligned, DpoResult(
        pairs=pairs or len(rows), rows=len(rows), steps=outcome.global_step, seconds=seconds,
        loss=float(outcome.training_loss), margin=watch.last.get("rewards/margins", 0.0),
        accuracy=watch.last.get("rewards/accuracies", 0.0), drop=watch.drop, stopped=watch.stopped,
        curve=watch.curve,
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
