"""The generator folds items into positions, sees only the past, and looks like a causal LM from outside."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.bundles.prompt import BOS, PAD, TITLE, Prompt
from tests.tiny_shop import SIZES, shop
from trainer.generator.constrained import SidSet, beam_search
from trainer.generator.model import GeneratorForCausalLM, new_generator

PROMPT = Prompt(SIZES, 8)
WORDS = 6
SAID = 4  # tokens of contexts, after the words
FIRST_SAID = PROMPT.first_word + WORDS


@pytest.fixture(scope="module")
def model() -> GeneratorForCausalLM:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    generator = new_generator(
        SIZES, PROMPT.code_base(0), FIRST_SAID + SAID, hidden_size=16, num_attention_heads=2,
        intermediate_size=32, depth_size=24, dropout=0.3, max_items=8, num_context=SAID,
    )  # fmt: skip
    # Half of all SIDs are items that it knows by themselves.
    sids = [sid for at, sid in enumerate(product(*map(range, SIZES))) if at % 2]
    generator.set_items(torch.tensor([PROMPT.tokens(sid) for sid in sids]))
    with torch.no_grad():
        generator.model.items.own.normal_(0, 0.1)
        generator.model.embed_tokens.weight[FIRST_SAID:].normal_(0, 1)
        for parameter in generator.model.modulation.parameters():
            parameter.normal_(0, 0.3)
    return generator.eval()


tokens = st.integers(1, FIRST_SAID + SAID - 1)
said = st.integers(FIRST_SAID, FIRST_SAID + SAID - 1)
sids = st.tuples(*(st.integers(0, size - 1) for size in SIZES))


@st.composite
def sequences(draw: st.DrawFn) -> list[int]:
    """BOS, then items, words, specials and contexts, then perhaps the beginning of an item."""
    ids = [BOS]
    words = st.sampled_from([TITLE, PROMPT.first_word])
    for part in draw(st.lists(st.one_of(sids, words, said), max_size=6)):
        ids += PROMPT.tokens(part) if isinstance(part, tuple) else [part]
    return ids + PROMPT.tokens(draw(sids))[: draw(st.integers(0, len(SIZES) - 1))]


def reference(model: GeneratorForCausalLM, ids: list[int]) -> torch.Tensor:
    """Vectors of one row, place by place: what `forward` says with index operations, said with loops."""
    base, table = model.model, model.model.embed_tokens.weight
    levels = {PROMPT.code_base(at) + code: at for at, size in enumerate(SIZES) for code in range(size)}
    positions: list[torch.Tensor] = []
    opened: list[torch.Tensor] = []
    context_tokens: list[torch.Tensor] = []
    vectors = []
    spelled: list[int] = []

    def last_state() -> torch.Tensor:
        state = base.states(torch.stack(positions)[None])[0, -1] if positions else base.start
        return base.modulation(state, torch.stack(context_tokens).sum(0)) if context_tokens else state

    for token in ids:
        if token >= FIRST_SAID:
            context_tokens.append(table[token])
            spelled.append(-1)
            vectors.append(base.depth[0](last_state(), None))
            continue
        opened.append(table[token])
        level = levels.get(token)
        spelled.append(-1 if level is None else level)
        if level is None or level == len(SIZES) - 1:
            position = torch.stack(opened[-len(SIZES) :]).sum(0)
            if spelled[-len(SIZES) :] == list(range(len(SIZES))):
                codes = torch.tensor(ids[len(spelled) - len(SIZES) : len(spelled)])
                position = position + base.items.beyond_codes(base.items.rows(codes))
            positions.append(position)
            opened, context_tokens = [], []
            vectors.append(base.depth[0](last_state(), None))
        else:
            vectors.append(base.depth[level + 1](last_state(), torch.stack(opened).sum(0)))
    return torch.stack(vectors)


@settings(max_examples=40, deadline=None)
@given(sequences())
def test_folding_equals_a_loop_over_the_places(model: GeneratorForCausalLM, ids: list[int]) -> None:
    with torch.no_grad():
        vectors = model.model(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(vectors, reference(model, ids), atol=1e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(sequences(), st.integers(1, 9), st.booleans())
def test_padding_on_either_side_changes_no_logit(
    model: GeneratorForCausalLM, ids: list[int], pads: int, masked: bool
) -> None:
    # What a mask hides is padding, whatever stands there.
    fill = PROMPT.code_base(1) if masked else PAD
    rows = torch.tensor([[fill] * pads + ids, ids + [fill] * pads])
    masks = [[0] * pads + [1] * len(ids), [1] * len(ids) + [0] * pads]
    mask = torch.tensor(masks) if masked else None
    with torch.no_grad():
        alone = model(torch.tensor([ids])).logits[0]
        both = model(rows, attention_mask=mask).logits
    torch.testing.assert_close(both[0, pads:], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both[1, : len(ids)], alone, atol=1e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.lists(tokens, min_size=2, max_size=24), st.data())
def test_a_later_token_never_changes_an_earlier_logit(
    model: GeneratorForCausalLM, ids: list[int], data: st.DataObject
) -> None:
    at = data.draw(st.integers(1, len(ids) - 1))
    changed = [*ids[:at], *(data.draw(tokens) for _ in ids[at:])]
    with torch.no_grad():
        before, after = model(torch.tensor([ids])).logits, model(torch.tensor([changed])).logits
    torch.testing.assert_close(before[:, :at], after[:, :at], atol=1e-5, rtol=1e-4)


def test_the_state_of_a_prompt_is_the_one_that_the_flat_sequence_ends_in(model: GeneratorForCausalLM) -> None:
    histories = [[], [(1, 2, 3)], [(0, 0, 0), (3, 2, 4), (3, 2, 4)]]
    codes = torch.zeros(3, 3, len(SIZES), dtype=torch.long)
    for row, history in enumerate(histories):
        for at, sid in enumerate(history):
            codes[row, at] = torch.tensor(PROMPT.tokens(sid))
    contexts = torch.tensor([[FIRST_SAID + 1, 0], [0, 0], [0, FIRST_SAID + 3]])
    contexts[2, 0] = FIRST_SAID
    with torch.no_grad():
        state = model.encode(codes, torch.tensor([0, 1, 3]), context=contexts)
        for row, history in enumerate(histories):
            context_tokens = [token for token in contexts[row].tolist() if token]
            flat = [BOS, *(token for sid in history for token in PROMPT.tokens(sid)), *context_tokens]
            chosen = PROMPT.tokens((2, 1, 4))
            logits = model(torch.tensor([flat + chosen])).logits[0].log_softmax(-1)
            for level in range(len(SIZES)):
                prefix = torch.tensor([chosen[:level]]) if level else None
                log_probs = model.step(level, state[row : row + 1], prefix)[0]
                begin = PROMPT.code_base(level)
                expected = logits[len(flat) - 1 + level, begin : begin + SIZES[level]]
                torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-4)


def test_a_context_leaves_the_history_and_what_comes_after_the_item_as_they_are(
    model: GeneratorForCausalLM,
) -> None:
    history, answer = PROMPT.tokens((1, 2, 3)), PROMPT.tokens((0, 0, 0))
    context_tokens = [FIRST_SAID, FIRST_SAID + 2]
    with torch.no_grad():
        plain = model(torch.tensor([[BOS, *history, *answer, *history]])).logits[0]
        under = model(torch.tensor([[BOS, *history, *context_tokens, *answer, *history]])).logits[0]
    torch.testing.assert_close(under[:4], plain[:4])
    torch.testing.assert_close(under[8:], plain[6:], atol=1e-5, rtol=1e-4)
    assert all(not torch.allclose(under[2 + at], plain[at], atol=1e-2) for at in (3, 4, 5))


def test_a_fresh_models_contexts_say_nothing_and_without_any_it_has_no_weights_for_them() -> None:
    tiny_shop = shop(scenes=True)
    model = tiny_shop.model()
    codes = torch.from_numpy(tiny_shop.catalogue.codes[:2][None])
    token = torch.tensor([tiny_shop.context.row({"scene": "up"})])
    with torch.no_grad():
        with_context = model.encode(codes, torch.tensor([2]), context=token)
        assert torch.equal(with_context, model.encode(codes, torch.tensor([2])))
    bare = shop().model()
    assert bare.model.modulation is None
    assert not [name for name, _ in bare.named_parameters() if "modulation" in name]


def test_generate_under_the_constraint_gives_only_known_sids_and_the_beam_the_same() -> None:
    tiny_shop = shop()
    sid_set = SidSet(tiny_shop.catalogue.sids, tiny_shop.prompt)
    model = tiny_shop.model(seed=4)
    histories = [tiny_shop.catalogue.sids[:3], tiny_shop.catalogue.sids[5:6], tiny_shop.catalogue.sids[2:9]]
    flat = [[BOS, *(token for sid in row for token in tiny_shop.prompt.tokens(sid))] for row in histories]
    length = max(map(len, flat))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in flat])
    answers = model.generate(
        ids, attention_mask=(ids != PAD).long(), num_beams=20, num_return_sequences=20, length_penalty=0.0,
        prefix_allowed_tokens_fn=lambda _, tokens: sid_set.allowed_tokens(tokens[length:].tolist()),
        max_new_tokens=3, use_cache=False, do_sample=False, eos_token_id=None,
    )[:, length:].view(3, 20, 3)  # fmt: skip
    spelled = [[tiny_shop.prompt.sid(answer) for answer in row] for row in answers.tolist()]
    assert all(sid in tiny_shop.catalogue.sids for row in spelled for sid in row)
    assert all(len(set(row)) == 20 for row in spelled)
    codes = torch.zeros(3, 7, 3, dtype=torch.long)
    for at, row in enumerate(histories):
        codes[at, : len(row)] = torch.tensor([tiny_shop.prompt.tokens(sid) for sid in row])
    state = model.encode(codes, torch.tensor([len(row) for row in histories]))
    beam_codes, scores = beam_search(model, state, sid_set, 20)
    assert [[tuple(sid) for sid in row] for row in beam_codes.tolist()] == spelled
    assert torch.isfinite(scores).all()


def test_saving_and_loading_keeps_every_logit(model: GeneratorForCausalLM, tmp_path: object) -> None:
    model.save_pretrained(str(tmp_path))
    loaded = GeneratorForCausalLM.from_pretrained(str(tmp_path)).eval()
    ids = torch.tensor([[BOS, *PROMPT.tokens((1, 1, 1)), *PROMPT.tokens((2, 0, 3))[:2]]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_zeroing_every_dropout_module_leaves_nothing_random_in_training() -> None:
    tiny_shop = shop()
    generator = tiny_shop.model(dropout=0.5, item_dropout=0.5).train()
    for module in generator.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.tensor([[BOS, *PROMPT.tokens((1, 1, 1)), *PROMPT.tokens((2, 0, 3))]])
    assert torch.equal(generator(ids).logits, generator(ids).logits)
    table, embeddings = generator.model.items, generator.model.embed_tokens.weight
    assert torch.equal(table.vectors(embeddings), table.vectors(embeddings))
