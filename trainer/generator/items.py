"""What the generator knows of an item beyond its SID: an own vector, and its text.

An item's vector is the sum of its codes' embeddings, its own vector and the projection of its text's
embedding. It is what the item looks like at the input, and what the dense head scores (LIGER, Yang et al.
2024, arXiv 2411.18814). An item that was never trained has no own vector: its codes and its text speak for
it.

Shapes: I items, L levels, D width, T size of a text vector.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streams.errors import SidstreamError
from trainer.generator.configuration import GeneratorConfig

# An item's last distance in the past, in items: 1, 2, 3 to 4, 5 to 8, ... and all beyond 64.
DISTANCES = 8
# How often it is there: once, twice, 3 to 4 times, 5 to 8, more.
COUNTS = 5
# Keys are int64.
_MAX_SIDS = 2**62


class PastOccurrences(NamedTuple):
    """Items of histories, each by its last place."""

    distance: Tensor  # (M,) int64 from what comes next, 1 for the newest item
    times: Tensor  # (M,) int64 how often the item is there, from 1


def _bucket(number: Tensor, buckets: int) -> Tensor:
    """1, 2, 3 to 4, 5 to 8, ... -> 0, 1, 2, 3, ..., the last one for all beyond."""
    return torch.ceil(torch.log2(number.float())).long().clamp(max=buckets - 1)


class ItemTable(nn.Module):
    """The items that are known one by one, by their SIDs."""

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
        # Ascending, so that a row is found by bisection: places are of SIDs, not of item ids.
        self.register_buffer("keys", torch.zeros(count, dtype=torch.long))
        self.register_buffer("codes", torch.zeros(count, len(self.sizes), dtype=torch.long))
        self.register_buffer("text", torch.zeros(count, text))
        # Without own vectors they stay the zeros that they are.
        self.has_own = config.item_vectors
        self.own = nn.Parameter(torch.zeros(count, width), requires_grad=self.has_own)
        self.text_proj = nn.Linear(text, width, bias=False) if text else None
        self.query_proj = nn.Linear(width, width, bias=False)
        # What an item of the user's past is beside itself to the dense head, by its last distance and by how
        # often it is there: whether items come again is learned, and for whom, as in RepeatNet (Ren et al.
        # 2019). A vector, not a number: a number moves by the learning rate a step, and never gets there.
        self.again = nn.Parameter(torch.zeros(DISTANCES + COUNTS, width))
        # Times this wherever items are ranked or compared, fitted on held-out events
        # (trainer.offline.repeat_bias).
        self.strength = nn.Parameter(torch.ones(()), requires_grad=False)
        self.item_dropout = config.item_dropout

    def _key(self, codes: Tensor) -> Tensor:
        key = torch.zeros(codes.shape[:-1], dtype=torch.long, device=codes.device)
        start = self.base
        for level, size in enumerate(self.sizes):
            key = key * size + (codes[..., level] - start)
            start += size
        return key

    def rows(self, codes: Tensor) -> Tensor:
        """SIDs as token ids (..., L) -> rows of the table (...), -1 where an item is not known by itself."""
        if not len(self.keys):
            return torch.full(codes.shape[:-1], -1, dtype=torch.long, device=codes.device)
        key = self._key(codes)
        at = torch.searchsorted(self.keys, key.contiguous()).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[at] == key, at, -1)

    @torch.no_grad()
    def set_items(self, codes: Tensor, text: Tensor | None) -> Tensor:
        """Know these items: codes (I, L) token ids, text (I, T) float32 or None where T is 0.

        Returns the rows (I,) that they have now. What was known of an item before is kept; a new one starts
        without an own vector.
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
        """Rows (...), -1 for unknown -> own vector plus projected text (..., D), zeros for unknown."""
        is_known = (rows >= 0)[..., None]
        if not len(self.own):
            return self.own.new_zeros(*rows.shape, self.own.shape[1])
        at = rows.clamp(min=0)
        vectors = F.embedding(at, self.own)
        if self.text_proj is not None:
            vectors = vectors + self.text_proj(self.text[at])
        return vectors * is_known

    def repeat_bias(
        self, query: Tensor, owner: Tensor, occurrences: PastOccurrences, as_learned: bool = False
    ) -> Tensor:
        """What is added to the logits (M,) of items of the past.

        query (N, D); owner (M,) int64: whose past; past: each item's last distance and count (M,);
        `as_learned`: as the next-item loss has it, without the strength.
        """
        by_bucket = (query @ self.again.to(query.dtype).T).float()
        near = _bucket(occurrences.distance, DISTANCES)
        bias = by_bucket[owner, near] + by_bucket[owner, DISTANCES + _bucket(occurrences.times, COUNTS)]
        return bias if as_learned else bias * self.strength

    def vectors(self, embeddings: Tensor) -> Tensor:
        """All items' vectors (I, D) from the token embeddings (V, D).

        In training a share `item_dropout` of items is without its own vector, so that codes and text learn to
        stand alone, as they do for a new item.
        """
        own: Tensor = self.own
        if self.training and self.item_dropout:
            with_own = torch.rand(len(own), 1, device=own.device) >= self.item_dropout
            own = own * with_own
        vectors: Tensor = own + F.embedding_bag(self.codes, embeddings, mode="sum")
        if self.text_proj is not None:
            vectors = vectors + self.text_proj(self.text)
        return vectors
