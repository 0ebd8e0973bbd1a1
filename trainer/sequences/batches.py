"""What a step of training or of ranking reads: rows of tokens, pieces of sequences, padded to one length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from registry.bundles.prompt import PAD

# A label that no loss counts; the default of torch's cross-entropy.
IGNORE = -100
Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]


def to_device(part: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. Where that is a GPU, the host goes on while it is copied."""
    if device.type == "cpu":
        return part.to(device)
    return part.pin_memory().to(device, non_blocking=True)


class TokenRow(NamedTuple):
    """One training row: token ids, which of them are learned, and the weight of its task."""

    ids: Int64  # (T,)
    learned: npt.NDArray[np.bool_]  # (T,): True where the token is a label
    weight: float


class SequenceBatch(NamedTuple):
    """Pieces of users' sequences, padded on the right to one length."""

    items: Tensor  # (B, P) int64 rows of `TrainingCatalogue.codes`, -1 where there is none
    learned: Tensor  # (B, P) bool: True where the item is a target
    context: Tensor | None = None  # (B, P, C) int64 token ids of each item's own event, 0 where there is none
    bought: Tensor | None = None  # (B, P) bool: True where the item was bought (trainer.sequences.tasks)


class TokenBatch(NamedTuple):
    """Rows padded on the right to one length."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, IGNORE where nothing is learned
    weights: Tensor  # (B,) float32


def batches_of_similar_length(order: Int64, length: Int64, limit: int) -> Iterator[list[int]]:
    """Rows of ascending `length`, cut where a padded batch would be larger than `limit`."""
    batch: list[int] = []
    for at in order.tolist():
        if batch and (len(batch) + 1) * length[at] > limit:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def pad_token_rows(rows: Sequence[TokenRow]) -> TokenBatch:
    """Pad rows on the right."""
    length = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), length), PAD, dtype=np.int64)
    labels = np.full((len(rows), length), IGNORE, dtype=np.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = row.ids
        labels[at, : len(row.ids)] = np.where(row.learned, row.ids, IGNORE)
    weights = np.array([row.weight for row in rows], dtype=np.float32)
    return TokenBatch(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(weights))


def pad_contexts(contexts: Sequence[Int32], length: int) -> Tensor | None:
    """B contexts (P, C) -> (B, length, C) int64, padded with 0; None where C is 0."""
    if not contexts or not contexts[0].shape[1]:
        return None
    padded = np.zeros((len(contexts), length, contexts[0].shape[1]), dtype=np.int64)
    for row, context in enumerate(contexts):
        padded[row, : len(context)] = context
    return torch.from_numpy(padded)


def context_tensor(contexts: Int32 | None, low: int, high: int, device: torch.device) -> Tensor | None:
    """Rows low to high of contexts (N, C) -> (high - low, C) int64; None where nothing is said at all."""
    if contexts is None or not contexts.shape[1]:
        return None
    return torch.from_numpy(contexts[low:high].astype(np.int64)).to(device)


def pad_items(histories: Sequence[Int64], codes: Int64) -> tuple[Tensor, Tensor]:
    """Histories of item rows -> codes (B, P, L) right-padded with 0 (P >= 1), lengths (B,)."""
    lengths = np.array([len(history) for history in histories], dtype=np.int64)
    padded = np.zeros((len(histories), max(1, int(lengths.max(initial=0))), codes.shape[1]), dtype=np.int64)
    for at, history in enumerate(histories):
        padded[at, : len(history)] = codes[history]
    return torch.from_numpy(padded), torch.from_numpy(lengths)
