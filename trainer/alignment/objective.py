"""What alignment minimises: the preference loss of every head, and the next-item losses beside it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from trainer.alignment.losses import LOSSES, DynamicBeta, mean_margins
from trainer.alignment.scores import HeadScores, score_answers
from trainer.settings import DpoSettings
from trainer.tuning.next_item import LogReplay


class PreferenceObjective:
    """The loss of batches of `collate_preferences`, against a reference that stays.

    `reference`: None where adapters are trained, for then it is the model without them. `seed` draws the
    pairs that a dynamic beta keeps.
    """

    def __init__(self, dpo: DpoSettings, reference: Any, replay: LogReplay | None, seed: int) -> None:
        self.dpo, self.reference, self.replay = dpo, reference, replay
        self.dynamic = DynamicBeta(dpo.beta, dpo.beta_scale, dpo.beta_momentum, dpo.left_out)
        self.pair_generator = torch.Generator().manual_seed(seed)

    def __call__(self, policy: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (), and figures () of the batch, all on the batch's device."""
        dpo = self.dpo
        heads = score_answers(policy, batch)
        with torch.no_grad():
            reference = self._reference_scores(policy, batch)
        margins = [_margins(head, before) for head, before in zip(heads, reference, strict=False)]
        selected = torch.ones(len(batch["real"]), dtype=torch.bool, device=batch["real"].device)
        beta = dpo.beta
        if dpo.dynamic_beta:
            gap = mean_margins(margins[0], heads[0].real)
            beta, selected = self.dynamic(gap, policy.training, self.pair_generator)
        loss = torch.zeros((), device=selected.device)
        for head, margin in zip(heads, margins, strict=True):
            counted = selected & head.real.any(-1)
            if bool(counted.any()):
                loss = loss + dpo.weight * LOSSES[dpo.loss](margin[counted], head.real[counted], beta).mean()
            loss = loss + dpo.sft_weight * head.nll
        if self.replay is not None and policy.training:
            loss = loss + dpo.replay_weight * self.replay.loss(policy)
        return loss, _figures(heads[0], reference[0], margins[0], beta)

    def _reference_scores(self, policy: Any, batch: dict[str, Tensor]) -> list[HeadScores]:
        if self.reference is not None:
            return score_answers(self.reference, batch, with_nll=False)
        with policy.disable_adapter() if isinstance(policy, PeftModel) else nullcontext():
            return score_answers(policy, batch, with_nll=False)


def _figures(head: HeadScores, reference: HeadScores, margins: Tensor, beta: float) -> dict[str, Tensor]:
    real, chosen = head.real, head.scores[0].detach()
    measured = {
        "risen": chosen - reference.scores[0], "margin": mean_margins(margins.detach(), real),
        "accuracy": ((margins > 0) & real).sum(-1) / real.sum(-1), "logps/chosen": chosen,
    }  # fmt: skip
    figures = {name: values.float().mean() for name, values in measured.items()}
    return figures | {"beta": torch.full_like(chosen[0], beta)}


def _margins(head: HeadScores, reference: HeadScores) -> Tensor:
    """Margins (B, K): the chosen answer's gain over the reference less each rejected answer's gain."""
    risen = head.scores - reference.scores
    return (risen[0] - risen[1:]).T
