"""Search and summaries by a trained generator: items or words that it predicts after a prompt of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from registry.bundles.prompt import PAD
from trainer.evaluation.sequences import Int64
from trainer.generator.constrained import SidSet, beam_search
from trainer.generator.layout import token_layout
from trainer.generator.model import GeneratorForCausalLM
from trainer.sequences.interactions import TrainingCatalogue

_ROWS = 128


@torch.no_grad()
def prompt_states(model: GeneratorForCausalLM, prompts: Sequence[Sequence[int]]) -> Tensor:
    """The states (B, D) that an item is decoded from after prompts of token ids."""
    ids, lengths = _padded(prompts)
    where = model.lm_head.weight.device
    layout = token_layout(ids, None, model.config).to(where)
    states = model.model.depth_inputs(ids.to(where), layout)[0]
    return states[torch.arange(len(ids), device=where), lengths.to(where) - 1]


def search_items(
    model: GeneratorForCausalLM,
    prompts: Sequence[Sequence[int]],
    sids: SidSet,
    catalogue: TrainingCatalogue,
    k: int,
) -> Int64:
    """(B, k) rows of the catalogue, likeliest SIDs first, -1 where there are fewer than k."""
    row_of_sid = {sid: row for row, sid in enumerate(catalogue.sids)}
    lists = np.full((len(prompts), k), -1, dtype=np.int64)
    for low, part in _batches(prompts):
        codes, scores = beam_search(model, prompt_states(model, part), sids, k)
        is_answer = torch.isfinite(scores).tolist()
        for row, answers in enumerate(codes.tolist()):
            rows_of_answers = [row_of_sid[tuple(sid)] for at, sid in enumerate(answers) if is_answer[row][at]]
            lists[low + row, : len(rows_of_answers)] = rows_of_answers
    return lists


@torch.no_grad()
def predict_words(
    model: GeneratorForCausalLM, prompts: Sequence[Sequence[int]], counts: Sequence[int], first_word: int
) -> list[list[int]]:
    """`counts` (B,) word tokens after each prompt, each the likeliest that the answer does not have yet."""
    words: list[list[int]] = [[] for _ in prompts]
    end = model.config.vocab_size - model.config.num_context
    for low, part in _batches(prompts):
        word_counts = counts[low : low + len(part)]
        for step in range(max(word_counts, default=0)):
            unfinished = [low + at for at, count in enumerate(word_counts) if count > step]
            ids, lengths = _padded([[*prompts[at], *words[at]] for at in unfinished])
            where = model.lm_head.weight.device
            ends = torch.arange(len(ids), device=where), lengths.to(where) - 1
            logits = model(ids.to(where)).logits[ends]
            logits[:, :first_word], logits[:, end:] = -torch.inf, -torch.inf
            for row, at in enumerate(unfinished):
                logits[row, words[at]] = -torch.inf
            for at, word in zip(unfinished, logits.argmax(-1).tolist(), strict=True):
                words[at].append(word)
    return words


def _batches(prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Sequence[Sequence[int]]]]:
    for low in range(0, len(prompts), _ROWS):
        yield low, prompts[low : low + _ROWS]


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts padded on the right (B, T), and their lengths (B,)."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.full((len(prompts), int(lengths.max())), PAD)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    return ids, lengths
