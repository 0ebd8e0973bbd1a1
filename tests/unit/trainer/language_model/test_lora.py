"""A foreign causal LM, made on the spot, is tuned on the same rows and ranked under the same constraint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from registry.bundles.prompt import BOS, TITLE
from streams.errors import SidstreamError
from tests.tiny_shop import shop
from trainer.language_model.lora import VocabularyTranslation, tune_lora


def foreign(folder: Path, kind: str) -> str:
    """A model of random weights and a tokenizer of its own, which knows some words."""
    words = ["<s>", "</s>", "<unk>", "red", "item", "number", "0", "1", "2", "3"]
    backend = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    shape = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1}
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                tie_word_embeddings=False, **shape,
            )
        )  # fmt: skip
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.learning
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_foreign_model_learns_the_rows_and_only_answers_known_sids(tmp_path: Path, kind: str) -> None:
    tiny = shop(
        users=60,
        epochs=60,
        patience=60,
        weights={"next_sid": 1.0, "sid_to_title": 0.0, "title_to_sid": 0.0},
        max_items=5,
        lora={"lr": 0.003, "batch_tokens": 256, "rank": 8, "dropout": 0.0},
        validation_users=12,
    )
    name = foreign(tmp_path / "base", kind)
    result = tune_lora(name, tiny.rows, tiny.tokenizer, tiny.sids, tiny.settings, tmp_path / "tuned")
    assert result.steps > 20
    assert result.quality.users == 12
    assert result.quality.hr10 > 0.8  # ten of 24 at random: 0.42
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (kind == "gpt2")  # as the model that was tuned
    assert len(tokenizer("<a_1><b_2>", add_special_tokens=False).input_ids) == 2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tuning_leaves_the_rows_of_foreign_tokens_as_they_were(tmp_path: Path, kind: str) -> None:
    tiny = shop(users=8, epochs=1, max_items=5, validation_users=0, lora={"lr": 0.01, "batch_tokens": 256})
    name = foreign(tmp_path / "base", kind)
    tune_lora(name, tiny.rows, tiny.tokenizer, tiny.sids, tiny.settings, tmp_path / "tuned")
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (name, tmp_path / "tuned"))
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, layer)().weight, getattr(after, layer)().weight
        assert torch.equal(new[: len(old)], old)


def test_rows_are_translated_token_by_token(tmp_path: Path) -> None:
    tiny = shop()
    theirs = AutoTokenizer.from_pretrained(foreign(tmp_path, "llama"))
    translation = VocabularyTranslation(tiny.prompt, tiny.tokenizer, theirs)
    row = translation.translate_row(tiny.rows.sid_to_title_row(3))
    shown = theirs.convert_ids_to_tokens(row.ids.tolist())
    sid = tiny.prompt.text(tiny.catalogue.sids[3]).replace(">", "> ").split()
    assert shown == ["<s>", *sid, "<sid_title>", "red", "item", "number", "3", "</s>"]
    assert row.learned.tolist() == [False] * 5 + [True] * 5
    assert translation.table[BOS] == [0]
    assert translation.table[TITLE] == [theirs.convert_tokens_to_ids("<sid_title>")]


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    tiny = shop()
    missing = str(tmp_path / "nothing")
    with pytest.raises(SidstreamError, match="nothing is no causal LM"):
        tune_lora(missing, tiny.rows, tiny.tokenizer, tiny.sids, tiny.settings, tmp_path / "tuned")
