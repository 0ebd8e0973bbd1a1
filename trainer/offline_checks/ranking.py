"""Items ranked by both heads in torch: the beam's spelling of SIDs, and the dense head's product with items.

Candidates are the beam's and the dense head's own best. Each gets both log-probabilities, and their mixture
is the order. This is for answers that nobody is served: those of an evaluation under its own masks, and those
that a model learns from. Offline figures are of the lists of trainer.offline_checks.served_lists.

Shapes: B rows, C candidates, D width, I items of the table, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.generator.constrained import SidSet, beam_search
from trainer.generator.model import GeneratorForCausalLM
from trainer.sequences.batches import Int32, Int64, pad_items

# Rows of one forward: 20 beams of 64 codes of 256 rows stay in the cache.
ROWS_PER_FORWARD = 256


@dataclass(frozen=True)
class Candidates:
    """Each row's candidates, as rows of `Catalogue.codes`, with both scores; -1 where there is none."""

    items: Tensor  # (B, C) int64
    sid: Tensor  # (B, C) float32, log p of the SID
    dense: Tensor  # (B, C) float32, log p of the item over all items

    def score(self, weight: float) -> Tensor:
        """The mixture (B, C) of both scores under a weight; minus infinity where there is no candidate."""
        score = (1 - weight) * self.sid if weight < 1 else torch.zeros_like(self.sid)
        if weight > 0:
            score = score + weight * self.dense
        return score.masked_fill(self.items < 0, -torch.inf)

    def order(self, weight: float, allowed: Tensor | None = None) -> Tensor:
        """Items (B, C) best first under a weight; those that are not `allowed` (B, C) come last, as -1."""
        listed = self.items >= 0 if allowed is None else (self.items >= 0) & allowed
        score = self.score(weight).masked_fill(~listed, -torch.inf)
        places = score.argsort(dim=1, descending=True, stable=True)
        return torch.where(listed, self.items, -1).gather(1, places)


@torch.no_grad()
def candidates(
    model: GeneratorForCausalLM, state: Tensor, codes: Tensor, lengths: Tensor, sids: SidSet,
    catalogue_row: Tensor, width: int, catalogue_tokens: Tensor,
) -> Candidates:  # fmt: skip
    """The `width` best of the beam and of the dense head for histories (B, P, L) of `lengths` (B,).

    `state` (B, D): the encoded histories, under contexts. `catalogue_tokens` (I, L): token ids of the
    catalogue's items; `catalogue_row` (I',): the catalogue row of each row of the model's item table. A model
    with an empty item table has the beam's candidates alone.
    """
    beam_tokens, beam_sid = beam_search(model, state, sids, width)
    beam_tokens = beam_tokens + torch.tensor(
        [sids.prompt.code_base(at) for at in range(codes.shape[-1])], device=codes.device
    )
    beam_rows = model.model.items.rows(beam_tokens)
    if not len(catalogue_row):
        items = _catalogue_rows(beam_tokens, catalogue_tokens)
        missing = ~torch.isfinite(beam_sid)
        return Candidates(items.masked_fill(missing, -1), beam_sid, torch.zeros_like(beam_sid))
    logits, batch, history_items = item_logits(model, state, codes, lengths)
    log_probs = logits.log_softmax(-1)
    # The dense head's best of all items, and its best outside the history: a repeat rule may leave out any
    # number of the items in the history.
    masked = log_probs.index_put((batch, history_items), torch.tensor(-torch.inf, device=log_probs.device))
    count = min(width, log_probs.shape[1])
    best = torch.cat((log_probs.topk(count, dim=1).indices, masked.topk(count, dim=1).indices), dim=1)
    # An item that the beam has, or that is earlier in the row, is not a candidate twice.
    same = best[:, :, None] == best[:, None]
    new = (best[..., None] != beam_rows[:, None]).all(-1) & ~same.tril(-1).any(-1)
    dense_sid = torch.zeros(best.shape, device=log_probs.device)
    owner, column = new.nonzero(as_tuple=True)
    dense_sid[owner, column] = sid_scores(model, state, owner, model.model.items.codes[best[owner, column]])
    rows = torch.cat((beam_rows, torch.where(new, best, -1)), dim=1)
    sid = torch.cat((beam_sid, dense_sid), dim=1)
    listed = (rows >= 0) & torch.isfinite(sid)
    dense = log_probs.gather(1, rows.clamp(min=0))
    return Candidates(torch.where(listed, catalogue_row[rows.clamp(min=0)], -1), sid, dense)


def item_logits(
    model: GeneratorForCausalLM, state: Tensor, codes: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The dense head's logits (B, I') with the repeat bias, and where there is one: row (M,), item (M,)."""
    table = model.model.items.vectors(model.model.embed_tokens.weight)
    query = model.model.queries(state)
    batch, history_items, bias = model.model.repeat_bias(query, model.model.items.rows(codes), lengths)
    logits = query @ table.T
    return logits.index_put((batch, history_items), bias, accumulate=True), batch, history_items


def _catalogue_rows(codes: Tensor, catalogue_tokens: Tensor) -> Tensor:
    row_of = {tuple(row): at for at, row in enumerate(catalogue_tokens.tolist())}
    rows = [[row_of.get(tuple(sid), -1) for sid in row] for row in codes.tolist()]
    return torch.tensor(rows, device=codes.device)


def sid_scores(model: GeneratorForCausalLM, state: Tensor, owner: Tensor, codes: Tensor) -> Tensor:
    """Log-probabilities (N,) of SIDs (N, L) of token ids, each under the state (B, D) of its `owner` (N,)."""
    total = torch.zeros(len(codes), device=state.device)
    for level in range(codes.shape[1]):
        # SIDs under one state share their first codes: each prefix is scored once.
        prefix = torch.cat((owner[:, None], codes[:, :level]), dim=1)
        prefixes, of = prefix.unique(dim=0, return_inverse=True)
        log_probs = model.step(level, state[prefixes[:, 0]], prefixes[:, 1:] if level else None)
        total += log_probs[of, codes[:, level] - model.config.code_range(level)[0]]
    return total


class CatalogueRanker:
    """A model over one catalogue, ready to rank histories."""

    def __init__(self, model: GeneratorForCausalLM, codes: Int64, sids: SidSet, width: int) -> None:
        """codes (I, L) token ids of the catalogue's items; `width` candidates of each head."""
        self.model, self.codes, self.sids, self.width = model.eval(), codes, sids, width
        self._device = next(model.parameters()).device
        self._catalogue_tokens = torch.from_numpy(codes).to(self._device)
        rows = model.model.items.rows(self._catalogue_tokens)
        # The catalogue row of each row of the item table; -1 for items that the catalogue does not have.
        self._catalogue_row = torch.full(
            (len(model.model.items.keys),), -1, dtype=torch.long, device=self._device
        )
        self._catalogue_row[rows[rows >= 0]] = torch.arange(len(codes), device=self._device)[rows >= 0]

    @torch.no_grad()
    def states(self, histories: Sequence[Int64], contexts: Int32 | None = None) -> Tensor:
        """What the model encodes histories to (B, D), under contexts (B, C) of token ids."""
        states = torch.zeros(len(histories), self.model.config.hidden_size, device=self._device)
        # By length: a short history is not padded to the longest of all.
        lengths = np.array([len(history) for history in histories], dtype=np.int64)
        order = np.argsort(lengths, kind="stable")
        for low in range(0, len(order), ROWS_PER_FORWARD):
            rows = order[low : low + ROWS_PER_FORWARD]
            padded = self._padded([histories[row] for row in rows])
            about = None if contexts is None else torch.from_numpy(contexts[rows]).to(self._device).long()
            states[torch.from_numpy(rows).to(self._device)] = self.model.encode(*padded, context=about)
        return states

    @torch.no_grad()
    def candidates(self, histories: Sequence[Int64], states: Tensor | None = None) -> Candidates:
        """Both scores of every history's candidates; `states` (B, D) where they are made already."""
        states = self.states(histories) if states is None else states
        none = torch.zeros(0, 2 * self.width)
        parts = [(none.long(), none, none)] if not len(histories) else []
        for low in range(0, len(histories), ROWS_PER_FORWARD):
            codes, lengths = self._padded(histories[low : low + ROWS_PER_FORWARD])
            part = candidates(
                self.model, states[low : low + ROWS_PER_FORWARD], codes, lengths, self.sids,
                self._catalogue_row, self.width, self._catalogue_tokens,
            )  # fmt: skip
            parts.append((part.items.cpu(), part.sid.cpu(), part.dense.cpu()))
        return Candidates(*(torch.cat(part) for part in zip(*parts, strict=True)))

    @torch.no_grad()
    def best_items(self, histories: Sequence[Int64], states: Tensor, k: int) -> Tensor:
        """The dense head's `k` best items (B, k) of a catalogue whose items are all in the item table.

        `candidates(...).order(1.0)` begins with the same items, but needs a beam search.
        """
        parts = [torch.zeros(0, k, dtype=torch.long)]
        not_in_catalogue = self._catalogue_row < 0
        for low in range(0, len(histories), ROWS_PER_FORWARD):
            codes, lengths = self._padded(histories[low : low + ROWS_PER_FORWARD])
            logits, _, _ = item_logits(self.model, states[low : low + ROWS_PER_FORWARD], codes, lengths)
            rows = (
                logits.masked_fill(not_in_catalogue, -torch.inf)
                .topk(min(k, len(not_in_catalogue)), dim=1)
                .indices
            )
            parts.append(self._catalogue_row[rows].cpu())
        return torch.cat(parts[1:] or parts)

    @torch.no_grad()
    def scores(self, histories: Sequence[Int64], states: Tensor, items: Int64, weight: float) -> Tensor:
        """The mixture (B,) of both log-probabilities of one item (B,) a history, under its state (B, D)."""
        rows = torch.from_numpy(items).to(self._device)
        item_tokens = self._catalogue_tokens[rows]
        parts = [torch.zeros(0)]
        for low in range(0, len(histories), ROWS_PER_FORWARD):
            part = slice(low, low + ROWS_PER_FORWARD)
            state, codes = states[part], item_tokens[part]
            score = (1 - weight) * sid_scores(
                self.model, state, torch.arange(len(codes), device=self._device), codes
            )
            if weight > 0:
                logits, _, _ = item_logits(self.model, state, *self._padded(histories[part]))
                own = self.model.model.items.rows(codes)[:, None]
                score = score + weight * logits.log_softmax(-1).gather(1, own)[:, 0]
            parts.append(score.cpu())
        return torch.cat(parts)

    def _padded(self, histories: Sequence[Int64]) -> tuple[Tensor, Tensor]:
        codes, lengths = pad_items(histories, self.codes)
        return codes.to(self._device), lengths.to(self._device)


def in_histories(items: Tensor, histories: Sequence[Int64]) -> npt.NDArray[np.bool_]:
    """Which candidates (B, C), -1 for none, are in the histories of their rows."""
    candidate_items = items.numpy() + 1
    # No candidate is item 0, which is in no history.
    history_items = np.concatenate([np.zeros(0, dtype=np.int64), *histories]) + 1
    rows = np.arange(len(candidate_items))[:, None]
    width = 1 + max(candidate_items.max(initial=0), history_items.max(initial=0))
    # One key for each item of each row.
    owner = np.repeat(rows[:, 0], np.array([len(history) for history in histories], dtype=np.int64))
    return np.isin(rows * width + candidate_items, owner * width + history_items)
