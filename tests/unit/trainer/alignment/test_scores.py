"""What each head says of the answers of a batch, against the same said by hand; what cancels in a margin."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from registry.bundles.prompt import BOS, PAD
from tests.tiny_shop import ITEMS, Shop, come_again, shop
from trainer.alignment.rows import PreferenceRow, collate_preferences
from trainer.alignment.scores import score_answers
from trainer.generator.model import GeneratorForCausalLM

# The last history holds answers: what the dense head adds to items of the past counts.
HISTORIES = [[3, 4], [], [7, 1, 1, 9], [2, 5, 8, 5, 6]]
# What is said beside each history: places among the tokens of the context; once as many as an item has codes.
SAID = [[1, 0, 1, 1], [0], [], [1]]
CHOSEN, REJECTED = [5, 0, 2, 5], [[6], [11, 1], [3, 9, 14], [2, 6]]


@pytest.fixture(scope="module")
def tiny_shop() -> Shop:
    return shop(scenes=True)


@pytest.fixture(scope="module")
def model(tiny_shop: Shop) -> GeneratorForCausalLM:
    policy = tiny_shop.outspoken(seed=1)
    with torch.no_grad():
        policy.model.embed_tokens.weight[tiny_shop.context.first :].normal_(0, 1)
        for parameter in policy.model.modulation.parameters():
            parameter.normal_(0, 0.2)
    return policy


def context_token_ids(tiny_shop: Shop, context_tokens: list[int]) -> list[int]:
    return [tiny_shop.context.first + at for at in context_tokens]


def row(tiny_shop: Shop, at: int) -> PreferenceRow:
    def tokens(item: int) -> list[int]:
        codes: list[int] = tiny_shop.catalogue.codes[item].tolist()
        return codes

    prompt = [
        BOS,
        *(token for item in HISTORIES[at] for token in tokens(item)),
        *context_token_ids(tiny_shop, SAID[at]),
    ]
    return PreferenceRow(
        prompt_ids=prompt, chosen_ids=tokens(CHOSEN[at]), rejected_ids=[tokens(i) for i in REJECTED[at]]
    )


def batch_of(tiny_shop: Shop) -> dict[str, Tensor]:
    return collate_preferences([row(tiny_shop, at) for at in range(len(HISTORIES))], PAD)


def spelled(model: GeneratorForCausalLM, prompt: list[int], answer: list[int]) -> float:
    """Log-probability of a SID, by the flat tokens' way."""
    logs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(logs[len(prompt) - 1 + at, token]) for at, token in enumerate(answer))


def liked(model: GeneratorForCausalLM, tiny_shop: Shop, at: int) -> Tensor:
    """Log-probabilities of all items by the dense head, in the order of the catalogue."""
    history = HISTORIES[at]
    codes = torch.from_numpy(tiny_shop.catalogue.codes)
    padded = codes[history][None] if history else codes[:1][None]
    state = model.encode(
        padded,
        torch.tensor([len(history)]),
        context=torch.tensor([context_token_ids(tiny_shop, SAID[at]) or [0]]),
    )
    query = model.model.queries(state)
    logits = (query @ model.model.embed_items(codes).T)[0]
    for item in set(history):
        logits[item] += come_again(model, query[0], list(history), item)
    return logits.log_softmax(-1)


def test_a_batch_is_all_chosen_answers_then_all_first_rejected_ones(tiny_shop: Shop) -> None:
    batch = batch_of(tiny_shop)
    assert batch["input_ids"].shape[0] == 4 * 4
    assert batch["real"].tolist() == [
        [True, False, False], [True, True, False], [True, True, True], [True, True, False]
    ]  # fmt: skip
    for k in range(4):
        for at in range(4):
            preference, place = row(tiny_shop, at), 4 * k + at
            answers = [preference["chosen_ids"], *preference["rejected_ids"]]
            answer = answers[k] if k < len(answers) else preference["chosen_ids"]
            inside = batch["attention_mask"][place].bool()
            assert batch["input_ids"][place][inside].tolist() == preference["prompt_ids"] + answer
            marked = batch["completion_mask"][place].bool()
            assert batch["input_ids"][place][marked].tolist() == answer
            assert bool((batch["input_ids"][place][~inside] == PAD).all())


@torch.no_grad()
def test_the_sids_head_says_what_the_flat_model_says(tiny_shop: Shop, model: GeneratorForCausalLM) -> None:
    head = score_answers(model, batch_of(tiny_shop))[0]
    losses = []
    for at in range(4):
        preference = row(tiny_shop, at)
        for k, answer in enumerate([preference["chosen_ids"], *preference["rejected_ids"]]):
            expected = spelled(model, preference["prompt_ids"], answer)
            assert float(head.scores[k, at]) == pytest.approx(expected, abs=1e-4)
        losses.append(-spelled(model, preference["prompt_ids"], preference["chosen_ids"]) / 3)
    assert float(head.nll) == pytest.approx(sum(losses) / 4, abs=1e-4)


@torch.no_grad()
def test_the_dense_head_says_log_probabilities_of_items_less_one_number_a_prompt(
    tiny_shop: Shop, model: GeneratorForCausalLM
) -> None:
    head = score_answers(model, batch_of(tiny_shop))[1]
    losses = []
    for at in range(4):
        logs = liked(model, tiny_shop, at)
        losses.append(-float(logs[CHOSEN[at]]))
        for k, item in enumerate(REJECTED[at], 1):
            expected = float(logs[CHOSEN[at]] - logs[item])
            assert float(head.scores[0, at] - head.scores[k, at]) == pytest.approx(expected, abs=1e-4)
    assert float(head.nll) == pytest.approx(sum(losses) / 4, abs=1e-4)


def test_items_that_are_not_known_by_themselves_leave_the_dense_head_out(
    tiny_shop: Shop, model: GeneratorForCausalLM
) -> None:
    few = copy.deepcopy(model)
    table_items = [item for item in range(len(tiny_shop.catalogue.codes)) if item not in (0, 9)]
    few.set_items(torch.from_numpy(tiny_shop.catalogue.codes[table_items]))
    batch = batch_of(tiny_shop)
    # Item 0 is chosen in the second row, item 9 rejected in the third.
    assert score_answers(few, batch)[1].real.tolist() == [
        [True, False, False], [False, False, False], [True, False, True], [True, True, False]
    ]  # fmt: skip
    few.set_items(torch.zeros(0, 3, dtype=torch.long))
    assert len(score_answers(few, batch)) == 1


def test_codes_that_chosen_and_rejected_share_cancel_in_value_and_in_gradient(
    tiny_shop: Shop, model: GeneratorForCausalLM
) -> None:
    # Items 0 and 12 of the shop differ in their last code alone.
    codes = tiny_shop.catalogue.codes
    assert codes[0, :2].tolist() == codes[12, :2].tolist()
    preference = PreferenceRow(
        prompt_ids=[BOS, *codes[3].tolist()], chosen_ids=codes[0].tolist(), rejected_ids=[codes[12].tolist()]
    )
    policy = copy.deepcopy(model)
    head = score_answers(policy, collate_preferences([preference], PAD))[0]
    margin = head.scores[0] - head.scores[1]
    margin.sum().backward()
    for level in (0, 1):
        for parameter in policy.model.depth[level].parameters():
            if parameter.grad is not None:
                assert float(parameter.grad.abs().max()) < 1e-6
    assert (
        max(float(p.grad.abs().max()) for p in policy.model.depth[2].parameters() if p.grad is not None)
        > 1e-4
    )
    with torch.no_grad():
        state = policy.encode(torch.from_numpy(codes[3][None, None]), torch.tensor([1]))
        last = policy.step(2, state, torch.from_numpy(codes[0][None, :2]))[0]
    first = policy.config.code_range(2)[0]
    expected = float(last[codes[0, 2] - first] - last[codes[12, 2] - first])
    assert float(margin.detach()) == pytest.approx(expected, abs=1e-5)


ITEM = st.integers(0, ITEMS - 1)


@settings(max_examples=40, deadline=None)
@given(st.lists(ITEM, max_size=4), ITEM, ITEM)
@torch.no_grad()
def test_under_any_prompt_a_margin_is_that_of_the_codes_after_the_shared_prefix(
    tiny_shop: Shop, model: GeneratorForCausalLM, history: list[int], chosen: int, rejected: int
) -> None:
    codes = tiny_shop.catalogue.codes
    preference = PreferenceRow(
        prompt_ids=[BOS, *codes[history].flatten().tolist()], chosen_ids=codes[chosen].tolist(),
        rejected_ids=[codes[rejected].tolist()],
    )  # fmt: skip
    batch = collate_preferences([preference], PAD)
    other = _Uniform(int(codes.max()) + 1)
    same = next((at for at in range(3) if codes[chosen, at] != codes[rejected, at]), 3)
    for scored_model in (model, other):
        expected = 0.0
        for sign, item in ((1, chosen), (-1, rejected)):
            ids = torch.tensor([preference["prompt_ids"] + codes[item].tolist()])
            logs = scored_model(ids, torch.ones_like(ids), use_cache=False).logits[0].log_softmax(-1)
            begin = len(preference["prompt_ids"]) - 1
            expected += sign * sum(float(logs[begin + at, codes[item, at]]) for at in range(same, 3))
        head = score_answers(scored_model, batch)[0]
        assert float(head.scores[0] - head.scores[1]) == pytest.approx(expected, abs=1e-4)


class _Uniform(nn.Module):
    """A language model whose next token depends on the last one through a fixed table."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(tokens, tokens, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> object:
        return type("Out", (), {"logits": self.table[input_ids]})()


def test_another_language_model_is_asked_for_its_answers_tokens(tiny_shop: Shop) -> None:
    tokens = int(batch_of(tiny_shop)["input_ids"].max()) + 1
    other = _Uniform(tokens)
    (head,) = score_answers(other, batch_of(tiny_shop))
    logs = other.table.detach().log_softmax(-1)
    for at in range(4):
        preference = row(tiny_shop, at)
        for k, answer in enumerate([preference["chosen_ids"], *preference["rejected_ids"]]):
            path = [preference["prompt_ids"][-1], *answer]
            expected = sum(float(logs[a, b]) for a, b in pairwise(path))
            assert float(head.scores[k, at].detach()) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_a_policy_in_training_scores_as_its_reference_does(tiny_shop: Shop, dropout: float) -> None:
    policy = tiny_shop.model(dropout=dropout, item_dropout=dropout).train()
    with torch.no_grad():
        policy.model.items.own.normal_(0, 0.5)
        policy.model.items.repeat_vectors.normal_(0, 1)
    reference = copy.deepcopy(policy).eval()
    for head, before in zip(
        score_answers(policy, batch_of(tiny_shop)), score_answers(reference, batch_of(tiny_shop)), strict=True
    ):
        # Equal to the bit: the same operations on the same numbers.
        assert torch.equal(head.scores, before.scores)
    assert all(module.training for module in policy.modules())
    assert not any(module.training for module in reference.modules())
