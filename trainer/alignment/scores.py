"""How likely a model finds the answers of a batch of preference rows: one interface, whatever the model is.

A generator has two heads, and what is served is a mixture of both, so both are asked: the log-probability of
a SID, and the dense head's of its item. Any other causal language model is asked for the log-probability of
the answer's tokens. All that a preference loss needs is their difference to a reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.generator.items import PastOccurrences
from trainer.generator.model import GeneratorForCausalLM
from trainer.tuning.losses import softmax_loss


class HeadScores(NamedTuple):
    """What one head says of 1 + K answers to each of B prompts, the chosen one first."""

    scores: Tensor  # (1 + K, B): log-probability of an answer, less a number that is the same for its prompt
    real: Tensor  # (B, K) bool: which rejected answers count; a pair with none is left out
    nll: Tensor  # (): mean negative log-probability of the chosen answers, per token


def score_answers(model: Any, batch: dict[str, Tensor], with_nll: bool = True) -> list[HeadScores]:
    """The heads of a generator or of another causal LM for a batch of `preference_rows.collate`.

    A prompt of the generator is BOS, whole items and at its end the tokens of its context; an answer is one
    SID. `with_nll`: False for a reference, whose nll is 0.
    """
    if isinstance(model, GeneratorForCausalLM):
        return _generator_heads(model, batch, with_nll)
    return [_language_head(model, batch)]


def _generator_heads(
    model: GeneratorForCausalLM, batch: dict[str, Tensor], with_nll: bool
) -> list[HeadScores]:
    ids, real = batch["input_ids"], batch["real"]
    count, levels = len(real), model.config.levels
    codes, lengths, context = _split_prompts(model, ids[:count], batch["completion_mask"][:count])
    ends = batch["completion_mask"].cumsum(1).eq(0).sum(1)
    answers = ids.gather(1, ends[:, None] + torch.arange(levels, device=ids.device)).unflatten(0, (-1, count))
    # The prompt is read once for all of its answers.
    state = model.encode(codes, lengths, context=context)
    spelled = _sid_log_probs(model, state, answers)
    heads = [HeadScores(spelled, real, -spelled[0].mean() / levels)]
    rows = model.model.items.rows(answers)
    known = real & (rows[0] >= 0)[:, None] & (rows[1:] >= 0).T
    if not bool(known.any()):
        return heads
    query = model.model.queries(state)
    every = model.model.items.vectors(model.model.embed_tokens.weight)
    past = model.model.items.rows(codes)
    scores = (query * F.embedding(rows.clamp(min=0), every)).sum(-1) + _repeat_bias(
        model, query, past, lengths, rows
    )
    nll = torch.zeros((), device=ids.device)
    if with_nll:
        asked = rows[0] >= 0
        owner, row, extra = model.model.again(query[asked], past[asked], lengths[asked], learning=True)
        nll = softmax_loss(query[asked], every, rows[0, asked], 0.0, (owner, row), extra)
    return [*heads, HeadScores(scores, known, nll)]


def _split_prompts(
    model: GeneratorForCausalLM, ids: Tensor, completion: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (B, P, L), lengths (B,) and context tokens (B, T) of prompts (B, T) before their completions."""
    levels, last = model.config.levels, model.config.vocab_size - model.config.num_context
    said = (ids >= last) & (completion.cumsum(1) == 0)
    lengths = (completion.cumsum(1).eq(0).sum(1) - 1 - said.sum(1)) // levels
    longest = max(1, int(lengths.max()))
    ids = F.pad(ids, (0, max(0, 1 + longest * levels - ids.shape[1])), value=model.config.code_base)
    codes = ids[:, 1 : 1 + longest * levels].unflatten(1, (longest, levels))
    # Codes after a row's own prompt are its answer or padding: made a real code, which no length reaches.
    inside = torch.arange(longest, device=ids.device) < lengths[:, None]
    context = torch.where(said, ids[:, : said.shape[1]], model.config.pad_token_id)
    return torch.where(inside[..., None], codes, model.config.code_base), lengths, context


def _sid_log_probs(model: GeneratorForCausalLM, state: Tensor, answers: Tensor) -> Tensor:
    """Log-probabilities (1 + K, B) of SIDs (1 + K, B, L) after states (B, D)."""
    many, count, levels = answers.shape
    total = state.new_zeros(many, count)
    # The first code depends on the prompt alone.
    states = state.expand(many, -1, -1).flatten(0, 1)
    for level in range(levels):
        first = model.config.code_range(level)[0]
        wanted = answers[..., level] - first
        if level:
            logs = model.step(level, states, answers[..., :level].flatten(0, 1)).unflatten(0, (many, count))
        else:
            logs = model.step(0, state, None).expand(many, -1, -1)
        total = total + logs.gather(-1, wanted[..., None])[..., 0]
    return total


def _repeat_bias(
    model: GeneratorForCausalLM, query: Tensor, past: Tensor, lengths: Tensor, rows: Tensor
) -> Tensor:
    """What the dense head adds to answers (1 + K, B) that are in their prompt's past (B, P)."""
    at = torch.arange(past.shape[1], device=past.device)
    same = (past == rows[..., None]) & (rows >= 0)[..., None] & (at < lengths[:, None])
    last = torch.where(same, at, -1).amax(-1)
    owner = torch.arange(len(query), device=past.device).expand_as(last)
    when = PastOccurrences((lengths - last).clamp(min=1), same.sum(-1).clamp(min=1))
    return torch.where(last >= 0, model.model.items.again_of(query, owner, when), 0.0)


def _language_head(model: Any, batch: dict[str, Tensor]) -> HeadScores:
    ids, answer = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    # Called as a module: wrappers that join gradients of several devices see the call.
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1]
    logs = logits[answer].float().log_softmax(-1).gather(-1, ids[:, 1:][answer][:, None])[:, 0]
    scores = torch.zeros_like(answer, dtype=logs.dtype).masked_scatter(answer, logs).sum(1)
    count = len(batch["real"])
    return HeadScores(
        scores.unflatten(0, (-1, count)), batch["real"], -scores[:count].sum() / answer[:count].sum()
    )
