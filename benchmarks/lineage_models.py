"""The items and models of `benchmarks.lineages`: what there is to show, and how a model lists it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from registry.bundles.embedder import title_vectors
from registry.bundles.prompt import Prompt
from registry.bundles.ranking import Ranking
from registry.settings import CodebookSettings
from streams.events import CatalogItem
from streams.replay import EventSource
from trainer.codebooks.fit import assign_keeping, fit_codebook_to_vectors
from trainer.evaluation.sequences import Float64, Int64
from trainer.generator.constrained import SidSet
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.ranking import ROWS_PER_FORWARD, CatalogueRanker, item_logits
from trainer.sequences.batches import pad_items
from trainer.sequences.interactions import TrainingCatalogue, training_catalogue
from trainer.sequences.tokenizer import build_tokenizer
from trainer.settings import TrainerSettings

SHOWN_ITEMS = 10
CODEBOOK_ID = "codebook"
# Clicks that an item's rate of purchase is smoothed by, as in `benchmarks.alignment`.
PRIOR_CLICKS = 20.0


@dataclass(frozen=True)
class ShopItems:
    """The shop's items with their SIDs, and what models read of them."""

    prompt: Prompt
    catalogue: TrainingCatalogue
    records: list[CatalogItem]  # in the catalogue's order
    text_vectors: npt.NDArray[np.float32]  # (I, T)
    sids: SidSet
    tokenizer: PreTrainedTokenizerFast

    @cached_property
    def row_of(self) -> dict[str, int]:
        """The row of each item in the catalogue."""
        return {name: at for at, name in enumerate(self.catalogue.item_ids)}

    @cached_property
    def prices(self) -> dict[str, float]:
        """What each item costs; 0 where the shop does not say."""
        return {record.item_id: record.price or 0.0 for record in self.records}


def shop_items(year: EventSource, settings: TrainerSettings) -> ShopItems:
    """The items of a shop's log, under a codebook of their titles alone."""
    records = sorted(year.catalogue(), key=lambda record: record.item_id)
    titles = {record.item_id: record.title for record in records}
    vectors = title_vectors(list(titles.values()))
    codebook = fit_codebook_to_vectors(
        vectors, CODEBOOK_ID, CodebookSettings.model_validate({"collaborative": 0.0}), 0
    )
    sids = assign_keeping(codebook, vectors, [None] * len(vectors))
    prompt = Prompt(codebook.sizes, settings.max_items)
    catalogue = training_catalogue(dict(zip(titles, sids, strict=True)), titles, prompt)
    return ShopItems(
        prompt, catalogue, records, vectors, SidSet(catalogue.sids, prompt),
        build_tokenizer(prompt, catalogue.titles, settings.max_words),
    )  # fmt: skip


@dataclass(frozen=True)
class ModelVersion:
    """One model, what it was aligned from, and how it makes a list."""

    number: int
    kind: str
    model: GeneratorForCausalLM
    tuned: GeneratorForCausalLM  # from which the next cycle's SFT goes on
    ranking: Ranking
    items: ShopItems
    # Token ids (C,) of what is asked for, where the model answers requests for purchases.
    request: npt.NDArray[np.int32] | None = None
    # (I,) added to each item's score, where the list is moved by rates of purchase.
    addend: Float64 | None = None

    @cached_property
    def _ranker(self) -> CatalogueRanker:
        return CatalogueRanker(self.model, self.items.catalogue.codes, self.items.sids, 2 * SHOWN_ITEMS)

    def best_items(self, pasts: Sequence[Int64], k: int) -> list[list[int]]:
        """The catalogue rows of the k best items for each history, best first; -1 where there is none.

        Where the dense head decides alone it is asked for all items; else the beam's and its own best are
        candidates. `addend` moves the score of whatever is ordered.
        """
        contexts = None if self.request is None else np.tile(self.request, (len(pasts), 1))
        states = self._ranker.states(pasts, contexts)
        addend = None if self.addend is None else torch.from_numpy(self.addend).float()
        if self.ranking.dense_weight < 1:
            candidates = self._ranker.candidates(pasts, states)
            score = candidates.score(self.ranking.dense_weight)
            if addend is not None:
                score = score + addend[candidates.items.clamp(min=0)]
            places = score.argsort(dim=1, descending=True, stable=True)[:, :k]
            return candidates.items.gather(1, places).tolist()
        if addend is None:
            return self._ranker.best_items(pasts, states, k).tolist()
        rows: list[list[int]] = []
        for low in range(0, len(pasts), ROWS_PER_FORWARD):
            part = slice(low, low + ROWS_PER_FORWARD)
            score = self._log_probabilities(pasts[part], states[part]) + addend
            rows += score.topk(k, dim=1).indices.tolist()
        return rows

    @torch.no_grad()
    def _log_probabilities(self, pasts: Sequence[Int64], states: Tensor) -> Tensor:
        """(B, I) of every item of the catalogue by the dense head."""
        codes = self.items.catalogue.codes
        logits, _, _ = item_logits(self.model, states, *pad_items(pasts, codes))
        table_rows = self.model.model.items.rows(torch.from_numpy(codes))
        return logits[:, table_rows].log_softmax(-1)


def log_purchase_rates(items: Sequence[str], bought: Sequence[bool], row_of: dict[str, int]) -> Float64:
    """(I,) log((b + PRIOR p) / (n + PRIOR)) of an item that was bought in b of n clicks; p of all clicks.

    `items`, `bought` (N,): clicks and purchases, a purchase beside the click that led to it.
    """
    clicks, orders = np.zeros(len(row_of)), np.zeros(len(row_of))
    rows = np.array([row_of[item] for item in items], dtype=np.int64)
    is_order = np.asarray(bought, dtype=bool)
    np.add.at(orders, rows[is_order], 1)
    np.add.at(clicks, rows[~is_order], 1)
    mean = orders.sum() / max(1.0, clicks.sum())
    return np.log((orders + PRIOR_CLICKS * max(mean, 1e-6)) / (clicks + PRIOR_CLICKS))
