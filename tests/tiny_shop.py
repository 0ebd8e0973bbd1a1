"""A shop of a few items whose next item follows from the last one: small enough to learn in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from registry.bundles.context import Context, vocabulary
from registry.bundles.prompt import Prompt
from registry.hold_out import HoldOut
from trainer.generator.constrained import SidSet
from trainer.generator.model import GeneratorForCausalLM, new_generator
from trainer.sequences.held_out import TrainingSplit, split_log
from trainer.sequences.interactions import Interactions, TrainingCatalogue, training_catalogue, user_sequences
from trainer.sequences.rows import TrainingRows
from trainer.sequences.tokenizer import build_tokenizer
from trainer.settings import TrainerSettings

SIZES = (4, 3, 5)
ITEMS = 24


@dataclass(frozen=True)
class Shop:
    """All that a training run needs."""

    settings: TrainerSettings
    prompt: Prompt
    catalogue: TrainingCatalogue
    whole_log: Interactions
    split: TrainingSplit
    tokenizer: PreTrainedTokenizerFast
    sids: SidSet
    rows: TrainingRows
    context: Context = field(default_factory=Context)

    @property
    def log(self) -> Interactions:
        """What is learned from, as in the inputs of a cycle."""
        return self.split.log

    def model(self, seed: int = 0, **shape: Any) -> GeneratorForCausalLM:
        """A generator of width 32 with fresh weights."""
        torch.manual_seed(seed)
        default_shape = {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "depth_size": 32,
        }
        default_shape["item_vectors"] = self.settings.item_vectors
        generator = new_generator(
            SIZES, self.prompt.code_base(0), len(self.tokenizer) + self.context.size,
            max_items=self.prompt.max_items, num_context=self.context.size,
            **default_shape | {"dropout": 0.0} | shape,
        ).eval()  # fmt: skip
        if not generator.config.text_size:
            generator.set_items(torch.from_numpy(self.catalogue.codes))
        return generator

    def outspoken(self, seed: int = 0) -> GeneratorForCausalLM:
        """A generator whose two heads rank otherwise, and to which it matters where an item's past is."""
        generator = self.model(seed)
        with torch.no_grad():
            generator.model.items.own.normal_(0, 0.5)
            generator.model.items.query_proj.weight.normal_(0, 0.3)
            generator.model.items.repeat_vectors.normal_(0, 1)
        return generator


def come_again(model: GeneratorForCausalLM, query: Tensor, history: list[int], item: int) -> float:
    """What the dense head adds to an item of a past (oldest first) under a query (D,), said by hand."""
    rows = model.model.items.repeat_vectors
    distance, count = history[::-1].index(item) + 1, history.count(item)
    near = next(at for at in range(8) if distance <= 2**at or at == 7)
    often = next(at for at in range(5) if count <= 2**at or at == 4)
    return float(query @ rows[near] + query @ rows[8 + often])


def sid_of(item: int) -> tuple[int, int, int]:
    """Distinct SIDs for items 0 to 59."""
    return item % 4, item // 4 % 3, item // 12 % 5


def shop(
    users: int = 40, length: int = 12, scenes: bool = False, back: bool = False, **settings: Any
) -> Shop:
    """Users who walk through the items one after the other, each from a start of their own.

    With `scenes` they go to the next item in the scene `up`, and to the one before in the scene `down`.
    With `back` they go to and fro between their start and the item seven further.
    """
    torch.set_num_threads(1)
    chosen = TrainerSettings.model_validate(
        {
            "max_items": 8,
            "validation_share": 0.25,
            "batch_positions": 64,
            "lr": 5e-3,
            "max_seconds": None,
            "epochs": 2,
        }
        | settings
    )
    prompt = Prompt(SIZES, chosen.max_items)
    titles = {f"i{item:02}": f"red item number {item % 4}" for item in range(ITEMS)}
    items_with_sid = training_catalogue(
        {f"i{item:02}": sid_of(item) for item in range(ITEMS)}, titles, prompt
    )
    rng = np.random.default_rng(3)
    names, stamps, items, places = [], [], [], []
    for user in range(users):
        start = int(rng.integers(ITEMS))
        up = rng.random(length) < 0.5 if scenes else np.ones(length, dtype=bool)
        for at in range(length):
            names.append(f"u{user}")
            stamps.append(1_600_000_000_000 + at)
            item = start + int(np.where(up[1 : at + 1], 1, -1).sum())
            item = start + 7 * (at % 2) if back else item
            items.append(f"i{item % ITEMS:02}")
            places.append("up" if up[at] else "down")
    tokenizer = build_tokenizer(prompt, items_with_sid.titles, chosen.max_words)
    counts = {"scene": {"up": 2, "down": 1}} if scenes else {}
    context = vocabulary(counts, len(tokenizer), 1, 64, 8)
    log = user_sequences(names, stamps, items, items_with_sid, context=context.rows(places, names, {}))
    split = split_log(log, HoldOut(share=chosen.validation_share), chosen)
    rows = TrainingRows(split, items_with_sid, tokenizer, prompt, chosen)
    return Shop(
        chosen,
        prompt,
        items_with_sid,
        log,
        split,
        tokenizer,
        SidSet(items_with_sid.sids, prompt),
        rows,
        context,
    )
