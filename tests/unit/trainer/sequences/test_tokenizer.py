"""The tokenizer writes SIDs and titles in the ids that the prompt fixes."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from registry.bundles.prompt import BOS, EOS, PAD, TITLE, UNK, Prompt
from trainer.sequences.tokenizer import build_tokenizer

PROMPT = Prompt((4, 3), 5)
TITLES = ["A white HEART it's", "White heart", "red Café", "café it's 中国", "中"]


def test_codes_and_words_get_the_ids_of_the_prompt(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(PROMPT, TITLES, 10)
    text = PROMPT.text((3, 1)) + PROMPT.text((0, 2))
    assert tokenizer(text).input_ids == PROMPT.tokens((3, 1)) + PROMPT.tokens((0, 2))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (PAD, BOS, EOS)
    words = tokenizer.convert_ids_to_tokens(list(range(PROMPT.first_word, len(tokenizer))))
    assert words == ["café", "heart", "it's", "white", "中"]
    first = PROMPT.first_word
    assert tokenizer("<bos><a_1><b_0><title>White, HEART!<eos>").input_ids == [
        BOS, *PROMPT.tokens((1, 0)), TITLE, first + 3, first + 1, EOS,
    ]  # fmt: skip
    tokenizer.save_pretrained(tmp_path)
    second = AutoTokenizer.from_pretrained(tmp_path)
    assert second("white 中国 <a_2>").input_ids == [first + 3, first + 4, UNK, PROMPT.tokens((2, 0))[0]]


def test_the_number_of_words_is_bounded_by_frequency() -> None:
    tokenizer = build_tokenizer(PROMPT, [*TITLES, "heart"], 1)
    assert len(tokenizer) == PROMPT.first_word + 1
    assert tokenizer.convert_ids_to_tokens(PROMPT.first_word) == "heart"
