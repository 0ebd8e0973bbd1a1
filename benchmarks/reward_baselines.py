"""Two published ways to serve several rewards, beside rewards in context: MODPO and Reward Soups.

Both start from a generator that learned without rewards, and train its dense head's order, which is what the
benchmark ranks by. MODPO (Zhou et al. 2024, arXiv 2310.03708, equation 11) trains one model a preference.
Reward Soups (Rame et al. 2023, arXiv 2306.04488) trains one model a reward and averages their weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from streams.events import Reward
from trainer.evaluation.generator_ranker import TrainedGenerator
from trainer.evaluation.sequences import Float64, Int64
from trainer.generator.model import GeneratorForCausalLM
from trainer.sequences.batches import pad_items
from trainer.tuning.losses import softmax_loss
from trainer.tuning.optimization import ClippedAdamW, train_on_batches

STEPS, BATCH, LR = 120, 64, 5e-4
# Strength of the pull to the reference, in MODPO; weight of the next-item loss beside it, where it has one.
BETA, NEXT_ITEM = 0.1, 1.0
# How much more an interaction weighs that brings the most, in the models that a soup is made of: e^5.
SHARP = 5.0
# What is left to relevance, of the sum of all weights.
RELEVANCE = 0.5


@dataclass
class Lesson:
    """Recent interactions of the training part: histories, what came next, and what else was likely."""

    histories: list[Int64]
    targets: Int64
    likely: Int64  # (N, C) the reference's best items


def lesson(made: TrainedGenerator, histories: list[Int64], targets: Int64) -> Lesson:
    """Interactions with the twenty items that the model finds likely before each."""
    newest = [row[-made.settings.max_items :] for row in histories]
    return Lesson(newest, targets, made.ranker.best_items(newest, made.ranker.states(newest), 20).numpy())


def modpo(
    made: TrainedGenerator, seen: Lesson, rewards: Mapping[str, Float64], weights: Mapping[Reward, float],
    seed: int, next_item: float = 0.0,
) -> GeneratorForCausalLM:  # fmt: skip
    """One model for one preference: -log sigmoid(1/w_0 (beta margin - w . (r_chosen - r_rejected))).

    `rewards`: bins (I,) over the highest, by name; `weights` of them, which share 1 - RELEVANCE; w_0 is
    RELEVANCE, the weight of what was clicked over what was only likely. `next_item`: weight of the next-item
    loss, which the paper has not, and without which items that nobody clicks rise.
    """
    total = sum(weights.values()) or 1.0
    gain = sum((1 - RELEVANCE) * weight / total * rewards[name] for name, weight in weights.items())
    worth = torch.tensor(np.broadcast_to(gain, (len(made.catalogue.codes),)).copy(), dtype=torch.float32)
    reference = made.model

    def loss(policy: GeneratorForCausalLM, rows: Int64, random: np.random.Generator) -> Tensor:
        likely = seen.likely[rows, random.integers(seen.likely.shape[1], size=len(rows))]
        chosen, rejected = torch.from_numpy(seen.targets[rows]), torch.from_numpy(likely)
        now, query, every, (past, more) = _logits(made, policy, seen, rows)
        with torch.no_grad():
            before = _logits(made, reference, seen, rows)[0]
        risen = now - before
        margin = risen.gather(1, chosen[:, None])[:, 0] - risen.gather(1, rejected[:, None])[:, 0]
        push = BETA * margin - (worth[chosen] - worth[rejected])
        pulled = -F.logsigmoid(push / RELEVANCE)[chosen != rejected].mean()
        if not next_item:
            return pulled
        target = made.model.model.items.rows(torch.from_numpy(made.catalogue.codes[seen.targets[rows]]))
        return pulled + next_item * softmax_loss(query, every, target, 0.0, past, more)

    return _trained(made.model, loss, len(seen.targets), seed)


def soup_parts(made: TrainedGenerator, seen: Lesson, rewards: Mapping[str, Float64], seed: int
               ) -> dict[str, GeneratorForCausalLM]:  # fmt: skip
    """The model that goes on as it is ("") and one a reward, whose interactions weigh e^(SHARP r)."""

    def part(values: Float64 | None) -> GeneratorForCausalLM:
        def loss(policy: GeneratorForCausalLM, rows: Int64, random: np.random.Generator) -> Tensor:
            _, query, every, places = _logits(made, policy, seen, rows, whole=False)
            target = made.model.model.items.rows(torch.from_numpy(made.catalogue.codes[seen.targets[rows]]))
            heavy = None
            if values is not None:
                heavy = torch.tensor(np.exp(SHARP * values[seen.targets[rows]]), dtype=torch.float32)
            return softmax_loss(query, every, target, 0.0, places[0], places[1], heavy)

        return _trained(made.model, loss, len(seen.targets), seed)

    return {"": part(None)} | {name: part(values) for name, values in rewards.items()}


def soup(parts: Mapping[str, GeneratorForCausalLM], weights: Mapping[Reward, float]) -> GeneratorForCausalLM:
    """The average of the parts' weights: RELEVANCE of the plain one, the rest by preference."""
    total = sum(weights.values())
    shares: dict[str, float] = (
        {name: (1 - RELEVANCE) * weight / total for name, weight in weights.items()} if total else {}
    )
    shares[""] = 1.0 - sum(shares.values())
    made = copy.deepcopy(parts[""])
    with torch.no_grad():
        for name, value in made.named_parameters():
            value.copy_(sum(share * dict(parts[of].named_parameters())[name] for of, share in shares.items()))
    return made


def _trained(
    start: GeneratorForCausalLM,
    loss: Callable[[GeneratorForCausalLM, Int64, np.random.Generator], Tensor],
    count: int,
    seed: int,
) -> GeneratorForCausalLM:
    policy, random = copy.deepcopy(start).train(), np.random.default_rng(seed)
    policy.model.items.item_dropout = 0.0
    torch.manual_seed(seed)
    optimizer = ClippedAdamW(policy.parameters(), lr=LR)
    batches = (random.integers(count, size=BATCH) for _ in range(STEPS))
    train_on_batches(optimizer, batches, lambda rows: loss(policy, rows, random))
    return policy.eval()


def _logits(
    made: TrainedGenerator, model: GeneratorForCausalLM, seen: Lesson, rows: Int64, whole: bool = True
) -> tuple[Tensor, Tensor, Tensor, tuple[tuple[Tensor, Tensor], Tensor]]:
    """The dense head's logits (B, I) in the order of the catalogue; what they are made of, by table row."""
    codes, lengths = pad_items([seen.histories[row] for row in rows.tolist()], made.catalogue.codes)
    query = model.model.queries(model.encode(codes, lengths))
    every = model.model.items.vectors(model.model.embed_tokens.weight)
    batch, past, more = model.model.repeat_bias(query, model.model.items.rows(codes), lengths)
    places = ((batch, past), more)
    if not whole:
        return query, query, every, places
    logits = (query @ every.T).index_put((batch, past), more, accumulate=True)
    return logits[:, model.model.items.rows(torch.from_numpy(made.catalogue.codes))], query, every, places
