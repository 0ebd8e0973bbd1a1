"""Rows of search and summary, and which targets count as bought."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from registry.bundles.prompt import BOS, EOS, ITEM, TITLE, UNK
from registry.hold_out import HoldOut
from tests.tiny_shop import SIZES, Shop, shop
from trainer.evaluation.tasks import predict_words, prompt_states, search_items
from trainer.sequences.batches import pad_token_rows
from trainer.sequences.held_out import split_log
from trainer.sequences.interactions import user_sequences
from trainer.sequences.rows import TrainingRows
from trainer.sequences.tasks import TitleWords, bought_within, search_prompt, summary_prompt
from trainer.tuning.next_item import token_loss

LEVELS = len(SIZES)
TEXTS = {"next_sid": 1.0, "sid_to_title": 0.0, "title_to_sid": 0.0, "search": 0.5, "summary": 0.25}


def pair_shop(**more: Any) -> Shop:
    """A shop where every two items have a title of their own: `thing` and a word that no others have."""
    tiny = shop(**{"weights": TEXTS} | more)
    titles = [f"thing {chr(97 + item // 2) * 3}" for item in range(24)]
    catalogue = replace(tiny.catalogue, titles=titles)
    tokenizer = type(tiny.tokenizer)(tokenizer_object=_words(tiny, titles), unk_token="<unk>")
    rows = TrainingRows(tiny.split, catalogue, tokenizer, tiny.prompt, tiny.settings)
    return replace(tiny, catalogue=catalogue, tokenizer=tokenizer, rows=rows)


def _words(tiny: Shop, titles: list[str]) -> Any:
    from trainer.sequences.tokenizer import build_tokenizer

    return build_tokenizer(tiny.prompt, titles, 100).backend_tokenizer


def parts(tiny: Shop, ids: list[int]) -> tuple[list[int], list[int], int, list[int]]:
    """Items of the history, words, the mark after them, and what follows it."""
    mark = next(at for at, token in enumerate(ids) if token in (ITEM, TITLE))
    words = [token for token in ids[1:mark] if token >= tiny.prompt.first_word]
    codes = np.array(ids[1 : mark - len(words)]).reshape(-1, LEVELS)
    place = {tuple(row): item for item, row in enumerate(tiny.catalogue.codes.tolist())}
    return [place[tuple(row)] for row in codes.tolist()], words, ids[mark], ids[mark + 1 :]


def test_a_search_has_words_of_the_item_that_a_user_went_to_after_that_history() -> None:
    tiny = pair_shop(length=30, tasks={"history": 4, "bare": 0.25})
    actual = tiny.rows.search_rows(3)
    assert len(actual) == 24
    bare, lengths = 0, set()
    trained = [tiny.log.items[low:high].tolist() for low, high in pairwise(tiny.log.starts.tolist())]
    for row in [row for number in range(10) for row in tiny.rows.search_rows(number)]:
        history, words, mark, target = parts(tiny, row.ids.tolist())
        assert (row.ids[0], mark, row.weight) == (BOS, ITEM, 0.5)
        assert row.ids[row.learned].tolist() == target
        item = tiny.catalogue.codes.tolist().index(target)
        lengths.add(len(words))
        assert {*words} <= {*tiny.rows.title_words[item]}
        assert len({*words}) == len(words)
        bare += not history
        expected = [*history, item]
        assert len(history) <= 4
        # What the user did right before, as much of it as there is, up to four items.
        places = [(path, at) for path in trained for at in range(len(path) - len(history))]
        assert any(
            path[at : at + len(expected)] == expected and (not history or len(history) == 4 or at == 0)
            for path, at in places
        )
    assert 30 < bare < 130  # a quarter of 240, and those that are the first of their user
    assert lengths == {1, 2}


def test_texts_of_an_epoch_are_the_same_again_and_others_in_the_next() -> None:
    rows = pair_shop().rows

    def ids(number: int) -> list[list[int]]:
        return [row.ids.tolist() for row in rows.text_rows(number)]

    assert ids(0) == ids(0)
    assert ids(0) != ids(1)
    for made in (rows.search_rows, rows.summary_rows):
        first, other = ([row.ids.tolist() for row in made(number)] for number in (0, 1))
        assert first != other
    assert len(ids(0)) == 48
    weights = sorted({row.weight for row in rows.epoch_rows(0)})
    assert weights == [0.25, 0.5, 1.0]


def test_without_weights_or_words_there_is_no_such_row() -> None:
    tiny = shop(weights=TEXTS | {"search": 0.0, "summary": 0.0})
    assert tiny.rows.text_rows(0) == []
    assert shop(weights=TEXTS, max_words=0).rows.text_rows(0) == []


def test_no_text_looks_at_what_is_held_out() -> None:
    tiny = pair_shop(users=12, length=3)
    whole_log, hold_out = tiny.whole_log, HoldOut(share=tiny.settings.validation_share)
    whole_log.items[:] = 0
    whole_log.items[whole_log.starts[1:] - 1] = 1
    owner = np.repeat([hold_out.has(user) for user in whole_log.users], np.diff(whole_log.starts))
    assert owner.any()
    whole_log.items[owner] = 23
    split = split_log(whole_log, hold_out, tiny.settings)
    rows = TrainingRows(split, tiny.catalogue, tiny.tokenizer, tiny.prompt, tiny.settings)
    codes = tiny.catalogue.codes[23].tolist()
    for number in range(5):
        for row in rows.text_rows(number):
            flat = row.ids.tolist()
            assert not any(flat[at : at + LEVELS] == codes for at in range(len(flat)))


def test_a_summary_has_the_words_most_typical_of_the_history() -> None:
    tiny = pair_shop()
    row = tiny.rows.summary_row(np.array([4, 9, 5]))
    history, before_mark, mark, words = parts(tiny, row.ids.tolist())
    assert (history, before_mark, mark) == ([4, 9, 5], [], TITLE)
    two, one, thing = tiny.rows.title_words[4][1], tiny.rows.title_words[9][1], tiny.rows.title_words[4][0]
    # `thing` is in all three, but in every title; items 4 and 5 share a word that no other has.
    assert words == [two, one, thing, EOS]
    assert row.ids[row.learned].tolist() == words
    assert row.weight == 0.25


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(90, 99) | st.just(UNK), max_size=6), min_size=1, max_size=8),
    st.integers(1, 5), st.integers(1, 4), st.integers(0, 99),
)  # fmt: skip
def test_typical_words_are_those_of_the_highest_tf_idf(
    titles: list[list[int]], most: int, count: int, seed: int
) -> None:
    words = TitleWords(titles)
    history = titles[:count]

    def score(word: int) -> float:
        here = sum(word in title for title in history)
        return here * math.log(1 + sum(map(bool, titles)) / sum(word in title for title in titles))

    expected = sorted({word for title in history for word in title} - {UNK}, key=lambda w: (-score(w), w))
    assert words.typical(history, most) == expected[:most]
    for title in titles:
        if set(title) - {UNK}:
            drawn = words.draw_query(title, most, np.random.default_rng(seed))
            assert 1 <= len(drawn) == len(set(drawn)) <= most
            assert set(drawn) <= set(title) - {UNK}


def test_rare_words_are_asked_for_more_often() -> None:
    words = TitleWords([[90, 91], [90, 92], [90, 93], [90, 94]])
    rng = np.random.default_rng(0)
    drawn_words = [words.draw_query([90, 91], 1, rng)[0] for _ in range(2000)]
    assert drawn_words.count(91) / 2000 == pytest.approx(math.log(5) / math.log(10), abs=0.03)


@hypothesis_settings(max_examples=100, deadline=None)
# A click past the end, in the moment of a purchase before it.
@example([(0, 0, 0, True), (0, 0, 0, False)], 0)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 9), st.booleans()),
        min_size=1, max_size=25,
    ),
    st.integers(0, 4),
)  # fmt: skip
def test_a_target_is_bought_where_its_user_buys_it_in_time(
    events: list[tuple[int, int, int, bool]], within: int
) -> None:
    catalogue = shop().catalogue
    users, items, ts, paid = zip(*events, strict=True)
    log = user_sequences(
        [f"u{user}" for user in users], list(ts), [f"i{item:02}" for item in items], catalogue, bought=paid
    )
    # Of one moment, a purchase follows the click that led to it, whichever of them the log has first.
    expected = [
        any(
            log.bought[other]
            and log.items[other] == log.items[at]
            and 0 <= log.ts[other] - log.ts[at] <= within
            for other in range(begin, end)
        )
        for begin, end in pairwise(log.starts.tolist())
        for at in range(begin, end)
    ]
    assert bought_within(log, within).tolist() == expected


def test_pieces_say_what_was_bought() -> None:
    tiny = shop(length=6, tasks={"buy_within_s": 1})
    tiny.log.bought[tiny.log.starts[3] + 2] = True
    rows = TrainingRows(tiny.split, tiny.catalogue, tiny.tokenizer, tiny.prompt, tiny.settings)
    actual = []
    for piece in rows.sequence_batches(0):
        assert piece.bought is not None
        assert piece.bought.shape == piece.items.shape
        assert not piece.bought[piece.items < 0].any()
        actual += piece.items[piece.bought].tolist()
    assert actual == [int(tiny.log.items[tiny.log.starts[3] + 2])]


@pytest.mark.learning
def test_the_model_learns_to_search_and_to_sum_up() -> None:
    tiny = pair_shop(tasks={"bare": 0.5})
    model = tiny.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for number in range(800):
        optimizer.zero_grad()
        token_loss(model, pad_token_rows(tiny.rows.text_rows(number))).backward()
        optimizer.step()
    titles = tiny.rows.title_words
    none = tiny.catalogue.codes[:0]
    bare_prompts = [search_prompt(none, [titles[item][1]]) for item in range(24)]
    best = search_items(model, bare_prompts, tiny.sids, tiny.catalogue, 2)
    # The word names a pair of items: no other one is better.
    assert np.mean([item // 2 == at // 2 for at, row in enumerate(best) for item in row.tolist()]) > 0.8
    # After the item before, the word is of one item: the next.
    prompts_with_history = [
        search_prompt(tiny.catalogue.codes[[item - 1]], [titles[item][1]]) for item in range(1, 24)
    ]
    first = search_items(model, prompts_with_history, tiny.sids, tiny.catalogue, 1)[:, 0]
    assert np.mean(first == np.arange(1, 24)) > 0.8
    summary_prompts = [summary_prompt(tiny.catalogue.codes[[item]]) for item in range(24)]
    summaries = predict_words(model, summary_prompts, [2] * 24, tiny.prompt.first_word)
    assert np.mean([set(words) == set(titles[at]) for at, words in enumerate(summaries)]) > 0.7


def test_a_prompts_answers_are_those_of_a_search_over_all_items() -> None:
    tiny = pair_shop()
    model = tiny.model(seed=1)
    prompts = [search_prompt(tiny.catalogue.codes[[3, 5]], [tiny.prompt.first_word]), [BOS, ITEM]]
    actual = search_items(model, prompts, tiny.sids, tiny.catalogue, 24)
    for prompt, best in zip(prompts, actual, strict=True):
        scores = []
        for codes in tiny.catalogue.codes.tolist():
            with torch.no_grad():
                logs = model(torch.tensor([[*prompt, *codes]])).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[len(prompt) - 1 + at, code]) for at, code in enumerate(codes)))
        assert best.tolist() == np.argsort(-np.array(scores)).tolist()
    assert prompt_states(model, prompts).shape == (2, 32)


def test_texts_of_every_task_are_one_batch() -> None:
    tiny = pair_shop()
    batch = pad_token_rows(tiny.rows.text_rows(0))
    assert torch.isfinite(token_loss(tiny.model(), batch))
