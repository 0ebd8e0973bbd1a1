"""Log-probabilities of the answers of a batch of preference rows, for a generator and for a language model.

A generator has two heads, and serving mixes both, so both have scores: the log-probability of the SID, and
the dense head's of its item. Any other causal language model has the log-probability of the answer's tokens.
A preference loss needs only their difference to a reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.generator.items import PastOccurrences
from trainer.generator.model import GeneratorForCausalLM
from trainer.settings import Arithmetic
from trainer.tuning.devices import training_arithmetic
from trainer.tuning.losses import ItemBias, softmax_loss


class HeadScores(NamedTuple):
    """One head's scores of 1 + K answers to each of B prompts, the chosen answer first."""

    scores: Tensor  # (1 + K, B): log-probability of an answer, up to a constant of its prompt
    real: Tensor  # (B, K) bool: which rejected answers count; a pair with none is left out
    nll: Tensor  # (): mean negative log-probability of the chosen answers, per token


def score_answers(
    model: Any, batch: dict[str, Tensor], with_nll: bool = True, arithmetic: Arithmetic = "float32"
) -> list[HeadScores]:
    """The scores of each head of a generator, or of another causal LM, for a batch of `collate_preferences`.

    A prompt of the generator is BOS, whole items and at its end the tokens of its context; an answer is one
    SID. `with_nll`: False for a reference, whose nll is 0. Nothing is dropped, also of a model in training:
    a policy and its reference differ in their weights alone, and their margins start at 0. `arithmetic`: of
    the generator's backbone, or of the whole language model; the generator's heads are in float32, since
    bfloat16 would round a logit of 10 by .04, as much as margins move in a stage.
    """
    with _evaluation_mode(model):
        if isinstance(model, GeneratorForCausalLM):
            return _generator_heads(model, batch, with_nll, arithmetic)
        return [_language_head(model, batch, arithmetic)]


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    # Not by setting every dropout to 0: Hugging Face's attention has its rate as a number, not as a module.
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


def _generator_heads(
    model: GeneratorForCausalLM, batch: dict[str, Tensor], with_nll: bool, arithmetic: Arithmetic
) -> list[HeadScores]:
    ids, real = batch["input_ids"], batch["real"]
    count, levels = len(real), model.config.levels
    codes, lengths, context = _split_prompts(model, ids[:count], batch["completion_mask"][:count])
    ends = batch["completion_mask"].cumsum(1).eq(0).sum(1)
    answers = ids.gather(1, ends[:, None] + torch.arange(levels, device=ids.device)).unflatten(0, (-1, count))
    # The prompt is read once for all of its answers.
    with training_arithmetic(arithmetic, ids.device):
        state = model.encode(codes, lengths, context=context).float()
    sid_log_probs = _sid_log_probs(model, state, answers)
    heads = [HeadScores(sid_log_probs, real, -sid_log_probs[0].mean() / levels)]
    table = model.model.items
    if not len(table.keys):
        return heads
    rows = table.rows(answers)
    query = model.model.queries(state)
    item_vectors = table.vectors(model.model.embed_tokens.weight)
    history_rows = table.rows(codes)
    scores = (query * F.embedding(rows.clamp(min=0), item_vectors)).sum(-1) + _repeat_bias(
        model, query, history_rows, lengths, rows
    )
    nll = torch.zeros((), device=ids.device)
    if with_nll:
        bias = ItemBias(*model.model.repeat_bias_at_places(query, history_rows, lengths, as_learned=True))
        # A chosen answer without an item weighs nothing: to leave it out, the host would wait for its place.
        chosen, has_item = rows[0].clamp(min=0), (rows[0] >= 0).float()
        nll = softmax_loss(query, item_vectors, chosen, bias=bias, weights=has_item)
    both_known = real & (rows[0] >= 0)[:, None] & (rows[1:] >= 0).T
    return [*heads, HeadScores(scores, both_known, nll)]


def _split_prompts(
    model: GeneratorForCausalLM, ids: Tensor, completion: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (B, P, L), lengths (B,) and context tokens (B, T) of prompts (B, T) before their completions."""
    levels, first_context_token = model.config.levels, model.config.vocab_size - model.config.num_context
    is_context = (ids >= first_context_token) & (completion.cumsum(1) == 0)
    lengths = (completion.cumsum(1).eq(0).sum(1) - 1 - is_context.sum(1)) // levels
    # No prompt is longer, and it is the longest one's length but where tokens of its context are more than an
    # item's; the longest itself is known to the device alone.
    longest = max(1, (ids.shape[1] - levels - 1) // levels)
    ids = F.pad(ids, (0, max(0, 1 + longest * levels - ids.shape[1])), value=model.config.code_base)
    codes = ids[:, 1 : 1 + longest * levels].unflatten(1, (longest, levels))
    # Codes after a row's own prompt are its answer or padding. A valid code takes their place: no length
    # reaches it, but the embedding must exist.
    inside = torch.arange(longest, device=ids.device) < lengths[:, None]
    context = torch.where(is_context, ids[:, : is_context.shape[1]], model.config.pad_token_id)
    return torch.where(inside[..., None], codes, model.config.code_base), lengths, context


def _sid_log_probs(model: GeneratorForCausalLM, state: Tensor, answers: Tensor) -> Tensor:
    """Log-probabilities (1 + K, B) of SIDs (1 + K, B, L) after states (B, D)."""
    answers_per_prompt, count, levels = answers.shape
    total = state.new_zeros(answers_per_prompt, count)
    # The first code depends on the prompt alone.
    states = state.expand(answers_per_prompt, -1, -1).flatten(0, 1)
    for level in range(levels):
        first = model.config.code_range(level)[0]
        codes = answers[..., level] - first
        if level:
            log_probs = model.step(level, states, answers[..., :level].flatten(0, 1)).unflatten(
                0, (answers_per_prompt, count)
            )
        else:
            log_probs = model.step(0, state, None).expand(answers_per_prompt, -1, -1)
        total = total + log_probs.gather(-1, codes[..., None])[..., 0]
    return total


def _repeat_bias(
    model: GeneratorForCausalLM, query: Tensor, history_rows: Tensor, lengths: Tensor, rows: Tensor
) -> Tensor:
    """The repeat bias (1 + K, B) of answers' rows (1 + K, B); 0 for those outside of the history (B, P)."""
    places = torch.arange(history_rows.shape[1], device=history_rows.device)
    same = (history_rows == rows[..., None]) & (rows >= 0)[..., None] & (places < lengths[:, None])
    last_place = torch.where(same, places, -1).amax(-1)
    occurrences = PastOccurrences((lengths - last_place).clamp(min=1).T, same.sum(-1).clamp(min=1).T)
    return torch.where(last_place >= 0, model.model.items.repeat_bias(query, occurrences).T, 0.0)


def _language_head(model: Any, batch: dict[str, Tensor], arithmetic: Arithmetic) -> HeadScores:
    ids, places = batch["input_ids"], batch["answer_places"]
    # Called as a module, so that wrappers that gather gradients of several devices see the call.
    with training_arithmetic(arithmetic, ids.device):
        output = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False)
    logits = output.logits[:, :-1]
    targets = ids[:, 1:].flatten()[places][:, None]
    logs = logits.flatten(0, 1)[places].float().log_softmax(-1).gather(-1, targets)[:, 0]
    per_token = logs.new_zeros(ids[:, 1:].numel()).index_put((places,), logs).view(ids[:, 1:].shape)
    scores, count = per_token.sum(1).unflatten(0, (-1, len(batch["real"]))), len(batch["real"])
    return HeadScores(scores, batch["real"], -scores[0].sum() / batch["completion_mask"][:count, 1:].sum())
