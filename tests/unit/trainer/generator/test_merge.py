"""A merged generator answers with the mean of its members' logits, wherever a generator answers."""

from __future__ import annotations

import copy
from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.bundles.prompt import BOS, Prompt
from tests.tiny_shop import SIZES
from trainer.generator.export import check_parity, export_generator
from trainer.generator.merge import merge_generators
from trainer.generator.model import GeneratorForCausalLM, new_generator
from trainer.offline_checks.ranking import item_logits

PROMPT = Prompt(SIZES, 8)
SAID = 3  # tokens of contexts
VOCABULARY = PROMPT.first_word + 4 + SAID
ITEMS = torch.tensor([PROMPT.tokens(sid) for sid in product(*map(range, SIZES))][::2])


@cache
def member(seed: int, text: int = 5, **shape: int) -> GeneratorForCausalLM:
    """A generator whose every weight is drawn: none is where fresh ones stand."""
    default_shape = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "depth_size": 12}
    torch.manual_seed(seed)
    generator = new_generator(
        SIZES, PROMPT.code_base(0), VOCABULARY, max_items=8, num_context=SAID, text_size=text, dropout=0.3,
        **(default_shape | shape),
    )  # fmt: skip
    texts = torch.randn(len(ITEMS), text, generator=torch.Generator().manual_seed(0))
    generator.set_items(ITEMS, texts if text else None)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.normal_(0, 0.5)
    return generator.eval()


histories = st.lists(st.lists(st.integers(0, len(ITEMS) - 1), max_size=6), min_size=1, max_size=4)
counts = st.integers(1, 3)


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    codes = torch.zeros(len(rows), max(1, int(lengths.max())), len(SIZES), dtype=torch.long)
    for at, row in enumerate(rows):
        codes[at, : len(row)] = ITEMS[row]
    return codes, lengths


@given(histories, counts, st.sampled_from([0, 5]))
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_the_dense_head_scores_items_with_the_mean(rows, count, text):
    members = [member(seed, text) for seed in range(count)]
    codes, lengths = padded(rows)
    context = torch.full((len(rows), 1), VOCABULARY - 1)

    def logits(model: GeneratorForCausalLM) -> torch.Tensor:
        item_scores, _, _ = item_logits(model, model.encode(codes, lengths, context=context), codes, lengths)
        return item_scores

    expected = torch.stack([logits(member_model) for member_model in members]).mean(0)
    torch.testing.assert_close(logits(merge_generators(members)), expected, atol=1e-4, rtol=1e-4)


@given(histories, counts)
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_codes_and_words_are_predicted_with_the_mean(rows, count):
    members = [member(seed) for seed in range(count)]
    ids = torch.zeros(len(rows), 2 + len(SIZES) * 6, dtype=torch.long)
    for at, row in enumerate(rows):
        flat = [BOS, VOCABULARY - 2, *ITEMS[row].flatten().tolist()]
        ids[at, : len(flat)] = torch.tensor(flat)
    mask = (ids != 0).long()
    expected = torch.stack([member_model(ids, attention_mask=mask).logits for member_model in members]).mean(
        0
    )
    merged_logits = merge_generators(members)(ids, attention_mask=mask).logits
    torch.testing.assert_close(merged_logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_merging_what_is_merged_is_a_mean_of_means():
    members = [member(seed) for seed in range(4)]
    codes, lengths = padded([[1, 2, 3], [], [4]])
    whole = merge_generators(members)
    halves = merge_generators([merge_generators(members[:2]), merge_generators(members[2:])])
    for level in range(len(SIZES)):
        prefix = ITEMS[:3, :level] if level else None
        whole_logs, halves_logs = (
            model.step(level, model.encode(codes, lengths), prefix) for model in (whole, halves)
        )
        torch.testing.assert_close(whole_logs, halves_logs, atol=1e-4, rtol=1e-4)


def test_a_merged_generator_is_saved_read_and_exported_as_any_other(tmp_path):
    merged = merge_generators([member(seed) for seed in range(2)])
    merged.save_pretrained(tmp_path / "model")
    loaded = GeneratorForCausalLM.from_pretrained(tmp_path / "model").eval()
    codes, lengths = padded([[1, 2, 3]])
    torch.testing.assert_close(loaded.encode(codes, lengths), merged.encode(codes, lengths))
    export_generator(loaded, tmp_path)
    assert check_parity(loaded, tmp_path) < 1e-4


@pytest.mark.parametrize("other", [member(1, hidden_size=16), member(1, text=0)])
def test_generators_of_another_shape_are_refused(other):
    with pytest.raises(ValueError, match="one shape, vocabulary and catalogue"):
        merge_generators([member(0), other])


def test_generators_of_other_items_are_refused():
    other = copy.deepcopy(member(1))
    elsewhere = torch.tensor([PROMPT.tokens(sid) for sid in product(*map(range, SIZES))][1::2])
    other.set_items(elsewhere, other.model.items.text.clone())
    with pytest.raises(ValueError, match="one shape, vocabulary and catalogue"):
        merge_generators([member(0), other])
