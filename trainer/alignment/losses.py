"""Preference losses on margins: DPO, Softmax-DPO with K rejected answers, and a beta that follows the batch.

With Delta(y) = log pi(y|x) - log pi_ref(y|x), summed over the tokens of y, the margin of a rejected answer is
Delta(chosen) - Delta(rejected). All losses are functions of margins, so they hold for any model
that gives an answer's log-probability: for a SID spelled code by code, an item scored at once, or text.

Tokens that chosen and rejected share at their beginning cancel in a margin, in value and in gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.sequences.batches import to_device


def softmax_dpo(margins: Tensor, real: Tensor, beta: float | Tensor) -> Tensor:
    """Softmax-DPO (Chen et al. 2024, arXiv 2406.09215, equation 8) of each pair: (B,).

    -log sigmoid(-log sum_k exp(-beta margin_k)), which is the cross-entropy of the chosen answer among 1 + K
    with logits beta Delta. margins (B, K) float; real (B, K) bool, False where a row has fewer than K; at
    least one is real. Finite at any finite margin: published code that exponentiates before it sums is not.
    """
    hardest = (-beta * margins).masked_fill(~real, -torch.inf).logsumexp(-1)
    return F.softplus(hardest)


def mean_dpo(margins: Tensor, real: Tensor, beta: float | Tensor) -> Tensor:
    """DPO (Rafailov et al. 2023, equation 7), averaged over a pair's rejected answers: (B,).

    margins (B, K) float, real (B, K) bool, at least one of a row.
    """
    losses = -F.logsigmoid(beta * margins.masked_fill(~real, 0.0))
    return (losses * real).sum(-1) / real.sum(-1)


LOSSES: dict[str, Callable[[Tensor, Tensor, float | Tensor], Tensor]] = {
    "dpo": mean_dpo, "softmax_dpo": softmax_dpo
}  # fmt: skip


def mean_margins(margins: Tensor, real: Tensor) -> Tensor:
    """The mean margin (B,) of each pair over its rejected answers: the gap of `DynamicBeta`."""
    return (margins * real).sum(-1) / real.sum(-1)


class BatchBeta(NamedTuple):
    """The beta of a batch, and the pairs that are trained on."""

    beta: Tensor  # () float
    selected: Tensor  # (B,) bool


def _single_device(values: Tensor) -> Tensor:
    return values


@dataclass
class DynamicBeta:
    """beta-DPO (Wu et al. 2024, arXiv 2407.08639): beta follows a batch's mean gap, outliers are left out.

    beta = base (1 + scale (mean gap of the kept pairs - running mean gap)), equation 8; pairs are drawn with
    weights exp(-(gap - running mean)^2 / (2 running deviation^2)), equation 9, without replacement.

    Four things that the published code does not do: running means are corrected for their start at 0 (Kingma
    and Ba 2015, section 3), they stand still in evaluation, they are those of all devices' batches together,
    and beta is bounded.
    """

    base: float
    scale: float = 0.6
    momentum: float = 0.9
    outlier_share: float = 0.2  # share of a batch
    warm_steps: int = 20  # in these first steps nothing is left out: the deviation is not yet estimated well
    bound: float = 10.0  # beta stays within base / bound and base * bound
    gather: Callable[[Tensor], Tensor] = field(default=_single_device, repr=False)
    # Numbers, or tensors () on the device of the gaps: the host would wait for a GPU to tell them.
    _mean: float | Tensor = field(default=0.0, init=False)
    _deviation: float | Tensor = field(default=0.0, init=False)
    _steps: int = field(default=0, init=False)

    @property
    def mean(self) -> float:
        """The running mean of gaps; 0 before the first batch."""
        return float(self._corrected(self._mean))

    @property
    def deviation(self) -> float:
        """The running standard deviation of a batch's gaps; 0 before the first batch."""
        return float(self._corrected(self._deviation))

    def _corrected(self, average: float | Tensor) -> float | Tensor:
        return average / (1 - self.momentum**self._steps) if self._steps else average

    def __call__(self, gap: Tensor, training: bool, generator: torch.Generator | None = None) -> BatchBeta:
        """The beta of a batch with gaps (B,), and which of its pairs are kept.

        In training the running figures are updated first; in evaluation they stay, and every pair is kept.
        `generator` draws the pairs that are kept.
        """
        gap = gap.detach().float()
        all_pairs = torch.ones_like(gap, dtype=torch.bool)
        if not training:
            return BatchBeta(self._bounded_beta(self.gather(gap).mean()), all_pairs)
        all_gaps = self.gather(gap)
        self._steps += 1
        new_share = 1 - self.momentum
        self._mean = self.momentum * self._mean + new_share * all_gaps.mean()
        self._deviation = self.momentum * self._deviation + new_share * all_gaps.std(correction=0)
        selected = all_pairs if self._steps <= self.warm_steps else self._select_pairs(gap, generator)
        # Sums and counts are gathered, not means, since devices may keep different numbers of pairs.
        sums = self.gather(torch.stack(((gap * selected).sum(), selected.sum().float()))[None]).sum(0)
        return BatchBeta(self._bounded_beta(sums[0] / sums[1]), selected)

    def state(self) -> dict[str, float]:
        """The running means, for a checkpoint."""
        return {"mean": float(self._mean), "deviation": float(self._deviation), "steps": self._steps}

    def restore(self, state: Mapping[str, float]) -> None:
        """Put back what `state` gave."""
        self._mean, self._deviation = state["mean"], state["deviation"]
        self._steps = int(state["steps"])

    def _select_pairs(self, gap: Tensor, generator: torch.Generator | None) -> Tensor:
        count = max(1, round((1 - self.outlier_share) * len(gap)))
        deviation = torch.as_tensor(self._corrected(self._deviation)).clamp(min=1e-6)
        weights = -0.5 * ((gap - self._corrected(self._mean)) / deviation).square()
        # The largest weights with Gumbel noise are a draw without replacement (Efraimidis and Spirakis 2006).
        # The noise is the host's, so that a draw is the same on any device.
        noise = torch.rand(len(gap), generator=generator).clamp(min=1e-30).log().neg().log().neg()
        best = (weights + to_device(noise, gap.device)).topk(count).indices
        return torch.zeros_like(gap).scatter(0, best, 1.0).bool()

    def _bounded_beta(self, gap: Tensor) -> Tensor:
        beta = self.base * (1 + self.scale * (gap - self._corrected(self._mean)))
        return beta.clamp(self.base / self.bound, self.base * self.bound)
