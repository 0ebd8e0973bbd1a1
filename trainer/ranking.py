"""Items ranked by both heads: the beam's spelling of SIDs, and the dense head's product with all items.

Candidates are the beam's and the dense head's own best. Each gets both log-probabilities, and their mixture
is the order. The weight, and the rule about past items, are fitted on held-out events (registry.ranking).

Shapes: B rows, C candidates, D width, I items of the table, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from registry.ranking import Ranking, left_out
from trainer.constrained import SidSet, beam
from trainer.data import Held, Int32, Int64, context_rows, pad_items
from trainer.generator import GeneratorForCausalLM

# Rows of one forward: beams of 256 rows stay near the cache.
_ROWS = 256
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

    def order(self, weight: float, kept: Tensor | None = None) -> Tensor:
        """Items (B, C) best first under a weight; those that are not `kept` (B, C) come last, as -1."""
        score = (1 - weight) * self.sid if weight < 1 else torch.zeros_like(self.sid)
        if weight > 0:
            score = score + weight * self.dense
        there = self.items >= 0 if kept is None else (self.items >= 0) & kept
        score = score.masked_fill(~there, -torch.inf)
        at = score.argsort(dim=1, descending=True, stable=True)
        return torch.where(there, self.items, -1).gather(1, at)


@torch.no_grad()
def candidates(
    model: GeneratorForCausalLM, codes: Tensor, lengths: Tensor, sids: SidSet, place: Tensor, width: int,
    known: Tensor, context: Tensor | None = None,
) -> Candidates:  # fmt: skip
    """The `width` best of the beam and of the dense head for histories (B, P, L) of `lengths` (B,), under
    contexts (B, C).

    `known` (I, L): token ids of the catalogue's items, `place` (I',) catalogue row of each row of the model's
    table. A model that knows no item by itself has the beam's candidates alone.
    """
    state = model.encode(codes, lengths, context=context)
    found, spelled = beam(model, state, sids, width)
    found = found + torch.tensor(
        [sids.prompt.code_base(at) for at in range(codes.shape[-1])], device=codes.device
    )
    row = model.model.items.rows(found)
    if not len(place):
        items = _lookup(found, known)
        gone = ~torch.isfinite(spelled)
        return Candidates(items.masked_fill(gone, -1), spelled, torch.zeros_like(spelled))
    table = model.model.items.vectors(model.model.embed_tokens.weight)
    logits = model.model.queries(state) @ table.T
    batch, past, more = model.model.again(model.model.items.rows(codes), lengths)
    logs = logits.index_put((batch, past), more, accumulate=True).log_softmax(-1)
    # Its best of all, and its best beside the past: a rule may leave out any number of past items.
    masked = logs.index_put((batch, past), torch.tensor(-torch.inf, device=logs.device))
    count = min(width, logs.shape[1])
    best = torch.cat((logs.topk(count, dim=1).indices, masked.topk(count, dim=1).indices), dim=1)
    # What the beam has, and what came before in the row, is not taken twice.
    same = best[:, :, None] == best[:, None]
    fresh = (best[..., None] != row[:, None]).all(-1) & ~same.tril(-1).any(-1)
    asked = sid_scores(model, state, model.model.items.codes[best])
    rows = torch.cat((row, torch.where(fresh, best, -1)), dim=1)
    sid = torch.cat((spelled, asked), dim=1)
    there = (rows >= 0) & torch.isfinite(sid)
    dense = logs.gather(1, rows.clamp(min=0))
    return Candidates(torch.where(there, place[rows.clamp(min=0)], -1), sid, dense)


def _lookup(codes: Tensor, known: Tensor) -> Tensor:
    place = {tuple(row): at for at, row in enumerate(known.tolist())}
    found = [[place.get(tuple(sid), -1) for sid in row] for row in codes.tolist()]
    return torch.tensor(found, device=codes.device)


def sid_scores(model: GeneratorForCausalLM, state: Tensor, codes: Tensor) -> Tensor:
    """Log-probabilities (B, C) of SIDs (B, C, L) of token ids under states (B, D)."""
    batch, count, levels = codes.shape
    spread, flat = state.repeat_interleave(count, 0), codes.reshape(-1, levels)
    total = torch.zeros(len(flat), device=state.device)
    for level in range(levels):
        logs = model.step(level, spread, flat[:, :level] if level else None)
        total += logs.gather(1, flat[:, level, None] - model.config.code_range(level)[0])[:, 0]
    return total.view(batch, count)


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
    def candidates(self, histories: Sequence[Int64], contexts: Int32 | None = None) -> Candidates:
        """Both scores of every history's candidates; contexts (B, C) token ids, 0 where nothing is said."""
        none = torch.zeros(0, 2 * self.width)
        parts = [(none.long(), none, none)] if not len(histories) else []
        for low in range(0, len(histories), _ROWS):
            items, lengths = pad_items(histories[low : low + _ROWS], self.codes)
            found = candidates(
                self.model, items.to(self._where), lengths.to(self._where), self.sids, self._place,
                self.width, self._known, context_rows(contexts, low, low + _ROWS, self._where),
            )  # fmt: skip
            parts.append((found.items.cpu(), found.sid.cpu(), found.dense.cpu()))
        return Candidates(*(torch.cat(part) for part in zip(*parts, strict=True)))


def kept(found: Candidates, held: Held, ranking: Ranking) -> Tensor:
    """Which candidates (B, C) the rule about past items leaves in each row."""
    made = torch.ones(found.items.shape, dtype=torch.bool)
    if ranking.repeats == "always":
        return made
    for row, (history, ages, bought) in enumerate(zip(held.histories, held.ages_s, held.bought, strict=True)):
        gone = history[left_out(ranking, bought, ages)]
        made[row] = ~torch.isin(found.items[row], torch.from_numpy(np.unique(gone)))
    return made


def ranks(found: Candidates, held: Held, ranking: Ranking) -> Tensor:
    """Rank (B,) of each target from 0; C where it is not among the candidates that the rule leaves."""
    order = found.order(ranking.dense_weight, kept(found, held, ranking))
    same = order == torch.from_numpy(held.targets)[:, None]
    return torch.where(same.any(1), same.int().argmax(1), order.shape[1])


def fit(found: Candidates, held: Held, k: int = 10) -> Ranking:
    """The rule with the best NDCG at `k` on held-out events, equals going to the simpler one, and its weight.

    The weight is the largest that is within one standard error of the best (the rule of Breiman et al. 1984):
    a few thousand events do not tell .8 from 1, and the dense head alone is the steadier.
    """
    weights = WEIGHTS if torch.any(found.dense != 0) else (0.0,)
    best, chosen, rule = -1.0, torch.zeros(len(weights), 0), RULES[0]
    for one in RULES:
        left = kept(found, held, one)
        gains = torch.stack([_gains(found.order(weight, left)[:, :k], held) for weight in weights])
        if float(gains.mean(1).max()) > best + 1e-9:
            best, chosen, rule = float(gains.mean(1).max()), gains, one
    short = chosen[chosen.mean(1).argmax()] - chosen
    error = short.std(1, correction=0) / max(1, short.shape[1]) ** 0.5
    near = [weight for weight, near in zip(weights, (short.mean(1) <= error).tolist(), strict=True) if near]
    return Ranking(dense_weight=near[-1], repeats=rule.repeats, within_s=rule.within_s)


def _gains(order: Tensor, held: Held) -> Tensor:
    """NDCG (B,) of each row's order (B, k)."""
    same = order == torch.from_numpy(held.targets)[:, None]
    return torch.where(same, 1.0 / torch.log2(torch.arange(same.shape[1]) + 2.0), 0.0).sum(1)
