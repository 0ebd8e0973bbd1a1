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
from trainer.tuning.losses import ItemBias, softmax_loss
from trainer.tuning.optimization import ClippedAdamW

STEPS, BATCH, LR = 120, 64, 5e-4
# Strength of the pull to the reference, in MODPO; weight of the next-item loss beside it, where it has one.
BETA, NEXT_ITEM = 0.1, 1.0
# How much more an interaction weighs that brings the most, in the models that a soup is made of: e^5.
REWARD_SHARPNESS = 5.0
# What is left to relevance, of the sum of all weights.
RELEVANCE = 0.5


@dataclass
class RewardTrainingSet:
    """Recent interactions of the training part: histories, what came next, and what else was likely."""

    histories: list[Int64]
    targets: Int64
    likely: Int64  # (N, C) the reference's best items


def reward_training_set(
    trained: TrainedGenerator, histories: list[Int64], targets: Int64
) -> RewardTrainingSet:
    """Interactions with the twenty items that the model finds likely before each."""
    newest = [row[-trained.settings.max_items :] for row in histories]
    return RewardTrainingSet(
        newest, targets, trained.ranker.best_items(newest, trained.ranker.states(newest), 20).numpy()
    )


def train_modpo(
    trained: TrainedGenerator, training_set: RewardTrainingSet, rewards: Mapping[str, Float64],
    weights: Mapping[Reward, float], seed: int, next_item: float = 0.0,
) -> GeneratorForCausalLM:  # fmt: skip
    """One model for one preference: -log sigmoid(1/w_0 (beta margin - w . (r_chosen - r_rejected))).

    `rewards`: bins (I,) over the highest, by name; `weights` of them, which share 1 - RELEVANCE; w_0 is
    RELEVANCE, the weight of what was clicked over what was only likely. `next_item`: weight of the next-item
    loss, which the paper has not, and without which items that nobody clicks rise.
    """
    total = sum(weights.values()) or 1.0
    gain = sum((1 - RELEVANCE) * weight / total * rewards[name] for name, weight in weights.items())
    item_gain = torch.tensor(
        np.broadcast_to(gain, (len(trained.catalogue.codes),)).copy(), dtype=torch.float32
    )
    reference = trained.model

    def loss(policy: GeneratorForCausalLM, rows: Int64, random: np.random.Generator) -> Tensor:
        likely = training_set.likely[rows, random.integers(training_set.likely.shape[1], size=len(rows))]
        chosen, rejected = torch.from_numpy(training_set.targets[rows]), torch.from_numpy(likely)
        policy_logits, query, item_vectors, bias = _logits(trained, policy, training_set, rows)
        with torch.no_grad():
            reference_logits = _logits(trained, reference, training_set, rows)[0]
        change = policy_logits - reference_logits
        margin = change.gather(1, chosen[:, None])[:, 0] - change.gather(1, rejected[:, None])[:, 0]
        margin_over_reward = BETA * margin - (item_gain[chosen] - item_gain[rejected])
        modpo_loss = -F.logsigmoid(margin_over_reward / RELEVANCE)[chosen != rejected].mean()
        if not next_item:
            return modpo_loss
        target = trained.model.model.items.rows(
            torch.from_numpy(trained.catalogue.codes[training_set.targets[rows]])
        )
        return modpo_loss + next_item * softmax_loss(query, item_vectors, target, bias=bias)

    # Without dropout, as the reference: a margin starts at 0.
    return _train_policy(trained.model, loss, len(training_set.targets), seed, dropout=False)


def train_soup_parts(
    trained: TrainedGenerator, training_set: RewardTrainingSet, rewards: Mapping[str, Float64], seed: int
) -> dict[str, GeneratorForCausalLM]:
    """The model that goes on as it is ("") and one a reward, whose rows weigh e^(REWARD_SHARPNESS r)."""

    def part(values: Float64 | None) -> GeneratorForCausalLM:
        def loss(policy: GeneratorForCausalLM, rows: Int64, random: np.random.Generator) -> Tensor:
            _, query, item_vectors, bias = _logits(trained, policy, training_set, rows, with_logits=False)
            target = trained.model.model.items.rows(
                torch.from_numpy(trained.catalogue.codes[training_set.targets[rows]])
            )
            row_weights = None
            if values is not None:
                row_weights = torch.tensor(
                    np.exp(REWARD_SHARPNESS * values[training_set.targets[rows]]), dtype=torch.float32
                )
            return softmax_loss(query, item_vectors, target, bias=bias, weights=row_weights)

        return _train_policy(trained.model, loss, len(training_set.targets), seed)

    return {"": part(None)} | {name: part(values) for name, values in rewards.items()}


def average_soup(
    parts: Mapping[str, GeneratorForCausalLM], weights: Mapping[Reward, float]
) -> GeneratorForCausalLM:
    """The average of the parts' weights: RELEVANCE of the plain one, the rest by preference."""
    total = sum(weights.values())
    shares: dict[str, float] = (
        {name: (1 - RELEVANCE) * weight / total for name, weight in weights.items()} if total else {}
    )
    shares[""] = 1.0 - sum(shares.values())
    trained = copy.deepcopy(parts[""])
    with torch.no_grad():
        for name, value in trained.named_parameters():
            value.copy_(sum(share * dict(parts[of].named_parameters())[name] for of, share in shares.items()))
    return trained


def _train_policy(
    start: GeneratorForCausalLM,
    loss: Callable[[GeneratorForCausalLM, Int64, np.random.Generator], Tensor],
    count: int,
    seed: int,
    dropout: bool = True,
) -> GeneratorForCausalLM:
    policy, random = copy.deepcopy(start).train(dropout), np.random.default_rng(seed)
    torch.manual_seed(seed)
    optimizer = ClippedAdamW(policy.parameters(), lr=LR)
    batches = (random.integers(count, size=BATCH) for _ in range(STEPS))
    for rows in batches:
        optimizer.minimise(loss(policy, rows, random))
    return policy.eval()


def _logits(
    trained: TrainedGenerator,
    model: GeneratorForCausalLM,
    training_set: RewardTrainingSet,
    rows: Int64,
    with_logits: bool = True,
) -> tuple[Tensor, Tensor, Tensor, ItemBias]:
    """The dense head's logits (B, I) in the order of the catalogue; what they are made of, by table row."""
    codes, lengths = pad_items(
        [training_set.histories[row] for row in rows.tolist()], trained.catalogue.codes
    )
    query = model.model.queries(model.encode(codes, lengths))
    item_vectors = model.model.items.vectors(model.model.embed_tokens.weight)
    bias = ItemBias(*model.model.repeat_bias_at_places(query, model.model.items.rows(codes), lengths))
    if not with_logits:
        return query, query, item_vectors, bias
    logits = bias.added_to(query @ item_vectors.T)
    in_catalogue = model.model.items.rows(torch.from_numpy(trained.catalogue.codes))
    return logits[:, in_catalogue], query, item_vectors, bias
