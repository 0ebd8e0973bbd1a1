"""SASRec (Kang and McAuley 2018, arXiv 1808.09781) with either of the two losses that mend it.

The original's sampled binary loss is why it stands low in many tables. With a softmax over the whole
catalogue it passes most generative models (Klenitskiy and Vasilev 2023, arXiv 2309.07602); with sampled
negatives and gBCE it is gSASRec (Petrov and Macdonald 2023, arXiv 2308.07192).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.baselines.gbce import gbce_loss
from trainer.evaluation.ranker import Mask, Progress, rank_in_chunks
from trainer.evaluation.sequences import Int64
from trainer.evaluation.splits import EvaluationSplit
from trainer.evaluation.validation import VALIDATION_USERS, best_rule_ndcg, validation_targets
from trainer.sequences.held_out import HeldOut
from trainer.settings import Arithmetic
from trainer.tuning.devices import device, training_arithmetic
from trainer.tuning.losses import softmax_loss
from trainer.tuning.sft import learning_rate_share

_CLIP = 5.0


@dataclass(frozen=True)
class SasRecSettings:
    """Shape and training. `loss`: "softmax" over all items, or "gbce" (`trainer.baselines.gbce`).

    `samples`: what one row of a batch teaches.

    "position": the next item at every position of a sequence, as in the paper; "prefix": every prefix is a
    row of its own with one target, which costs more and gives more on short histories.
    """

    loss: Literal["softmax", "gbce"] = "softmax"
    negatives: int = 256  # of gbce, for each row; the paper's
    calibration: float = 0.75  # t of gbce, the paper's
    samples: Literal["position", "prefix"] = "position"
    width: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.5
    lr: float = 1e-3  # the peak of the schedule
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: the one of SFT, over the budget
    length: int = 50  # items of a history, the newest kept
    batch: int = 128  # rows of a step; twice as many prefixes, which have one target each
    epochs: int = 200
    patience: int = 10  # epochs without a better NDCG@10 before it stops
    cpu_seconds: float | None = None  # budget of `fit`, of this process on the processor
    arithmetic: Arithmetic = "auto"  # of matrix products


class _Layer(nn.Module):
    """Causal attention and a feed-forward part, each after a layer norm and beside a residual."""

    def __init__(self, settings: SasRecSettings) -> None:
        super().__init__()
        width = settings.width
        self.heads, self.drop = settings.heads, settings.dropout
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.before(x)).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.drop if self.training else 0.0
        )
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(rows, length, width)))
        inner = self.dropout(F.relu(self.up(self.between(x))))
        return x + self.dropout(self.down(inner))


class Network(nn.Module):
    """Histories (B, T) int64, padded with -1 on the right, -> states (B, T, width)."""

    def __init__(self, items: int, settings: SasRecSettings) -> None:
        super().__init__()
        self.items = nn.Embedding(items, settings.width)
        self.places = nn.Embedding(settings.length, settings.width)  # counted from the newest item
        self.dropout = nn.Dropout(settings.dropout)
        self.layers = nn.ModuleList(_Layer(settings) for _ in range(settings.layers))
        self.last = nn.LayerNorm(settings.width)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
            if isinstance(part, nn.Linear):
                nn.init.zeros_(part.bias)

    def forward(self, rows: Tensor) -> Tensor:
        real = rows >= 0
        # Padding comes after the items, where causal attention does not look.
        place = (real.sum(1, keepdim=True) - 1 - torch.arange(rows.shape[1], device=rows.device)).clamp(min=0)
        scale = self.items.embedding_dim**0.5
        x = self.dropout(self.items(rows.clamp(min=0)) * scale + self.places(place))
        for layer in self.layers:
            x = layer(x)
        states: Tensor = self.last(x)
        return states


class SasRec:
    """Fitted with early stopping on validation NDCG@10 over all items; the best weights are kept."""

    def __init__(self, settings: SasRecSettings | None = None) -> None:
        self.settings = settings or SasRecSettings()
        self.name = "sasrec" if self.settings.loss == "softmax" else "gsasrec"
        self.head = "softmax over items" if self.settings.loss == "softmax" else "gBCE"
        self.validation_ndcg = 0.0  # of the weights that were kept

    def fit(self, split: EvaluationSplit, seed: int, progress: Progress) -> None:
        """Train until validation stops it, `epochs` are over or `cpu_seconds` are spent."""
        started, settings = time.process_time(), self.settings
        torch.manual_seed(seed)
        self._popular = split.train_counts()
        self._network = Network(split.dataset.size, settings).to(device())
        self.parameters = sum(part.numel() for part in self._network.parameters())
        self.optimizer = torch.optim.Adam(self._network.parameters(), lr=settings.lr, betas=(0.9, 0.98))
        targets = validation_targets(split, VALIDATION_USERS, seed, settings.length)
        best_ndcg, epochs_without_gain, best_weights = -1.0, 0, None
        for epoch in range(settings.epochs):
            loss = self._train_epoch(split, seed, epoch, started)
            ndcg = self.ndcg(targets)
            epochs_without_gain = 0 if ndcg > best_ndcg else epochs_without_gain + 1
            # Of equals the later one, as in SFT.
            if ndcg >= best_ndcg:
                best_ndcg = ndcg
                best_weights = {name: part.clone() for name, part in self._network.state_dict().items()}
            spent = time.process_time() - started
            progress(
                f"epoch {epoch + 1}, loss {loss:.3f}, validation NDCG@10 {ndcg:.4f}, best {best_ndcg:.4f}, "
                f"{spent:.0f} s"
            )
            if epochs_without_gain >= settings.patience or (
                settings.cpu_seconds and spent > settings.cpu_seconds
            ):
                break
        if best_weights is not None:
            self._network.load_state_dict(best_weights)
            self.validation_ndcg = best_ndcg

    def _train_epoch(self, split: EvaluationSplit, seed: int, epoch: int, started: float) -> float:
        """Steps until the epoch or the budget is over -> the mean loss."""
        settings, target_device = self.settings, self._network.items.weight.device
        self._network.train()
        total, batches = torch.zeros((), device=target_device), 0
        for done, rows, targets in training_batches(split.train, settings, seed, epoch):
            spent = (time.process_time() - started) / settings.cpu_seconds if settings.cpu_seconds else 0.0
            if spent > 1 and batches:
                break
            share = 1.0
            if settings.schedule == "cosine":
                share = learning_rate_share(max(spent, (epoch + done) / settings.epochs))
            for group in self.optimizer.param_groups:
                group["lr"] = settings.lr * share
            with training_arithmetic(settings.arithmetic, target_device):
                loss = self._loss(rows.to(target_device), targets.to(target_device))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self._network.parameters(), _CLIP)
            self.optimizer.step()
            total += loss.detach()
            batches += 1
        return float(total) / max(batches, 1)

    def _loss(self, rows: Tensor, targets: Tensor) -> Tensor:
        """The loss of rows and targets (B, T)."""
        states, items, settings = self._network(rows), self._network.items.weight, self.settings
        if settings.loss == "gbce":
            return gbce_loss(states, items, targets, settings.negatives, settings.calibration)
        has_target = targets >= 0
        return softmax_loss(states[has_target], items, targets[has_target])

    def rank(self, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """(B, k) items by the newest state times their vectors; popular ones for an empty history."""

        def score(rows: Sequence[Int64]) -> npt.NDArray[np.float32]:
            scores = self._score(rows).cpu().numpy()
            for row, history in enumerate(rows):
                if not len(history):
                    scores[row] = self._popular
            return scores

        return rank_in_chunks(score, histories, k, mask)

    @torch.no_grad()
    def _score(self, histories: Sequence[Int64]) -> Tensor:
        """(B, I) float32; nothing that means anything for an empty history."""
        self._network.eval()
        target_device = self._network.items.weight.device
        lengths = torch.tensor([max(1, min(len(row), self.settings.length)) for row in histories])
        rows = torch.full((len(histories), int(lengths.max())), -1)
        for row, history in enumerate(histories):
            newest = history[-self.settings.length :]
            rows[row, : len(newest)] = torch.from_numpy(newest)
        with training_arithmetic(self.settings.arithmetic, target_device):
            states = self._network(rows.to(target_device))
            newest_states = states[torch.arange(len(rows)), lengths.to(target_device) - 1]
        return newest_states.float() @ self._network.items.weight.T

    def ndcg(self, targets: HeldOut) -> float:
        """NDCG@10 over all items, under the best repeat rule; 0 without any targets."""
        return best_rule_ndcg(self._score, targets)


def training_batches(
    train: Sequence[Int64], settings: SasRecSettings, seed: int, epoch: int
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """One epoch: the share of it that is done, rows and targets (B, T) int64, -1 where there is none.

    Alike lengths share a batch.
    """
    random = np.random.default_rng((seed, epoch))
    everywhere = settings.samples == "position"
    cutting = _windows(train, settings.length, random) if everywhere else _prefixes(train, settings.length)
    samples = list(cutting)
    size = settings.batch if everywhere else 2 * settings.batch
    lengths = np.array([end - begin for _, begin, end in samples], np.int64)
    order = np.lexsort((random.random(len(samples)), lengths))
    cuts = [order[low : low + size] for low in range(0, len(order), size)]
    for number, cut in enumerate(random.permutation(len(cuts))):
        taken = [samples[n] for n in cuts[cut]]
        longest = max(end - begin for _, begin, end in taken)
        rows = np.full((len(taken), longest), -1, np.int64)
        targets = np.full((len(taken), longest), -1, np.int64)
        for row, (user, begin, end) in enumerate(taken):
            rows[row, : end - begin] = train[user][begin:end]
            if everywhere:
                targets[row, : end - begin] = train[user][begin + 1 : end + 1]
            else:
                targets[row, end - begin - 1] = train[user][end]
        yield number / len(cuts), torch.from_numpy(rows), torch.from_numpy(targets)


def _windows(
    train: Sequence[Int64], length: int, random: np.random.Generator
) -> Iterator[tuple[int, int, int]]:
    """(user, begin, end) of inputs that together have every event but a user's first as a target once.

    A sequence longer than `length` is cut at places that differ from epoch to epoch.
    """
    for user, items in enumerate(train):
        inputs = len(items) - 1
        first = int(random.integers(1, length + 1)) if inputs > length else length
        begin, end = 0, min(first, inputs)
        while begin < inputs:
            yield user, begin, end
            begin, end = end, min(end + length, inputs)


def _prefixes(train: Sequence[Int64], length: int) -> Iterator[tuple[int, int, int]]:
    """(user, begin, end) of inputs whose target is the event at `end`."""
    for user, items in enumerate(train):
        for end in range(1, len(items)):
            yield user, max(0, end - length), end
