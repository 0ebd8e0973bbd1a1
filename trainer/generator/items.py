"""The item table: what the generator has of an item beyond its SID, an own vector and its text.

An item's vector is the sum of its codes' embeddings, its own vector and the projection of its text's
embedding. The backbone reads this vector at the item's position, and the dense head scores it (LIGER, Yang et
al. 2024, arXiv 2411.18814). An item that was not in the training has an own vector of zeros, so that its
codes and its text alone represent it.

Shapes: I items, L levels, D width, T size of a text vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from registry.bundles.ranking import COUNT_STARTS, DISTANCE_STARTS
from streams.errors import SidstreamError
from trainer.generator.configuration import GeneratorConfig

# Keys are int64.
_MAX_SIDS = 2**62


class PastOccurrences(NamedTuple):
    """S items of each of N histories: how long ago each was there last, and how often."""

    last_distance: Tensor  # (N, S) int64, in items before the next one: 1 for the newest item of the history
    frequency: Tensor  # (N, S) int64, how often the history has the item, from 1


def _bucket(numbers: Tensor, starts: Sequence[int]) -> Tensor:
    """The bucket (...) of each number (...) from starts[0], where bucket b begins at starts[b]."""
    # Not bucketize: its bounds would be copied to a GPU in every step, and the host would wait for it.
    bucket = torch.zeros_like(numbers)
    for start in starts[1:]:
        bucket += numbers >= start
    return bucket


class ItemDropout(nn.Dropout):
    """Leaves a share p of the items without their own vector; the others are not scaled, as in serving."""

    def forward(self, own: Tensor) -> Tensor:
        """(I, D) -> (I, D), with rows of zeros in training."""
        if not self.training or not self.p:
            return own
        return own * (torch.rand(len(own), 1, device=own.device) >= self.p)


class ItemTable(nn.Module):
    """The items of which the generator has more than codes, by their SIDs."""

    keys: Tensor
    codes: Tensor
    text: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        count, width, text = config.num_items, config.hidden_size, config.text_size
        self.sizes, self.base = tuple(config.sizes), config.code_base
        slots = 1
        for size in self.sizes:
            slots *= size
        if slots > _MAX_SIDS:
            raise SidstreamError(
                f"a codebook of {self.sizes} has more SIDs than fit 62 bits: use fewer codes"
            )
        # One number for each item's SID, ascending, so that a row is found by bisection.
        self.register_buffer("keys", torch.zeros(count, dtype=torch.long))
        self.register_buffer("codes", torch.zeros(count, len(self.sizes), dtype=torch.long))
        self.register_buffer("text", torch.zeros(count, text))
        # Where own vectors are switched off, they stay zeros.
        self.has_own = config.item_vectors
        self.own = nn.Parameter(torch.zeros(count, width), requires_grad=self.has_own)
        self.text_proj = nn.Linear(text, width, bias=False) if text else None
        self.query_proj = nn.Linear(width, width, bias=False)
        # Stored weights have the names `again` and `strength`; the code reads them as `repeat_vectors` and
        # `repeat_strength`.
        self.again = nn.Parameter(torch.zeros(len(DISTANCE_STARTS) + len(COUNT_STARTS), width))
        self.strength = nn.Parameter(torch.ones(()), requires_grad=False)
        self.own_drop = ItemDropout(config.item_dropout)

    @property
    def repeat_vectors(self) -> nn.Parameter:
        """A vector for each bucket of an item's last distance, then one for each bucket of its frequency.

        Their products with a query are the repeat bias: what the dense head adds to the logit of an item that
        is in the user's history. Whether items are consumed repeatedly, and by whom, is learned, as in
        RepeatNet (Ren et al. 2019); distance and frequency are the factors of Anderson et al. (2014), "The
        dynamics of repeat consumption". Each bucket has a vector (buckets, D) and not a number: a number
        moves by one learning rate a step, which is too little in a whole training.
        """
        return self.again

    @property
    def repeat_strength(self) -> nn.Parameter:
        """The factor () of the repeat bias in rankings; trainer.offline_checks.repeat_bias fits it."""
        return self.strength

    def _key(self, codes: Tensor) -> Tensor:
        key = torch.zeros(codes.shape[:-1], dtype=torch.long, device=codes.device)
        start = self.base
        for level, size in enumerate(self.sizes):
            key = key * size + (codes[..., level] - start)
            start += size
        return key

    def rows(self, codes: Tensor) -> Tensor:
        """SIDs as token ids (..., L) -> rows of the table (...), -1 for items that are not in the table."""
        if not len(self.keys):
            return torch.full(codes.shape[:-1], -1, dtype=torch.long, device=codes.device)
        key = self._key(codes)
        at = torch.searchsorted(self.keys, key.contiguous()).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[at] == key, at, -1)

    @torch.no_grad()
    def set_items(self, codes: Tensor, text: Tensor | None) -> Tensor:
        """Make these the items of the table: codes (I, L) token ids, text (I, T) float32, None where T is 0.

        Returns the items' rows (I,) in the new table. An item that was in the table keeps its own vector; a
        new item's own vector is zeros.
        """
        before = self.rows(codes)
        key = self._key(codes)
        order = key.argsort()
        own = torch.zeros(len(codes), self.own.shape[1], device=self.own.device)
        own[before >= 0] = self.own[before[before >= 0]]
        self.keys, self.codes = key[order], codes[order].clone()
        self.own = nn.Parameter(own[order], requires_grad=self.has_own)
        self.text = (self.own.new_zeros(len(codes), 0) if text is None else text[order].clone()).float()
        rows = torch.empty_like(order)
        rows[order] = torch.arange(len(order), device=order.device)
        return rows

    def beyond_codes(self, rows: Tensor) -> Tensor:
        """Rows (...), -1 for none -> own vector plus projected text (..., D), zeros for -1."""
        is_known = (rows >= 0)[..., None]
        if not len(self.own):
            return self.own.new_zeros(*rows.shape, self.own.shape[1])
        at = rows.clamp(min=0)
        vectors = F.embedding(at, self.own)
        if self.text_proj is not None:
            vectors = vectors + self.text_proj(self.text[at])
        return vectors * is_known

    def repeat_bias(self, query: Tensor, occurrences: PastOccurrences, as_learned: bool = False) -> Tensor:
        """The addends (N, S) float32 to the logits of S items of each query's history; query (N, D).

        `as_learned`: without `repeat_strength`, as in the next-item loss.
        """
        by_bucket = (query @ self.repeat_vectors.to(query.dtype).T).float()
        distance = _bucket(occurrences.last_distance, DISTANCE_STARTS)
        frequency = len(DISTANCE_STARTS) + _bucket(occurrences.frequency, COUNT_STARTS)
        bias = by_bucket.gather(1, distance) + by_bucket.gather(1, frequency)
        return bias if as_learned else bias * self.repeat_strength

    def vectors(self, embeddings: Tensor) -> Tensor:
        """All items' vectors (I, D) from the token embeddings (V, D).

        In training a share `item_dropout` of the items is without its own vector, so that codes and text also
        learn to represent an item alone, as they must for a new item.
        """
        vectors: Tensor = self.own_drop(self.own) + F.embedding_bag(self.codes, embeddings, mode="sum")
        if self.text_proj is not None:
            vectors = vectors + self.text_proj(self.text)
        return vectors
