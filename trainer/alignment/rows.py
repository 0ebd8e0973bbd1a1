"""Preference pairs as rows of token ids, and rows as batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from registry.bundles.context import Attributes, Context, context_fields
from registry.bundles.prompt import BOS, Prompt, Sid, prompt_sids
from streams.errors import SidstreamError
from streams.events import PreferencePair
from trainer.log.pair_filter import newest_of_each_scheme
from trainer.settings import DpoSettings

# (pair, rejected SIDs) -> the rejected SIDs and hard negatives, up to K in all.
RejectedFiller = Callable[[PreferencePair, list[Sid]], list[Sid]]


class PreferenceRow(TypedDict):
    """Token ids of a prompt, of the chosen answer and of the K >= 1 rejected ones."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[list[int]]


def preference_rows(
    pairs: Sequence[PreferencePair], codebook: str, prompt: Prompt, settings: DpoSettings,
    context: Context | None = None, profiles: Mapping[str, Attributes] | None = None,
    fill_rejected: RejectedFiller | None = None,
) -> list[PreferenceRow]:  # fmt: skip
    """A row for each of the newest `max_pairs` pairs of this codebook, in equal parts of `settings.schemes`.

    A row has up to `max_rejected` rejected SIDs, none of them twice, none of them the chosen one. A pair that
    repeats, that has no other SID to reject, or whose codes are not of this codebook, is left out. After the
    items of a prompt stand the tokens of `context` for the pair's scene and its user's profile.
    `fill_rejected(pair, rejected)` adds hard negatives where a pair has fewer.
    """
    matching_pairs = {
        pair.event_id: pair
        for pair in reversed(pairs)
        if pair.codebook == codebook and pair.scheme in settings.schemes
    }
    newest = newest_of_each_scheme(matching_pairs.values(), settings.max_pairs)
    rows = (
        _row(pair, prompt, settings, context or Context(), profiles or {}, fill_rejected) for pair in newest
    )
    return [row for row in rows if row is not None]


def _row(
    pair: PreferencePair, prompt: Prompt, settings: DpoSettings, context: Context,
    profiles: Mapping[str, Attributes], fill_rejected: RejectedFiller | None,
) -> PreferenceRow | None:  # fmt: skip
    trigger = tuple(pair.trigger) if pair.trigger is not None else None
    # A batch is as long as its longest prompt, so short prompts are fast; the last items matter most.
    length = min(settings.max_items, prompt.max_items)
    prompt_items = prompt_sids([tuple(sid) for sid in pair.history], trigger, length)
    chosen = tuple(pair.chosen)
    rejected = [sid for sid in dict.fromkeys(map(tuple, pair.rejected)) if sid != chosen]
    rejected = rejected[: settings.max_rejected]
    if not rejected:
        return None
    if fill_rejected is not None:
        rejected = fill_rejected(pair, rejected)
    context_tokens = context.row(context_fields(pair.scene, profiles.get(pair.user_id)))
    try:
        ids = [BOS, *(token for sid in prompt_items for token in prompt.tokens(sid))]
        return PreferenceRow(
            prompt_ids=ids + [token for token in context_tokens if token],
            chosen_ids=prompt.tokens(chosen),
            rejected_ids=[prompt.tokens(sid) for sid in rejected],
        )
    except SidstreamError:
        return None


def collate_preferences(rows: Sequence[PreferenceRow | Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """B rows as (1 + K) B sequences, padded on the right: all chosen ones, all first rejected ones, ...

    input_ids, attention_mask and completion_mask ((1 + K) B, T) int64; answer_places (M,) int64, where the
    tokens of answers are in completion_mask[:, 1:], flattened; real (B, K) bool, False where a row has fewer
    than K rejected answers and its chosen one stands in.
    """
    max_rejected = max(len(row["rejected_ids"]) for row in rows)
    sequences: list[tuple[list[int], list[int]]] = [(row["prompt_ids"], row["chosen_ids"]) for row in rows]
    real = torch.zeros(len(rows), max_rejected, dtype=torch.bool)
    for k in range(max_rejected):
        for row_index, row in enumerate(rows):
            real[row_index, k] = k < len(row["rejected_ids"])
            sequences.append(
                (row["prompt_ids"], row["rejected_ids"][k] if real[row_index, k] else row["chosen_ids"])
            )
    length = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids = torch.full((len(sequences), length), pad_id, dtype=torch.long)
    attention_mask, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for row_index, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        ids[row_index, :end] = torch.tensor(prompt + answer)
        attention_mask[row_index, :end] = 1
        completion[row_index, len(prompt) : end] = 1
    return {
        "input_ids": ids, "attention_mask": attention_mask, "completion_mask": completion, "real": real,
        "answer_places": completion[:, 1:].flatten().nonzero()[:, 0],
    }  # fmt: skip
