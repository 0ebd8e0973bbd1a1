"""SASRec (Kang and McAuley 2018, arXiv 1808.09781) with a softmax over the whole catalogue as its loss.

The original's sampled binary loss is why it stands low in many tables; with the softmax it passes most
generative models (Klenitskiy and Vasilev 2023, arXiv 2309.07602).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.evaluation.ranker import CHUNK, Mask, Progress, rank_in_chunks
from trainer.evaluation.sequences import Int64
from trainer.evaluation.splits import EvaluationSplit, Queries
from trainer.settings import Arithmetic
from trainer.tuning.devices import device, training_arithmetic
from trainer.tuning.losses import softmax_loss

# Of more validation targets than this, as many are drawn: NDCG@10 then has a standard error near .002.
_VALIDATE = 10_000
_CLIP = 5.0


@dataclass(frozen=True)
class SasRecSettings:
    """Shape and training. `samples`: what one row of a batch teaches.

    "position": the next item at every position of a sequence, as in the paper; "prefix": every prefix is a
    row of its own with one target, which costs more and gives more on short histories.
    """

    samples: str = "position"
    width: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.5
    lr: float = 1e-3
    length: int = 50  # items of a history, the newest kept
    batch: int = 128  # rows of a step; twice as many prefixes, which have one target each
    epochs: int = 200
    patience: int = 10  # epochs without a better NDCG@10 before it stops
    max_seconds: float | None = None
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

    head = "softmax over items"

    def __init__(self, settings: SasRecSettings | None = None) -> None:
        self.settings = settings or SasRecSettings()
        self.name = "sasrec" if self.settings.samples == "position" else f"sasrec-{self.settings.samples}"

    def fit(self, split: EvaluationSplit, seed: int, progress: Progress) -> None:
        """Train until validation stops it, `epochs` are over or `max_seconds` are spent."""
        settings, target_device = self.settings, device()
        torch.manual_seed(seed)
        self._popular = split.train_counts()
        self._network = Network(split.dataset.size, settings).to(target_device)
        self.parameters = sum(part.numel() for part in self._network.parameters())
        optimizer = torch.optim.Adam(self._network.parameters(), lr=settings.lr, betas=(0.9, 0.98))
        started, best_ndcg, epochs_without_gain, best_weights = time.monotonic(), -1.0, 0, None
        for epoch in range(settings.epochs):
            self._network.train()
            total = torch.zeros((), device=target_device)
            batches = 0
            for rows, targets in training_batches(split.train, settings, seed, epoch):
                with training_arithmetic(settings.arithmetic, target_device):
                    states = self._network(rows.to(target_device))
                    has_target = targets >= 0
                    loss = softmax_loss(
                        states[has_target.to(target_device)],
                        self._network.items.weight,
                        targets[has_target].to(target_device),
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self._network.parameters(), _CLIP)
                optimizer.step()
                total += loss.detach()
                batches += 1
                if settings.max_seconds and time.monotonic() - started > settings.max_seconds:
                    break
            ndcg = self.ndcg(split.valid)
            if ndcg > best_ndcg or best_weights is None:
                best_ndcg, epochs_without_gain = ndcg, 0
                best_weights = {name: part.clone() for name, part in self._network.state_dict().items()}
            else:
                epochs_without_gain += 1
            spent = time.monotonic() - started
            progress(
                f"epoch {epoch + 1}, loss {float(total) / max(batches, 1):.3f}, validation NDCG@10 "
                f"{ndcg:.4f}, best {best_ndcg:.4f}, {spent:.0f} s"
            )
            if epochs_without_gain >= settings.patience or (
                settings.max_seconds and spent > settings.max_seconds
            ):
                break
        if best_weights is not None:
            self._network.load_state_dict(best_weights)

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

    def ndcg(self, queries: Queries) -> float:
        """NDCG@10 over all items; of a fixed draw where there are many targets. 0 without any."""
        if not len(queries):
            return 0.0
        drawn = np.random.default_rng(0).permutation(len(queries))[:_VALIDATE]
        # Alike lengths together: less padding.
        drawn = drawn[np.argsort([len(queries.histories[row]) for row in drawn], kind="stable")]
        gains = []
        for low in range(0, len(drawn), CHUNK):
            part = drawn[low : low + CHUNK]
            scores = self._score([queries.histories[row] for row in part])
            target = torch.from_numpy(queries.targets[part]).to(scores.device)
            rank = (scores > scores.gather(1, target[:, None])).sum(1)
            gains.append(torch.where(rank < 10, 1 / torch.log2(rank + 2.0), 0.0))
        return float(torch.cat(gains).mean())


def training_batches(
    train: Sequence[Int64], settings: SasRecSettings, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: rows and targets (B, T) int64, -1 where there is none; alike lengths share a batch."""
    random = np.random.default_rng((seed, epoch))
    everywhere = settings.samples == "position"
    cutting = _windows(train, settings.length, random) if everywhere else _prefixes(train, settings.length)
    samples = list(cutting)
    size = settings.batch if everywhere else 2 * settings.batch
    lengths = np.array([end - begin for _, begin, end in samples], np.int64)
    order = np.lexsort((random.random(len(samples)), lengths))
    cuts = [order[low : low + size] for low in range(0, len(order), size)]
    for cut in random.permutation(len(cuts)):
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
        yield torch.from_numpy(rows), torch.from_numpy(targets)


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
