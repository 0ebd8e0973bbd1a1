"""The preference loss of the dense head: DPO on the log-probabilities of items in place of SIDs.

What is served is a mixture of both heads, so both learn what was preferred. Under one history the normaliser
of the dense head's softmax cancels: the chosen item's log-ratio less the rejected one's is a difference of
two products (Rafailov et al. 2023, equation 7).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.generator import GeneratorForCausalLM
from trainer.losses import softmax_loss


def dense_preference_loss(
    policy: GeneratorForCausalLM, reference: GeneratorForCausalLM, ids: Tensor, completion: Tensor,
    beta: float, weight: float, sft_weight: float,
) -> Tensor:  # fmt: skip
    """weight * DPO + sft_weight * cross-entropy of the chosen items; 0 where no pair is of known items.

    ids (2N, T) and completion (2N, T) of 0 and 1, as TRL makes them: N chosen rows, then N rejected ones
    under the same prompts; a prompt is BOS, whole items and at its end the tokens of its context.
    """
    levels, last = policy.config.levels, policy.config.vocab_size - policy.config.num_context
    counts = completion.cumsum(1).eq(0).sum(1)[: len(ids) // 2]  # tokens of each prompt
    prompts = ids[: len(counts)]
    said = prompts >= last
    lengths = (counts - 1 - said.sum(1)) // levels
    longest = int(lengths.max())
    codes = prompts[:, 1 : 1 + longest * levels].unflatten(1, (longest, levels))
    context = torch.where(said, prompts, policy.config.pad_token_id)
    # Codes after a row's own prompt are its completion or padding: made a real code, which no length reaches.
    inside = torch.arange(longest, device=ids.device) < lengths[:, None]
    codes = torch.where(inside[..., None], codes, policy.config.code_base)
    answers = ids.gather(1, counts.repeat(2)[:, None] + torch.arange(levels, device=ids.device))
    rows = policy.model.items.rows(answers).unflatten(0, (2, -1))
    known = (rows >= 0).all(0)
    if not bool(known.any()):
        return torch.zeros((), device=ids.device)
    codes, lengths, context, rows = codes[known], lengths[known], context[known], rows[:, known]
    logits, query, every = _logits(policy, codes, lengths, context, rows)
    with torch.no_grad():
        before = _logits(reference, codes, lengths, context, rows)[0]
    margin = (logits[0] - logits[1]) - (before[0] - before[1])
    loss = -weight * F.logsigmoid(beta * margin).mean()
    if sft_weight > 0:
        loss = loss + sft_weight * softmax_loss(query, every, rows[0])
    return loss


def _logits(
    model: GeneratorForCausalLM, codes: Tensor, lengths: Tensor, context: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    query = model.model.queries(model.encode(codes, lengths, context=context))
    every = model.model.items.vectors(model.model.embed_tokens.weight)
    return (query * F.embedding(rows, every)).sum(-1), query, every
