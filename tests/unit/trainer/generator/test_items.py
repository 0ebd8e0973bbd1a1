"""The table of items: found by SID, kept over a refresh, and silent about what it does not know."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.bundles.prompt import Prompt
from tests.tiny_shop import SIZES
from trainer.generator.model import GeneratorForCausalLM, new_generator

PROMPT = Prompt(SIZES, 8)
sids = st.tuples(*(st.integers(0, size - 1) for size in SIZES))


def generator(text: int = 0) -> GeneratorForCausalLM:
    torch.manual_seed(0)
    return new_generator(
        SIZES, PROMPT.code_base(0), PROMPT.first_word, hidden_size=8, num_attention_heads=2, dropout=0.0,
        intermediate_size=16, depth_size=8, text_size=text,
    ).eval()  # fmt: skip


def tokens(sids: list[tuple[int, ...]]) -> torch.Tensor:
    return torch.tensor([PROMPT.tokens(sid) for sid in sids]).reshape(-1, 3)


@settings(max_examples=40, deadline=None)
@given(st.lists(sids, unique=True, min_size=1), st.lists(sids, unique=True))
def test_what_was_learned_of_an_item_is_kept_when_the_catalogue_changes(first: list, second: list) -> None:
    model = generator()
    table = model.model.items
    rows = model.set_items(tokens(first))
    assert table.rows(tokens(first)).tolist() == rows.tolist()
    with torch.no_grad():
        table.own.copy_(torch.randn(table.own.shape))
    own_vectors = {sid: table.own[row].tolist() for sid, row in zip(first, rows.tolist(), strict=True)}
    after = model.set_items(tokens(second))
    assert model.config.num_items == len(second)
    for sid, row in zip(second, after.tolist(), strict=True):
        assert table.own[row].tolist() == own_vectors.get(sid, [0.0] * 8)
    unknown = [sid for sid in first if sid not in second]
    assert table.rows(tokens(unknown)).tolist() == [-1] * len(unknown)


def test_an_items_vector_is_its_codes_its_own_part_and_its_text() -> None:
    model = generator(text=5)
    sids = [(3, 2, 4), (0, 1, 2)]
    text = torch.randn(2, 5)
    rows = model.set_items(tokens(sids), text)
    base = model.model
    with torch.no_grad():
        base.items.own.copy_(torch.randn(2, 8))
        every = base.items.vectors(base.embed_tokens.weight)
        assert base.items.text_proj is not None
        for at, row in enumerate(rows.tolist()):
            expected = base.embed_tokens(tokens(sids)[at]).sum(0) + base.items.own[row]
            expected = expected + base.items.text_proj(text[at])
            torch.testing.assert_close(every[row], expected)
            torch.testing.assert_close(base.embed_items(tokens(sids)[at][None, None])[0, 0], expected)
        # An item that nobody told of is its codes.
        other = tokens([(1, 1, 1)])
        torch.testing.assert_close(base.embed_items(other[None])[0, 0], base.embed_tokens(other[0]).sum(0))


def test_a_saved_model_knows_its_items(tmp_path: object) -> None:
    model = generator(text=5)
    model.set_items(tokens([(3, 2, 4), (0, 1, 2)]), torch.randn(2, 5))
    with torch.no_grad():
        model.model.items.own.normal_()
    model.save_pretrained(str(tmp_path))
    loaded = GeneratorForCausalLM.from_pretrained(str(tmp_path)).eval()
    codes = tokens([(0, 1, 2), (2, 2, 2), (3, 2, 4)])[None]
    assert torch.equal(model.model.embed_items(codes), loaded.model.embed_items(codes))


def test_in_training_some_items_stand_without_their_own_part() -> None:
    torch.manual_seed(1)
    model = new_generator(
        SIZES, PROMPT.code_base(0), PROMPT.first_word, hidden_size=8, num_attention_heads=2, item_dropout=0.5
    )
    every = [(a, b, c) for a in range(4) for b in range(3) for c in range(5)]
    model.set_items(tokens(every))
    base = model.model
    with torch.no_grad():
        base.items.own.fill_(1.0)
        base.embed_tokens.weight.zero_()
        without = (base.train().items.vectors(base.embed_tokens.weight) == 0).all(-1).float().mean()
        assert 0.3 < float(without) < 0.7
        assert bool((base.eval().items.vectors(base.embed_tokens.weight) == 1).all())
