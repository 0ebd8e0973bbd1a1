"""Preference alignment: DPO, Softmax-DPO and beta-DPO, jointly with the chosen answer's own loss.

Plain DPO on SIDs has been published as harmful: the next-token term keeps the chosen SID likely, one epoch is
enough, and the stage stops where the chosen SID's log-probability, the hit rate on held-out users or the
share of real SIDs falls too far (`trainer.alignment.stop_rules`).

The same code aligns the generator, in full, and a Hugging Face causal LM, by LoRA: the losses need only the
log-probability of an answer (`trainer.alignment.scores`). The reference is the model that the stage
starts from; where adapters are trained, it is the model without them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from streams.errors import SidstreamError
from trainer.alignment.objective import PreferenceObjective
from trainer.alignment.rows import PreferenceRow, collate_preferences
from trainer.alignment.stop_rules import StopRules
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.probe import HeldOutProbe
from trainer.sequences.batches import to_device
from trainer.sequences.rows import TrainingRows
from trainer.settings import TrainerSettings
from trainer.tuning.checkpoint import seed_of
from trainer.tuning.devices import device
from trainer.tuning.next_item import LogReplay
from trainer.tuning.optimization import ClippedAdamW
from trainer.tuning.resumable import ALL_STEPS, INTERRUPTED, StepLoop

# Steps between two checks of the chosen SID's log-probability.
_STEPS_BETWEEN_LOGS = 5
# Share of the steps in which the rate rises to its peak.
_WARMUP = 0.1


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


def align(
    model: GeneratorForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PreferenceRow],
    settings: TrainerSettings,
    *,
    folder: Path | None = None,
    sequences: TrainingRows | None = None,
    probe: HeldOutProbe | None = None,
    progress: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[GeneratorForCausalLM, DpoResult]:
    """A copy of `model` aligned to rows of token ids, in full; `model` itself is the frozen reference.

    With `folder` a stage that was cut off goes on from its checkpoint there, in the very weights of an
    unbroken one where there is no time budget. `sequences` are the rows of the fine-tuning: their next-item
    loss is added with the weight `dpo.replay_weight`, so that clicks are not forgotten. `probe` measures the
    policy every `dpo.probe_steps`. Where a stop rule ends the stage, the weights are those of the last probe
    that passed.
    Raises SidstreamError when there are no rows.
    """
    policy, reference = copy.deepcopy(model).float(), copy.deepcopy(model).float().eval()
    replay = LogReplay(sequences) if sequences is not None and settings.dpo.replay_weight else None
    _, result = _train(policy, reference, tokenizer, rows, settings, folder, probe, progress, stop, replay)
    aligned = type(model)(model.config).eval()
    aligned.load_state_dict({name: value.cpu() for name, value in policy.state_dict().items()})
    return aligned, result


def align_language_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PreferenceRow],
    settings: TrainerSettings,
    adapters: PeftConfig | None,
    *,
    folder: Path | None = None,
    probe: HeldOutProbe | None = None,
    progress: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[Any, DpoResult]:
    """A causal LM aligned to rows in its own token ids: by `adapters`, which are merged, or in full (None).

    With adapters `model` itself is changed; without them it is copied first. Otherwise as `align`.
    """
    policy = model if adapters is not None else copy.deepcopy(model)
    reference = None if adapters is not None else copy.deepcopy(model).eval()
    if adapters is not None:
        torch.manual_seed(settings.seed)
        policy = get_peft_model(model, adapters)
    aligned, result = _train(
        policy, reference, tokenizer, rows, settings, folder, probe, progress, stop, None
    )
    return (aligned.merge_and_unload() if adapters is not None else aligned).cpu().eval(), result


def learning_rate_share(step: int, steps: int, spent: float) -> float:
    """Share of the peak rate in a step (from 0) of a stage: a linear rise, then half a cosine to 0.

    The cosine ends with the steps. Where the time budget, of which the share `spent` is gone, will end the
    stage before them, it ends with the budget: a budget that is large enough changes no rate, and no weight.
    """
    warmup = int(_WARMUP * steps)
    done = max(0.0, (step - warmup) / (steps - warmup))
    if spent > (step + 1) / steps:
        done = max(done, min(spent, 1.0))
    return min((step + 1) / (warmup + 1), 0.5 * (1 + math.cos(math.pi * done)))


def _batches(
    rows: Sequence[PreferenceRow], settings: TrainerSettings, pad_id: int, where: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The batches of all epochs; an epoch's order is drawn from its number."""
    for epoch in range(settings.dpo.epochs):
        generator = torch.Generator().manual_seed(seed_of(settings.seed, epoch))
        order = torch.randperm(len(rows), generator=generator).tolist()
        for low in range(0, len(order), settings.dpo.batch):
            chosen = [rows[at] for at in order[low : low + settings.dpo.batch]]
            yield {
                name: to_device(value, where) for name, value in collate_preferences(chosen, pad_id).items()
            }


class _Stage:
    """What a stage remembers beside weights and optimizer: its stop rules, beta, and figures."""

    def __init__(self, policy: Any, objective: PreferenceObjective, rules: StopRules, loop: StepLoop) -> None:
        self.policy, self.objective, self.rules, self.loop = policy, objective, rules, loop
        self.total_loss = 0.0  # of all steps up to the last log
        self._since_log: list[dict[str, Tensor]] = []
        loop.extra = self._tensors
        saved = loop.load()
        if saved is None:
            rules.begin(policy)
            return
        about, tensors = loop.state.about, saved.tensors
        rules.restore(about["rules"], tensors["kept"])
        objective.dynamic.restore(about["dynamic"])
        objective.pair_generator.set_state(tensors["stage"]["pair_generator"])
        self.total_loss = about["total_loss"]
        self._since_log = [
            {name: torch.tensor(value) for name, value in figures.items()} for figures in about["since_log"]
        ]
        if objective.replay is not None:
            objective.replay.skip(loop.state.step)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss () of a batch, whose figures are kept until the next log."""
        loss, figures = self.objective(self.policy, batch)
        self._since_log.append(figures | {"loss": loss.detach()})
        return loss

    def after_step(self, step: int) -> str | None:
        """Log where it is time to; why the stage ends, None: it goes on."""
        stopped = None
        if step % _STEPS_BETWEEN_LOGS == 0 or step == self.rules.steps:
            stopped = self._log(step)
        return stopped or self.rules.after_step(self.policy, step)

    def _log(self, step: int) -> str | None:
        names = self._since_log[0]
        mean = {
            name: float(torch.stack([figures[name].cpu() for figures in self._since_log]).mean())
            for name in names
        }
        self.total_loss += mean["loss"] * len(self._since_log)
        self._since_log = []
        return self.rules.after_log(step, mean)

    def mean_loss(self) -> float:
        """Over all steps."""
        total = self.total_loss + sum(float(figures["loss"]) for figures in self._since_log)
        return total / self.loop.state.step if self.loop.state.step else 0.0

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        self.loop.state.about = {
            "rules": self.rules.state(), "dynamic": self.objective.dynamic.state(),
            "total_loss": self.total_loss,
            "since_log": [
                {name: float(value) for name, value in figures.items()} for figures in self._since_log
            ],
        }  # fmt: skip
        generator = self.objective.pair_generator.get_state()
        return {"kept": self.rules.kept_weights, "stage": {"pair_generator": generator}}


def _train(
    policy: Any, reference: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PreferenceRow],
    settings: TrainerSettings, folder: Path | None, probe: HeldOutProbe | None,
    progress: Callable[[str], None] | None, stop: Callable[[], bool] | None, replay: LogReplay | None,
) -> tuple[Any, DpoResult]:  # fmt: skip
    """The trained policy, and the outcome of the stage."""
    if not rows:
        raise SidstreamError(
            "there are no preference rows to align to; check trainer.dpo.schemes and the codebook"
        )
    dpo, where = settings.dpo, device()
    steps = -(-len(rows) // dpo.batch) * dpo.epochs
    policy.to(where).train()
    if reference is not None:
        reference.to(where)
    optimizer = ClippedAdamW([value for value in policy.parameters() if value.requires_grad], lr=dpo.lr)
    loop = StepLoop(
        policy, optimizer, settings.seed, folder, settings.checkpoint_seconds, dpo.max_seconds, stop
    )
    rules = StopRules(dpo, probe, progress, steps)
    stage = _Stage(
        policy, PreferenceObjective(dpo, reference, replay, settings.seed, settings.arithmetic), rules, loop
    )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    state = loop.state
    loop.run(
        _batches(rows, settings, pad_id, where), stage.loss, after_step=stage.after_step,
        learning_rate=lambda spent: dpo.lr * learning_rate_share(state.step, steps, spent),
    )  # fmt: skip
    stopped = "all pairs seen" if state.stopped == ALL_STEPS else str(state.stopped)
    if state.stopped != INTERRUPTED:
        stopped = rules.end(policy, state.step) or stopped
    return policy, DpoResult(
        pairs=len(rows), rejected=sum(len(row["rejected_ids"]) for row in rows), steps=state.step,
        kept=rules.kept_step(state.step), seconds=state.seconds, loss=stage.mean_loss(),
        margin=rules.margin, accuracy=rules.last_log.get("accuracy", 0.0), drop=rules.drop,
        beta=rules.last_log.get("beta", dpo.beta), stopped=stopped, curve=rules.curve,
    )  # fmt: skip
