"""Items ranked by both heads: the beam's spelling of SIDs, and the dense head's product with all items.

Candidates are the beam's and the dense head's own best. Each gets both log-probabilities, and their mixture
is the order. The weight, and the rule about past items, are fitted on held-out events
(registry.bundles.ranking).

Shapes: B rows, C candidates, D width, I items of the table, L levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from registry.bundles.ranking import Ranking, RepeatRule, excluded_by_repeats
from trainer.generator.constrained import SidSet, beam_search
from trainer.generator.model import GeneratorForCausalLM
from trainer.sequences.batches import Int32, Int64, pad_items
from trainer.sequences.held_out import HeldOut

# Rows of one forward: 20 beams of 64 codes of 256 rows stay in the cache.
ROWS_PER_FORWARD = 256
DENSE_WEIGHTS = tuple(round(0.1 * step, 1) for step in range(11))
_HOUR, _DAY = 3600, 86_400
REPEAT_RULES: tuple[RepeatRule, ...] = (
    RepeatRule(), RepeatRule(repeats="bought"), RepeatRule(repeats="never"),
    *(RepeatRule(repeats="within", within_s=seconds) for seconds in (_HOUR, _DAY, 7 * _DAY, 30 * _DAY)),
)  # fmt: skip


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

    def ranks(self, targets: Tensor, weight: float, allowed: Tensor) -> Tensor:
        """Rank (R, B) from 0 of each target (B,) in `order`, under each of R rules' `allowed` (R, B, C).

        C where the target is no candidate that is kept. The candidates before it are counted, not sorted.
        """
        target = self.items == targets[:, None]
        target_place = target.int().argmax(1, keepdim=True)
        score = self.score(weight)
        target_score = score.gather(1, target_place)
        # Equals keep the candidates' order, as in a stable sort.
        before = (score > target_score) | (
            (score == target_score) & (torch.arange(score.shape[1]) < target_place)
        )
        count = torch.einsum("rbc,bc->rb", allowed.float(), before.float()).long()
        return torch.where((allowed & target).any(-1), count, score.shape[1])


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
    logits, (batch, history_items, bias) = _logits_and_repeat_bias(model, state, codes, lengths)
    return logits.index_put((batch, history_items), bias, accumulate=True), batch, history_items


def _logits_and_repeat_bias(
    model: GeneratorForCausalLM, state: Tensor, codes: Tensor, lengths: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The dense head's logits (B, I') without the repeat bias; and the bias: row, item, addend (M,)."""
    table = model.model.items.vectors(model.model.embed_tokens.weight)
    query = model.model.queries(state)
    return query @ table.T, model.model.repeat_bias(query, model.model.items.rows(codes), lengths)


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
    def dense_logits(
        self, held_out: HeldOut
    ) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]]:
        """Batches of held-out targets (B,) as rows of the item table, of the dense head's logits (B, I')
        without the repeat bias, and of the bias: row, item and addend (M,). Items that are not in the
        catalogue have a logit of -inf."""
        states = self.states(held_out.histories, held_out.contexts)
        not_in_catalogue = self._catalogue_row < 0
        for low in range(0, len(held_out.targets), ROWS_PER_FORWARD):
            codes, lengths = self._padded(held_out.histories[low : low + ROWS_PER_FORWARD])
            logits, bias = _logits_and_repeat_bias(
                self.model, states[low : low + ROWS_PER_FORWARD], codes, lengths
            )
            target_tokens = self._catalogue_tokens[
                torch.from_numpy(held_out.targets[low : low + ROWS_PER_FORWARD]).to(self._device)
            ]
            yield (
                self.model.model.items.rows(target_tokens),
                logits.masked_fill(not_in_catalogue, -torch.inf),
                bias,
            )

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


class CandidateHistory(NamedTuple):
    """Each candidate's (B, C) part in its row's history; items outside of the history have age 0."""

    in_history: npt.NDArray[np.bool_]
    bought: npt.NDArray[np.bool_]  # at any time
    age_s: Int64  # seconds since the last click or purchase

    def allowed(self, rule: RepeatRule) -> Tensor:
        """The candidates (B, C) bool that the repeat rule allows in each row."""
        return torch.from_numpy(~(self.in_history & excluded_by_repeats(rule, self.bought, self.age_s)))


def candidate_history(
    items: Tensor, histories: Sequence[Int64], ages_s: Sequence[Int64] | None = None,
    bought: Sequence[npt.NDArray[np.bool_]] | None = None,
) -> CandidateHistory:  # fmt: skip
    """Look the candidates (B, C), -1 for none, up in the histories of their rows.

    `ages_s` and `bought` are those of `Held`; without them only the rules "always" and "never" can be used.
    """
    candidate_items, history_items = items.numpy() + 1, _concatenate(histories, np.int64) + 1
    rows = np.arange(len(candidate_items))[:, None]
    width = 1 + max(candidate_items.max(initial=0), history_items.max(initial=0))
    # One key for each item of each row. No candidate is item 0, which is in no history.
    owner = np.repeat(rows[:, 0], np.array([len(history) for history in histories], dtype=np.int64))
    keys, of = np.unique(owner * width + history_items, return_inverse=True)
    bought_once, age = np.zeros(len(keys) + 1, dtype=bool), np.zeros(len(keys) + 1, dtype=np.int64)
    if bought is not None:
        np.logical_or.at(bought_once, of, _concatenate(bought, np.bool_))
    if ages_s is not None:
        age[:-1] = np.iinfo(np.int64).max
        np.minimum.at(age, of, _concatenate(ages_s, np.int64))
    at = np.searchsorted(keys, rows * width + candidate_items)
    # The appended key equals no candidate's.
    in_history = np.append(keys, -1)[at] == rows * width + candidate_items
    at = np.where(in_history, at, len(keys))
    return CandidateHistory(in_history, bought_once[at], age[at])


def _concatenate(rows: Sequence[npt.NDArray[Any]], kind: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype=kind), *rows])


def _held_out_history(candidates: Candidates, held_out: HeldOut) -> CandidateHistory:
    return candidate_history(candidates.items, held_out.histories, held_out.ages_s, held_out.bought)


def target_ranks(candidates: Candidates, held_out: HeldOut, ranking: Ranking) -> Tensor:
    """Rank (B,) of each target from 0; C where it is not among the allowed candidates."""
    allowed = _held_out_history(candidates, held_out).allowed(ranking)
    return candidates.ranks(torch.from_numpy(held_out.targets), ranking.dense_weight, allowed[None])[0]


def fit_ranking(
    candidates: Candidates, held_out: HeldOut, k: int = 10, rules: Sequence[RepeatRule] = REPEAT_RULES
) -> Ranking:
    """The rule with the best NDCG at `k` on held-out events, equals going to the simpler one, and its weight.

    The weight is the largest that is within one standard error of the best (the rule of Breiman et al. 1984):
    a few thousand events cannot tell .8 from 1, and the dense head alone is the steadier.
    """
    weights = DENSE_WEIGHTS if torch.any(candidates.dense != 0) else (0.0,)
    history, targets = _held_out_history(candidates, held_out), torch.from_numpy(held_out.targets)
    allowed = torch.stack([history.allowed(rule) for rule in rules])
    ranked = torch.stack([candidates.ranks(targets, weight, allowed) for weight in weights], dim=1)
    gain, places = torch.zeros(k + 1), min(k, candidates.items.shape[1])
    gain[:places] = 1.0 / torch.log2(torch.arange(places) + 2.0)
    best_mean, best_gains, rule = -1.0, torch.zeros(len(weights), 0), rules[0]
    for candidate_rule, gains in zip(rules, gain[ranked.clamp(max=k)], strict=True):
        if float(gains.mean(1).max()) > best_mean + 1e-9:
            best_mean, best_gains, rule = float(gains.mean(1).max()), gains, candidate_rule
    shortfall = best_gains[best_gains.mean(1).argmax()] - best_gains
    error = shortfall.std(1, correction=0) / max(1, shortfall.shape[1]) ** 0.5
    near_best = (shortfall.mean(1) <= error).tolist()
    weight = max(weight for weight, is_near in zip(weights, near_best, strict=True) if is_near)
    return Ranking(dense_weight=weight, repeats=rule.repeats, within_s=rule.within_s)
