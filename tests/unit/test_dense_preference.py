"""The dense head's preference term is DPO on its log-probabilities, said by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from registry.prompt import BOS, PAD
from tests.tiny_shop import Shop, shop
from trainer.dense_preference import dense_preference_loss
from trainer.generator import GeneratorForCausalLM

BETA, WEIGHT, SFT = 0.3, 0.7, 0.2
HISTORIES = [[3, 4], [], [7, 1, 1, 9]]
# What is said beside each history: places among the tokens of the context; once as many as an item has codes.
SAID = [[1, 0, 1, 1], [0], []]
CHOSEN, REJECTED = [5, 0, 2], [6, 11, 3]


@pytest.fixture(scope="module")
def made() -> Shop:
    return shop(scenes=True)


def told(made: Shop, said: list[int]) -> list[int]:
    return [made.context.first + at for at in said]


def pair(made: Shop) -> tuple[GeneratorForCausalLM, GeneratorForCausalLM]:
    """A policy and a reference that differ in both heads."""
    policy = made.model(seed=1)
    with torch.no_grad():
        policy.model.items.own.normal_(0, 0.5)
        policy.model.embed_tokens.weight[made.context.first :].normal_(0, 1)
        for parameter in policy.model.modulation.parameters():
            parameter.normal_(0, 0.2)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        policy.model.items.own.add_(0.1 * torch.randn(policy.model.items.own.shape))
    return policy, reference


def rows(made: Shop) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts and answers as TRL makes them, chosen first, padded on the right."""
    flat, completion = [], []
    for answers in (CHOSEN, REJECTED):
        for history, said, answer in zip(HISTORIES, SAID, answers, strict=True):
            prompt = [BOS, *made.known.codes[history].ravel().tolist(), *told(made, said)]
            flat.append(prompt + made.known.codes[answer].tolist())
            completion.append([0] * len(prompt) + [1] * 3)
    length = max(map(len, flat))
    fill = [length - len(row) for row in flat]
    ids = [row + [PAD] * more for row, more in zip(flat, fill, strict=True)]
    marks = [row + [0] * more for row, more in zip(completion, fill, strict=True)]
    return torch.tensor(ids), torch.tensor(marks)


def logs(model: GeneratorForCausalLM, made: Shop, history: list[int], said: list[int]) -> torch.Tensor:
    """Log-probabilities of all items by the dense head, in the order of the catalogue."""
    codes = torch.from_numpy(made.known.codes)
    padded = codes[history][None] if history else codes[:1][None]
    context = torch.tensor([told(made, said) or [0]])
    state = model.encode(padded, torch.tensor([len(history)]), context=context)
    every = model.model.embed_items(codes)
    return (model.model.queries(state) @ every.T)[0].log_softmax(-1)


def test_the_loss_is_dpo_over_items_and_the_chosen_ones_cross_entropy(made: Shop) -> None:
    policy, reference = pair(made)
    ids, completion = rows(made)
    with torch.no_grad():
        found = dense_preference_loss(policy, reference, ids, completion, BETA, WEIGHT, SFT)
        margins, losses = [], []
        for *asked, chosen, rejected in zip(HISTORIES, SAID, CHOSEN, REJECTED, strict=True):
            now, before = logs(policy, made, *asked), logs(reference, made, *asked)
            margins.append((now[chosen] - now[rejected]) - (before[chosen] - before[rejected]))
            losses.append(-now[chosen])
    wanted = -WEIGHT * F.logsigmoid(BETA * torch.stack(margins)).mean() + SFT * torch.stack(losses).mean()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_policy_that_is_its_reference_has_the_loss_of_no_preference(made: Shop) -> None:
    policy, _ = pair(made)
    ids, completion = rows(made)
    loss = dense_preference_loss(policy, policy, ids, completion, BETA, 1.0, 0.0)
    assert float(loss) == pytest.approx(float(torch.log(torch.tensor(2.0))), abs=1e-5)


def test_a_step_down_the_loss_raises_every_chosen_item_over_its_rejected_one(made: Shop) -> None:
    policy, reference = pair(made)
    ids, completion = rows(made)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    asked = list(zip(HISTORIES, SAID, strict=True))
    before = [logs(policy, made, *one) for one in asked]
    dense_preference_loss(policy, reference, ids, completion, BETA, 1.0, 0.0).backward()
    optimizer.step()
    after = [logs(policy, made, *one) for one in asked]
    for one, other, chosen, rejected in zip(before, after, CHOSEN, REJECTED, strict=True):
        assert float(other[chosen] - other[rejected]) > float(one[chosen] - one[rejected])


def test_pairs_of_items_that_the_model_does_not_know_by_themselves_are_left_out(made: Shop) -> None:
    policy, reference = pair(made)
    ids, completion = rows(made)
    for model in (policy, reference):
        model.know(torch.zeros(0, 3, dtype=torch.long))
    assert float(dense_preference_loss(policy, reference, ids, completion, BETA, WEIGHT, SFT)) == 0.0
