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

from registry.bundles.ranking import Ranking, Repeats, left_out
from trainer.generator.constrained import SidSet, beam
from trainer.generator.model import GeneratorForCausalLM
from trainer.sequences.batches import Int32, Int64, pad_items
from trainer.sequences.held_out import HeldOut

# Rows of one forward: 20 beams of 64 codes of 256 rows stay in the cache.
ROWS = 256
WEIGHTS = tuple(round(0.1 * step, 1) for step in range(11))
_HOUR, _DAY = 3600, 86_400
RULES = (
    Ranking(), Ranking(repeats="bought"), Ranking(repeats="never"),
    *(Ranking(repeats="within", within_s=seconds) for seconds in (_HOUR, _DAY, 7 * _DAY, 30 * _DAY)),
)  # fmt: skip


@dataclass(frozen=True)
class Candidates:
    """Each row's candidates, as rows of `Catalogue.codes`, with both scores; -1 where there is none."""

    items: Tensor  # (B, C) int64
    sid: Tensor  # (B, C) float32, log p of the SID
    dense: Tensor  # (B, C) float32, log p of the item over all items

    def score(self, weight: float) -> Tensor:
        """The mixture (B, C) of both scores under a weight; minus infinity where there is no candidate."""
        made = (1 - weight) * self.sid if weight < 1 else torch.zeros_like(self.sid)
        if weight > 0:
            made = made + weight * self.dense
        return made.masked_fill(self.items < 0, -torch.inf)

    def order(self, weight: float, kept: Tensor | None = None) -> Tensor:
        """Items (B, C) best first under a weight; those that are not `kept` (B, C) come last, as -1."""
        there = self.items >= 0 if kept is None else (self.items >= 0) & kept
        score = self.score(weight).masked_fill(~there, -torch.inf)
        at = score.argsort(dim=1, descending=True, stable=True)
        return torch.where(there, self.items, -1).gather(1, at)

    def ranks(self, targets: Tensor, weight: float, kept: Tensor) -> Tensor:
        """Rank (R, B) from 0 of each target (B,) in `order`, under each of R rules' `kept` (R, B, C).

        C where the target is no candidate that is kept. The candidates before it are counted, not sorted.
        """
        target = self.items == targets[:, None]
        at = target.int().argmax(1, keepdim=True)
        score = self.score(weight)
        own = score.gather(1, at)
        # Equals keep the candidates' order, as in a stable sort.
        before = (score > own) | ((score == own) & (torch.arange(score.shape[1]) < at))
        count = torch.einsum("rbc,bc->rb", kept.float(), before.float()).long()
        return torch.where((kept & target).any(-1), count, score.shape[1])


@torch.no_grad()
def candidates(
    model: GeneratorForCausalLM, state: Tensor, codes: Tensor, lengths: Tensor, sids: SidSet, place: Tensor,
    width: int, known: Tensor,
) -> Candidates:  # fmt: skip
    """The `width` best of the beam and of the dense head for histories (B, P, L) of `lengths` (B,).

    `state` (B, D): what the model encodes the histories to, under contexts. `known` (I, L): token ids of the
    catalogue's items, `place` (I',) catalogue row of each row of the model's table. A model that knows no
    item by itself has the beam's candidates alone.
    """
    found, spelled = beam(model, state, sids, width)
    found = found + torch.tensor(
        [sids.prompt.code_base(at) for at in range(codes.shape[-1])], device=codes.device
    )
    row = model.model.items.rows(found)
    if not len(place):
        items = _lookup(found, known)
        gone = ~torch.isfinite(spelled)
        return Candidates(items.masked_fill(gone, -1), spelled, torch.zeros_like(spelled))
    logits, batch, past = item_logits(model, state, codes, lengths)
    logs = logits.log_softmax(-1)
    # Its best of all, and its best beside the past: a rule may leave out any number of past items.
    masked = logs.index_put((batch, past), torch.tensor(-torch.inf, device=logs.device))
    count = min(width, logs.shape[1])
    best = torch.cat((logs.topk(count, dim=1).indices, masked.topk(count, dim=1).indices), dim=1)
    # What the beam has, and what came before in the row, is not taken twice.
    same = best[:, :, None] == best[:, None]
    fresh = (best[..., None] != row[:, None]).all(-1) & ~same.tril(-1).any(-1)
    asked = torch.zeros(best.shape, device=logs.device)
    owner, at = fresh.nonzero(as_tuple=True)
    asked[owner, at] = sid_scores(model, state, owner, model.model.items.codes[best[owner, at]])
    rows = torch.cat((row, torch.where(fresh, best, -1)), dim=1)
    sid = torch.cat((spelled, asked), dim=1)
    there = (rows >= 0) & torch.isfinite(sid)
    dense = logs.gather(1, rows.clamp(min=0))
    return Candidates(torch.where(there, place[rows.clamp(min=0)], -1), sid, dense)


def item_logits(
    model: GeneratorForCausalLM, state: Tensor, codes: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The dense head's logits (B, I'), and which of them are of the past: rows (M,), items (M,)."""
    logits, (batch, past, more) = _parts(model, state, codes, lengths)
    return logits.index_put((batch, past), more, accumulate=True), batch, past


def _parts(
    model: GeneratorForCausalLM, state: Tensor, codes: Tensor, lengths: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The dense head's logits (B, I') but for what is added to the past: rows, items and addends (M,)."""
    table = model.model.items.vectors(model.model.embed_tokens.weight)
    query = model.model.queries(state)
    return query @ table.T, model.model.again(query, model.model.items.rows(codes), lengths)


def _lookup(codes: Tensor, known: Tensor) -> Tensor:
    place = {tuple(row): at for at, row in enumerate(known.tolist())}
    found = [[place.get(tuple(sid), -1) for sid in row] for row in codes.tolist()]
    return torch.tensor(found, device=codes.device)


def sid_scores(model: GeneratorForCausalLM, state: Tensor, owner: Tensor, codes: Tensor) -> Tensor:
    """Log-probabilities (N,) of SIDs (N, L) of token ids, each under the state (B, D) of its `owner` (N,)."""
    total = torch.zeros(len(codes), device=state.device)
    for level in range(codes.shape[1]):
        # SIDs under one state share their first codes: each prefix is scored once.
        prefix = torch.cat((owner[:, None], codes[:, :level]), dim=1)
        asked, of = prefix.unique(dim=0, return_inverse=True)
        logs = model.step(level, state[asked[:, 0]], asked[:, 1:] if level else None)
        total += logs[of, codes[:, level] - model.config.code_range(level)[0]]
    return total


class Ranker:
    """A model over one catalogue, ready to rank histories."""

    def __init__(self, model: GeneratorForCausalLM, codes: Int64, sids: SidSet, width: int) -> None:
        """codes (I, L) token ids of the catalogue's items; `width` candidates of each head."""
        self.model, self.codes, self.sids, self.width = model.eval(), codes, sids, width
        self._where = next(model.parameters()).device
        self._known = torch.from_numpy(codes).to(self._where)
        rows = model.model.items.rows(self._known)
        # Catalogue row of each row of the model's table; the table may know items that the catalogue has not.
        self._place = torch.full((len(model.model.items.keys),), -1, dtype=torch.long, device=self._where)
        self._place[rows[rows >= 0]] = torch.arange(len(codes), device=self._where)[rows >= 0]

    @torch.no_grad()
    def states(self, histories: Sequence[Int64], contexts: Int32 | None = None) -> Tensor:
        """What the model encodes histories to (B, D), under contexts (B, C) of token ids."""
        made = torch.zeros(len(histories), self.model.config.hidden_size, device=self._where)
        # By length: a short history is not padded to the longest of all.
        lengths = np.array([len(history) for history in histories], dtype=np.int64)
        order = np.argsort(lengths, kind="stable")
        for low in range(0, len(order), ROWS):
            rows = order[low : low + ROWS]
            padded = self._padded([histories[row] for row in rows])
            about = None if contexts is None else torch.from_numpy(contexts[rows]).to(self._where).long()
            made[torch.from_numpy(rows).to(self._where)] = self.model.encode(*padded, context=about)
        return made

    @torch.no_grad()
    def candidates(self, histories: Sequence[Int64], states: Tensor | None = None) -> Candidates:
        """Both scores of every history's candidates; `states` (B, D) where they are made already."""
        states = self.states(histories) if states is None else states
        none = torch.zeros(0, 2 * self.width)
        parts = [(none.long(), none, none)] if not len(histories) else []
        for low in range(0, len(histories), ROWS):
            codes, lengths = self._padded(histories[low : low + ROWS])
            found = candidates(
                self.model, states[low : low + ROWS], codes, lengths, self.sids, self._place, self.width,
                self._known,
            )  # fmt: skip
            parts.append((found.items.cpu(), found.sid.cpu(), found.dense.cpu()))
        return Candidates(*(torch.cat(part) for part in zip(*parts, strict=True)))

    @torch.no_grad()
    def best(self, histories: Sequence[Int64], states: Tensor, k: int) -> Tensor:
        """The dense head's `k` best items (B, k) of the catalogue, which must be known by themselves.

        `candidates(...).order(1.0)` begins with them; no beam is needed for it.
        """
        parts = [torch.zeros(0, k, dtype=torch.long)]
        gone = self._place < 0
        for low in range(0, len(histories), ROWS):
            codes, lengths = self._padded(histories[low : low + ROWS])
            logits, _, _ = item_logits(self.model, states[low : low + ROWS], codes, lengths)
            rows = logits.masked_fill(gone, -torch.inf).topk(min(k, len(gone)), dim=1).indices
            parts.append(self._place[rows].cpu())
        return torch.cat(parts[1:] or parts)

    @torch.no_grad()
    def dense_logits(self, held: HeldOut) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]]:
        """Held-out targets (B,) as rows of the model's table, the dense head's logits (B, I') without what is
        added to the past, and that: rows, items and addends (M,). Items not in the catalogue have -inf."""
        states = self.states(held.histories, held.contexts)
        gone = self._place < 0
        for low in range(0, len(held.targets), ROWS):
            codes, lengths = self._padded(held.histories[low : low + ROWS])
            logits, added = _parts(self.model, states[low : low + ROWS], codes, lengths)
            asked = self._known[torch.from_numpy(held.targets[low : low + ROWS]).to(self._where)]
            yield self.model.model.items.rows(asked), logits.masked_fill(gone, -torch.inf), added

    @torch.no_grad()
    def scores(self, histories: Sequence[Int64], states: Tensor, items: Int64, weight: float) -> Tensor:
        """The mixture (B,) of both log-probabilities of one item (B,) a history, under its state (B, D)."""
        rows = torch.from_numpy(items).to(self._where)
        asked = self._known[rows]
        parts = [torch.zeros(0)]
        for low in range(0, len(histories), ROWS):
            part = slice(low, low + ROWS)
            state, codes = states[part], asked[part]
            score = (1 - weight) * sid_scores(
                self.model, state, torch.arange(len(codes), device=self._where), codes
            )
            if weight > 0:
                logits, _, _ = item_logits(self.model, state, *self._padded(histories[part]))
                own = self.model.model.items.rows(codes)[:, None]
                score = score + weight * logits.log_softmax(-1).gather(1, own)[:, 0]
            parts.append(score.cpu())
        return torch.cat(parts)

    def _padded(self, histories: Sequence[Int64]) -> tuple[Tensor, Tensor]:
        codes, lengths = pad_items(histories, self.codes)
        return codes.to(self._where), lengths.to(self._where)


class Past(NamedTuple):
    """What each candidate (B, C) is of its row's history; items that are not in it have age 0."""

    touched: npt.NDArray[np.bool_]
    bought: npt.NDArray[np.bool_]  # at any time
    age_s: Int64  # since the last touch, seconds

    def kept(self, rule: Repeats) -> Tensor:
        """Which candidates (B, C) the rule leaves in each row."""
        return torch.from_numpy(~(self.touched & left_out(rule, self.bought, self.age_s)))


def past(
    items: Tensor, histories: Sequence[Int64], ages_s: Sequence[Int64] | None = None,
    bought: Sequence[npt.NDArray[np.bool_]] | None = None,
) -> Past:  # fmt: skip
    """Look the candidates (B, C), -1 for none, up in the histories of their rows.

    `ages_s` and `bought` are those of `Held`; without them only the rules "always" and "never" can be asked.
    """
    wanted, entries = items.numpy() + 1, _joined(histories, np.int64) + 1
    rows = np.arange(len(wanted))[:, None]
    width = 1 + max(wanted.max(initial=0), entries.max(initial=0))
    # One number for an item of a row; none, as 0, is in no history.
    owner = np.repeat(rows[:, 0], np.array([len(history) for history in histories], dtype=np.int64))
    keys, of = np.unique(owner * width + entries, return_inverse=True)
    once, age = np.zeros(len(keys) + 1, dtype=bool), np.zeros(len(keys) + 1, dtype=np.int64)
    if bought is not None:
        np.logical_or.at(once, of, _joined(bought, np.bool_))
    if ages_s is not None:
        age[:-1] = np.iinfo(np.int64).max
        np.minimum.at(age, of, _joined(ages_s, np.int64))
    at = np.searchsorted(keys, rows * width + wanted)
    # The key after the last one is nobody's.
    touched = np.append(keys, -1)[at] == rows * width + wanted
    at = np.where(touched, at, len(keys))
    return Past(touched, once[at], age[at])


def _joined(rows: Sequence[npt.NDArray[Any]], kind: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype=kind), *rows])


def _past(found: Candidates, held: HeldOut) -> Past:
    return past(found.items, held.histories, held.ages_s, held.bought)


def ranks(found: Candidates, held: HeldOut, ranking: Ranking) -> Tensor:
    """Rank (B,) of each target from 0; C where it is not among the candidates that the rule leaves."""
    kept = _past(found, held).kept(ranking)
    return found.ranks(torch.from_numpy(held.targets), ranking.dense_weight, kept[None])[0]


def fit(found: Candidates, held: HeldOut, k: int = 10) -> Ranking:
    """The rule with the best NDCG at `k` on held-out events, equals going to the simpler one, and its weight.

    The weight is the largest that is within one standard error of the best (the rule of Breiman et al. 1984):
    a few thousand events do not tell .8 from 1, and the dense head alone is the steadier.
    """
    weights = WEIGHTS if torch.any(found.dense != 0) else (0.0,)
    seen, targets = _past(found, held), torch.from_numpy(held.targets)
    kept = torch.stack([seen.kept(rule) for rule in RULES])
    ranked = torch.stack([found.ranks(targets, weight, kept) for weight in weights], dim=1)
    gain, places = torch.zeros(k + 1), min(k, found.items.shape[1])
    gain[:places] = 1.0 / torch.log2(torch.arange(places) + 2.0)
    best, chosen, rule = -1.0, torch.zeros(len(weights), 0), RULES[0]
    for one, gains in zip(RULES, gain[ranked.clamp(max=k)], strict=True):
        if float(gains.mean(1).max()) > best + 1e-9:
            best, chosen, rule = float(gains.mean(1).max()), gains, one
    short = chosen[chosen.mean(1).argmax()] - chosen
    error = short.std(1, correction=0) / max(1, short.shape[1]) ** 0.5
    near = [weight for weight, near in zip(weights, (short.mean(1) <= error).tolist(), strict=True) if near]
    return Ranking(dense_weight=near[-1], repeats=rule.repeats, within_s=rule.within_s)
