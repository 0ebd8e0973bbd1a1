"""What flat token ids fold into: which tokens close a position, and how many codes of an item stand open.

It follows from the ids alone. A training step computes it on the CPU, where its batch lies: the number of
positions is a shape, and the host would wait for a GPU to learn it.

Shapes: B rows, T flat tokens, L levels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from registry.bundles.prompt import PAD
from trainer.generator.configuration import GeneratorConfig
from trainer.sequences.batches import to_device


class TokenLayout(NamedTuple):
    """The roles of B rows of T tokens."""

    levels: Tensor  # (B, T) 0 for specials, 1..L for codes of level 0..L-1, L+1 for words, L+2 for contexts
    real: Tensor  # (B, T) bool: no padding
    is_context: Tensor  # (B, T) bool
    closes: Tensor  # (B, T) bool: the token closes a position
    closed_count: Tensor  # (B, T) positions that are closed at a place
    chosen: Tensor  # (B, T) how many codes of the open item there are; 0 where none is open
    positions: int  # of the row with the most of them, at least 1

    def to(self, device: torch.device) -> TokenLayout:
        """The same on a device."""
        parts = {
            name: to_device(part, device) for name, part in self._asdict().items() if isinstance(part, Tensor)
        }
        return TokenLayout(**parts, positions=self.positions)


def token_layout(ids: Tensor, attention_mask: Tensor | None, config: GeneratorConfig) -> TokenLayout:
    """The layout of ids (B, T) int64 under a mask (B, T) of 0 and 1, None: all; on the device of the ids."""
    last = config.levels
    bounds = [config.code_range(level)[0] for level in range(last)]
    bounds += [config.code_range(last - 1)[1], config.vocab_size - config.num_context]
    levels = torch.bucketize(ids.contiguous(), torch.tensor(bounds, device=ids.device), right=True)
    real = ids.ne(PAD)
    if attention_mask is not None:
        real = real & attention_mask.bool()
    is_context = real & (levels == last + 2)
    # A place closes a position unless it is a code that leaves its item open, or a context token.
    opens = (levels >= 1) & (levels < last)
    closes = real & ~opens & ~is_context
    closed_count = closes.long().cumsum(1)
    chosen = torch.where(real & opens, levels, 0)
    positions = max(int(closed_count[:, -1].max()), 1)
    return TokenLayout(levels, real, is_context, closes, closed_count, chosen, positions)
