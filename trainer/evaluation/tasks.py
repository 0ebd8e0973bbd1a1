"""Search and summaries by a trained generator: what it spells, or says, after a prompt of items and words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from registry.bundles.prompt import PAD
from trainer.evaluation.sequences import Int64
from trainer.generator.constrained import SidSet, beam_search
from trainer.generator.model import GeneratorForCausalLM
from trainer.sequences.interactions import TrainingCatalogue

_ROWS = 128


@torch.no_grad()
def prompt_states(model: GeneratorForCausalLM, prompts: Sequence[Sequence[int]]) -> Tensor:
    """The states (B, D) that an item is decoded from after prompts of token ids."""
    ids, lengths = _padded(prompts)
    where = model.lm_head.weight.device
    states = model.model.depth_inputs(ids.to(where))[0]
    return states[torch.arange(len(ids)), lengths - 1]


def spell(
    model: GeneratorForCausalLM,
    prompts: Sequence[Sequence[int]],
    sids: SidSet,
    known: TrainingCatalogue,
    k: int,
) -> Int64:
    """(B, k) rows of the catalogue, likeliest SIDs first, -1 where there are fewer than k."""
    place = {sid: row for row, sid in enumerate(known.sids)}
    made = np.full((len(prompts), k), -1, dtype=np.int64)
    for low, part in _parts(prompts):
        codes, scores = beam_search(model, prompt_states(model, part), sids, k)
        there = torch.isfinite(scores).tolist()
        for row, answers in enumerate(codes.tolist()):
            found = [place[tuple(sid)] for at, sid in enumerate(answers) if there[row][at]]
            made[low + row, : len(found)] = found
    return made


@torch.no_grad()
def say(
    model: GeneratorForCausalLM, prompts: Sequence[Sequence[int]], counts: Sequence[int], first_word: int
) -> list[list[int]]:
    """As many words as `counts` (B,) asks for after each prompt: each the likeliest new one."""
    made: list[list[int]] = [[] for _ in prompts]
    end = model.config.vocab_size - model.config.num_context
    for low, part in _parts(prompts):
        wanted = counts[low : low + len(part)]
        for step in range(max(wanted, default=0)):
            going = [low + at for at, count in enumerate(wanted) if count > step]
            ids, lengths = _padded([[*prompts[at], *made[at]] for at in going])
            logits = model(ids.to(model.lm_head.weight.device)).logits[torch.arange(len(ids)), lengths - 1]
            logits[:, :first_word], logits[:, end:] = -torch.inf, -torch.inf
            for row, at in enumerate(going):
                logits[row, made[at]] = -torch.inf
            for at, word in zip(going, logits.argmax(-1).tolist(), strict=True):
                made[at].append(word)
    return made


def _parts(prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Sequence[Sequence[int]]]]:
    for low in range(0, len(prompts), _ROWS):
        yield low, prompts[low : low + _ROWS]


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts padded on the right (B, T), and their lengths (B,)."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.full((len(prompts), int(lengths.max())), PAD)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    return ids, lengths
