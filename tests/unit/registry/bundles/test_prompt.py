import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.bundles.prompt import Prompt, prompt_sids
from streams.errors import SidstreamError

PROMPT = Prompt((64, 32, 128), max_items=5)
SIDS = st.tuples(st.integers(0, 63), st.integers(0, 31), st.integers(0, 127))


@given(SIDS)
def test_every_sid_survives_tokens_and_text(sid):
    assert PROMPT.sid(PROMPT.tokens(sid)) == sid
    assert PROMPT.parse(PROMPT.text(sid)) == sid


def test_token_ids_are_those_that_trained_weights_know():
    assert PROMPT.tokens((0, 0, 0)) == [16, 80, 112]
    assert PROMPT.tokens((63, 31, 127)) == [79, 111, 239]
    assert PROMPT.first_word == 240
    assert PROMPT.text((12, 7, 101)) == "<a_12><b_7><c_101>"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<a_1><b_2>",
        "<a_1><b_2><c_128>",
        "<a_01><b_2><c_3>",
        "<b_1><a_2><c_3>",
        "<a_1><b_2><c_3>x",
        "<a_-1><b_2><c_3>",
    ],
)
def test_text_that_is_no_sid_is_refused(text):
    with pytest.raises(SidstreamError):
        PROMPT.parse(text)


@pytest.mark.parametrize("tokens", [[16, 80], [15, 80, 112], [80, 80, 112], [16, 80, 240], []])
def test_tokens_that_are_no_sid_are_refused(tokens):
    with pytest.raises(SidstreamError):
        PROMPT.sid(tokens)


def test_the_trigger_stands_last_and_only_once():
    a, b = (1, 1, 1), (2, 2, 2)
    assert prompt_sids([a, b], None, 5) == [a, b]
    assert prompt_sids([b, a], b, 5) == [b, a, b]
    assert prompt_sids([a, b], b, 5) == [a, b]
    assert prompt_sids([], b, 5) == [b]
    assert prompt_sids([], None, 5) == []


@given(st.lists(SIDS, max_size=20), st.none() | SIDS, st.integers(1, 8))
def test_the_newest_items_are_kept(history, trigger, max_items):
    full = prompt_sids(history, trigger, 100)
    assert prompt_sids(history, trigger, max_items) == full[-max_items:]
