"""Alignment judged by the preference pairs of validation users, which no model has learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.alignment.rows import PreferenceRow, collate_preferences
from trainer.alignment.scores import score_answers


@dataclass(frozen=True)
class HeldOutPairs:
    """Means over pairs of their shares of rejected answers."""

    pairs: int
    accuracy: float  # over which the chosen answer gained, as in the training's own figure of that name
    margin: float  # by how much it gained: nats, without beta
    ordered: float  # that the aligned model ranks below the chosen one
    ordered_before: float  # that the reference did

    def metrics(self) -> dict[str, float]:
        """Figures for the registry, by name."""
        return {
            "dpo/held_out_pairs": float(self.pairs), "dpo/held_out_pair_accuracy": self.accuracy,
            "dpo/held_out_pair_margin": self.margin, "dpo/held_out_pair_order": self.ordered,
            "dpo/held_out_pair_order_before": self.ordered_before,
        }  # fmt: skip

    def summary(self) -> str:
        """The figures in a few words."""
        return (
            f"of {self.pairs:,} held-out pairs accuracy {self.accuracy:.3f}, margin {self.margin:+.3f}, "
            f"in order {self.ordered_before:.3f} -> {self.ordered:.3f}"
        )


@torch.no_grad()
def judge_pairs(
    policy: Any, reference: Any, rows: Sequence[PreferenceRow], pad_id: int, dense_weight: float, batch: int
) -> HeldOutPairs:
    """How two models, in evaluation, score the answers of B >= 1 rows, `batch` at a time.

    The score is the one that orders what is served: (1 - dense_weight) of the SID's log-probability and
    dense_weight of the dense head's.
    """
    figures = []
    for low in range(0, len(rows), batch):
        inputs = collate_preferences(rows[low : low + batch], pad_id)
        real = inputs["real"].T
        before, after = (_served_scores(model.eval(), inputs, dense_weight) for model in (reference, policy))
        gains = after - before
        measures = (gains[0] > gains[1:], gains[0] - gains[1:], after[0] > after[1:], before[0] > before[1:])
        # (rows, measures): the mean of each over a row's own rejected answers.
        figures.append(torch.stack([(values * real).sum(0) / real.sum(0) for values in measures], dim=1))
    accuracy, margin, ordered, ordered_before = torch.cat(figures).double().mean(0).tolist()
    return HeldOutPairs(len(rows), accuracy, margin, ordered, ordered_before)


def _served_scores(model: Any, inputs: dict[str, Tensor], dense_weight: float) -> Tensor:
    """Scores (1 + K, B) of the answers; the SID's alone where the item table lacks an answer."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    heads = score_answers(model, inputs, with_nll=False)
    scores = heads[0].scores
    if len(heads) > 1:
        with_items = (heads[1].real == inputs["real"]).all(-1)
        mixed = (1 - dense_weight) * scores + dense_weight * heads[1].scores
        scores = torch.where(with_items, mixed, scores)
    return scores.float().cpu()
