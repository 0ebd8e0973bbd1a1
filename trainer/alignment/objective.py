"""What alignment minimises: the preference loss of every head, and the next-item losses beside it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from trainer.alignment.losses import LOSSES, DynamicBeta, mean_margins
from trainer.alignment.scores import HeadScores, score_answers
from trainer.settings import Arithmetic, DpoSettings
from trainer.tuning.next_item import LogReplay


class PreferenceObjective:
    """The loss of batches of `collate_preferences`, against a reference that stays.

    `reference`: None where adapters are trained, for then it is the model without them. `seed`
    draws the pairs that a dynamic beta keeps. Nothing here waits for a GPU.
    """

    def __init__(
        self, dpo: DpoSettings, reference: Any, replay: LogReplay | None, seed: int, arithmetic: Arithmetic
    ) -> None:
        self.dpo, self.reference, self.replay = dpo, reference, replay
        self.arithmetic = arithmetic
        self.dynamic = DynamicBeta(dpo.beta, dpo.beta_scale, dpo.beta_momentum, dpo.left_out)
        self.pair_generator = torch.Generator().manual_seed(seed)

    def __call__(self, policy: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (), and figures () of the batch, all on the batch's device."""
        dpo, training = self.dpo, policy.training
        heads = score_answers(policy, batch, arithmetic=self.arithmetic)
        with torch.no_grad():
            reference = self._reference_scores(policy, batch)
        margins = [_margins(head, before) for head, before in zip(heads, reference, strict=True)]
        selected = torch.ones(len(batch["real"]), dtype=torch.bool, device=batch["real"].device)
        beta: float | Tensor = dpo.beta
        if dpo.dynamic_beta:
            gap = mean_margins(margins[0], heads[0].real)
            beta, selected = self.dynamic(gap, training, self.pair_generator)
        loss = torch.zeros((), device=selected.device)
        for head, margin in zip(heads, margins, strict=True):
            loss = loss + dpo.weight * _mean_loss(margin, head.real, selected, dpo.loss, beta)
            loss = loss + dpo.sft_weight * head.nll
        if self.replay is not None and training:
            loss = loss + dpo.replay_weight * self.replay.loss(policy)
        return loss, self._figures(heads[0], reference[0], margins[0], beta)

    def _reference_scores(self, policy: Any, batch: dict[str, Tensor]) -> list[HeadScores]:
        if self.reference is not None:
            return score_answers(self.reference, batch, False, self.arithmetic)
        with policy.disable_adapter() if isinstance(policy, PeftModel) else nullcontext():
            return score_answers(policy, batch, False, self.arithmetic)

    def _figures(
        self, head: HeadScores, reference: HeadScores, margins: Tensor, beta: float | Tensor
    ) -> dict[str, Tensor]:
        real, chosen = head.real, head.scores[0].detach()
        measured = {
            "risen": chosen - reference.scores[0], "margin": mean_margins(margins.detach(), real),
            "accuracy": ((margins > 0) & real).sum(-1) / real.sum(-1), "logps/chosen": chosen,
        }  # fmt: skip
        figures = {name: values.float().mean() for name, values in measured.items()}
        # Filled, not copied: a number of the host would be waited for.
        return figures | {"beta": beta if isinstance(beta, Tensor) else torch.full_like(chosen[0], beta)}


def _margins(head: HeadScores, reference: HeadScores) -> Tensor:
    """Margins (B, K): the chosen answer's gain over the reference less each rejected answer's gain."""
    risen = head.scores - reference.scores
    return (risen[0] - risen[1:]).T


def _mean_loss(margins: Tensor, real: Tensor, selected: Tensor, loss: str, beta: float | Tensor) -> Tensor:
    """The mean loss () over the selected pairs (B,) that have a rejected answer; 0 where there are none."""
    counted = selected & real.any(-1)
    # A pair that does not count gets a margin of 0, since its loss must be finite to weigh nothing.
    left_out = ~counted[:, None]
    losses = LOSSES[loss](margins.masked_fill(left_out, 0.0), real | left_out, beta)
    return (losses * counted).sum() / counted.sum().clamp(min=1)
