"""A foreign causal LM goes through the same preference losses: in full or by adapters, tied or not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_shop import Shop, shop
from tests.unit.trainer.language_model.test_lora import foreign
from trainer.alignment.dpo import align_language_model
from trainer.alignment.rows import PreferenceRow
from trainer.language_model.lora import VocabularyTranslation, align_lora, tune_lora
from trainer.settings import DpoSettings

REJECTED = [6, 11, 20]


def ours(tiny: Shop, count: int) -> list[PreferenceRow]:
    """After any item, item 5 is taken and three others are not; in our own token ids."""
    codes = tiny.catalogue.codes
    return [
        PreferenceRow(
            prompt_ids=[1, *codes[n % 24].tolist()], chosen_ids=codes[5].tolist(),
            rejected_ids=[codes[item].tolist() for item in REJECTED],
        )
        for n in range(count)
    ]  # fmt: skip


def log_prob(model: Any, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(logs[len(prompt) - 1 + at, token]) for at, token in enumerate(answer))


def margins(model: Any, row: PreferenceRow) -> list[float]:
    chosen = log_prob(model, row["prompt_ids"], row["chosen_ids"])
    return [chosen - log_prob(model, row["prompt_ids"], answer) for answer in row["rejected_ids"]]


@pytest.mark.learning
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_chosen_answer_rises_over_every_rejected_one(
    tmp_path: Path, kind: str, tied: bool, adapters: bool
) -> None:
    tiny = shop()
    foreign(tmp_path, kind)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=tied, dtype=torch.float32)
    translation = VocabularyTranslation(tiny.prompt, tiny.tokenizer, theirs)
    model.resize_token_embeddings(len(theirs))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    with torch.no_grad():
        # Added tokens start alike, and adapters reach neither embeddings nor head: no answer could be told
        # from another.
        model.get_input_embeddings().weight.normal_(0, 0.3)
        model.get_output_embeddings().weight.normal_(0, 0.3)
    before = copy.deepcopy(model).eval()
    rows = [translation.translate_preference(row) for row in ours(tiny, 200)]
    chosen = tiny.settings.model_copy(
        update={
            "dpo": DpoSettings.model_validate(
                {"loss": "softmax_dpo", "max_rejected": 3, "batch": 8, "lr": 2e-2, "max_drop": 50}
            )
        }
    )
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2"
    )
    aligned, result = align_language_model(model, theirs, rows, chosen, lora if adapters else None)
    assert (result.pairs, result.rejected, result.steps) == (200, 600, 25)
    # The reference is the model that the stage began with: at the first look the policy has hardly moved.
    assert abs(result.curve[0]["margin"]) < abs(result.curve[-1]["margin"])
    now, then = margins(aligned, rows[3]), margins(before, rows[3])
    assert min(new - old for new, old in zip(now, then, strict=True)) > 0.5
    assert (aligned.get_output_embeddings().weight is aligned.get_input_embeddings().weight) == tied
    if adapters:
        assert not any("lora" in name for name, _ in aligned.named_parameters())
        at = aligned.get_input_embeddings().weight
        assert torch.equal(at, before.get_input_embeddings().weight)
    else:
        assert margins(model, rows[3]) == pytest.approx(then)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_margins_of_a_language_model_with_dropout_begin_at_zero(
    tmp_path: Path, kind: str, adapters: bool
) -> None:
    tiny = shop()
    foreign(tmp_path, kind)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    dropouts = {"attention_dropout": 0.5} if kind == "llama" else {"attn_pdrop": 0.5, "resid_pdrop": 0.5}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **dropouts)
    translation = VocabularyTranslation(tiny.prompt, tiny.tokenizer, theirs)
    model.resize_token_embeddings(len(theirs))
    rows = [translation.translate_preference(row) for row in ours(tiny, 40)]
    # A rate that moves no weight: every logged step is a first one.
    dpo = DpoSettings.model_validate({"max_rejected": 3, "batch": 8, "lr": 1e-30})
    lora = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM",
        fan_in_fan_out=kind == "gpt2",
    )  # fmt: skip
    _, result = align_language_model(
        model, theirs, rows, tiny.settings.model_copy(update={"dpo": dpo}),
        lora if adapters else None,
    )  # fmt: skip
    assert (result.margin, result.accuracy, result.drop) == (0.0, 0.0, 0.0)


@pytest.mark.learning
def test_an_aligned_language_model_that_fell_too_far_is_not_kept(tmp_path: Path) -> None:
    tiny = shop(
        users=20, epochs=1, weights={"next_sid": 1.0, "sid_to_title": 0.0, "title_to_sid": 0.0}, max_items=5,
        validation_users=0, dpo={"batch": 8, "lr": 3e-2, "max_drop": 1e-4, "sft_weight": 0.0, "epochs": 3},
    )  # fmt: skip
    name = foreign(tmp_path / "foreign", "llama")
    tuned = tune_lora(name, tiny.rows, tiny.tokenizer, tiny.sids, tiny.settings, tmp_path / "tuned")
    assert tuned is not None
    # One answer is both: whatever rises over it, it falls as well.
    rows = [
        one | {"chosen_ids": tiny.catalogue.codes[n % 24].tolist()} for n, one in enumerate(ours(tiny, 160))
    ]
    result = align_lora(tuned, rows, tiny.rows, tiny.tokenizer, tiny.sids, tiny.settings)
    assert result.dpo is not None
    assert "nats below the reference" in result.dpo.stopped
    assert (result.aligned, result.aligned_quality) == (None, None)
    assert not (tmp_path / "tuned-dpo").exists()
    json.dumps(result.as_dict())


@pytest.mark.learning
def test_a_tuned_model_is_aligned_beside_it_and_ranked_under_the_same_constraint(tmp_path: Path) -> None:
    tiny = shop(
        users=60, epochs=4, weights={"next_sid": 1.0, "sid_to_title": 0.0, "title_to_sid": 0.0}, max_items=5,
        lora={"lr": 0.003, "batch_tokens": 256, "rank": 8, "dropout": 0.0}, validation_users=12,
        dpo={"batch": 16, "lr": 3e-3, "max_rejected": 3, "loss": "softmax_dpo", "max_recall_fall": 1.0,
             "max_invalid_rise": 1.0, "max_drop": 50},
    )  # fmt: skip
    name = foreign(tmp_path / "foreign", "llama")
    tuned = tune_lora(name, tiny.rows, tiny.tokenizer, tiny.sids, tiny.settings, tmp_path / "tuned")
    assert tuned is not None
    result = align_lora(tuned, ours(tiny, 160), tiny.rows, tiny.tokenizer, tiny.sids, tiny.settings)
    assert result.dpo is not None
    assert result.aligned_quality is not None
    assert result.dpo.pairs == 160
    assert result.dpo.margin > 0
    assert result.aligned_quality.users == result.quality.users > 0
    assert result.quality == tuned.quality
    assert AutoModelForCausalLM.from_pretrained(result.aligned).config.vocab_size == 24
