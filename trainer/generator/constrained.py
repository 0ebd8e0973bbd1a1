"""Decoding that can only spell existing SIDs: the set of SIDs, and the beam search of the offline check.

It is the exact reference in torch: `registry.decoding.beam` does the same without torch over its index, and
`SidSet.allowed_tokens` is the constraint of Hugging Face's `generate` for a language model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from registry.bundles.prompt import Prompt, Sid
from trainer.generator.model import GeneratorForCausalLM


class SidSet:
    """The SIDs that exist, as sorted keys level by level: children of a prefix are found by bisection."""

    def __init__(self, sids: Sequence[Sid], prompt: Prompt) -> None:
        self.prompt = prompt
        codes = np.unique(np.asarray(sids, dtype=np.int64).reshape(-1, len(prompt.sizes)), axis=0)
        # keys[l]: the sorted keys `parent node * K_l + code` of level l; a node is the index of its key.
        self.keys: list[Tensor] = []
        node = np.zeros(len(codes), dtype=np.int64)
        for level, size in enumerate(prompt.sizes):
            unique, node = np.unique(node * size + codes[:, level], return_inverse=True)
            self.keys.append(torch.from_numpy(unique))

    def __len__(self) -> int:
        return len(self.keys[-1])

    def allowed_tokens(self, prefix: Sequence[int]) -> list[int]:
        """Tokens that may follow an item's first tokens `prefix`, ascending; empty where there is none."""
        node = 0
        for level, token in enumerate(prefix):
            key = node * self.prompt.sizes[level] + token - self.prompt.code_base(level)
            node = int(torch.searchsorted(self.keys[level], key))
            if node == len(self.keys[level]) or int(self.keys[level][node]) != key:
                return []
        level = len(prefix)
        if level == len(self.keys):
            return []
        size = self.prompt.sizes[level]
        low, high = torch.searchsorted(
            self.keys[level], torch.tensor([node * size, (node + 1) * size])
        ).tolist()
        return (self.keys[level][low:high] - node * size + self.prompt.code_base(level)).tolist()

    def children(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes (N,) of the level above (0 at level 0) -> children (N, K) int64, which exist (N, K) bool."""
        keys = self.keys[level].to(nodes.device)
        codes = torch.arange(self.prompt.sizes[level], device=nodes.device)
        child_keys = nodes[:, None] * self.prompt.sizes[level] + codes
        child = torch.searchsorted(keys, child_keys).clamp(max=len(keys) - 1)
        return child, keys[child] == child_keys


@torch.no_grad()
def beam_search(
    model: GeneratorForCausalLM, state: Tensor, sids: SidSet, width: int
) -> tuple[Tensor, Tensor]:
    """The best SIDs by the sum of log-probabilities, spelled level by level with `width` beams a row.

    state (B, D) -> codes (B, W, L) and scores (B, W), best first; W is `width`, or the number of SIDs.
    A score of minus infinity marks a place that no SID fills.
    """
    batch = len(state)
    codes = torch.empty(batch, 1, 0, dtype=torch.long, device=state.device)
    nodes = torch.zeros(batch, 1, dtype=torch.long, device=state.device)
    scores = torch.zeros(batch, 1, device=state.device)
    for level, size in enumerate(sids.prompt.sizes):
        beams = scores.shape[1]
        bases = torch.tensor([sids.prompt.code_base(at) for at in range(level)], device=state.device)
        prefix = (codes + bases).flatten(0, 1) if level else None
        spread = state.repeat_interleave(beams, 0)
        log_probs = model.step(level, spread, prefix).view(batch, beams, size)
        child, exists = sids.children(level, nodes.flatten())
        total = (scores[..., None] + log_probs).masked_fill(~exists.view(batch, beams, size), -torch.inf)
        scores, best = total.flatten(1).topk(min(width, beams * size, len(sids)), dim=1)
        nodes = child.view(batch, -1).gather(1, best)
        parent = (best // size)[..., None].expand(-1, -1, level)
        codes = torch.cat((codes.gather(1, parent), (best % size)[..., None]), dim=-1)
    return codes, scores


@torch.no_grad()
def spells_known_sids(model: GeneratorForCausalLM, state: Tensor, sids: SidSet) -> Tensor:
    """Spell one SID a row (B, D) over the whole vocabulary, unconstrained -> (B,) bool: is it a known SID?"""
    nodes = torch.zeros(len(state), dtype=torch.long, device=state.device)
    valid = torch.ones(len(state), dtype=torch.bool, device=state.device)
    chosen: Tensor | None = None
    for level in range(len(sids.prompt.sizes)):
        token = model.lm_head(model.model.depth[level](state, chosen)).argmax(-1)
        code = token - sids.prompt.code_base(level)
        valid &= (code >= 0) & (code < sids.prompt.sizes[level])
        child, exists = sids.children(level, nodes)
        at = code.clamp(0, sids.prompt.sizes[level] - 1)[:, None]
        valid &= exists.gather(1, at)[:, 0]
        nodes = child.gather(1, at)[:, 0]
        embedded = model.model.embed_tokens(token)
        chosen = embedded if chosen is None else chosen + embedded
    return valid
