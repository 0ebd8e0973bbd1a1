"""A fresh generator for a catalogue, in the shape that the settings say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from registry.bundles.prompt import Prompt
from trainer.generator.model import GeneratorForCausalLM, new_generator
from trainer.sequences.interactions import TrainingCatalogue
from trainer.settings import TrainerSettings


def fresh_generator(
    catalogue: TrainingCatalogue,
    text_vectors: npt.NDArray[np.float32] | None,
    prompt: Prompt,
    num_tokens: int,
    settings: TrainerSettings,
    num_context: int = 0,
) -> GeneratorForCausalLM:
    """A generator with weights drawn from `settings.seed` that has every item of the catalogue.

    Its vocabulary is `num_tokens` tokens, then `num_context` tokens of contexts.
    text (I, T) float32: a vector of each item's text, None where the generator does not see texts.
    """
    torch.manual_seed(settings.seed)
    model = new_generator(
        prompt.sizes, prompt.code_base(0), num_tokens + num_context, hidden_size=settings.width,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads, dropout=settings.dropout,
        intermediate_size=settings.ffn_factor * settings.width,
        depth_size=settings.depth_factor * settings.width, max_items=prompt.max_items,
        item_dropout=settings.item_dropout, item_vectors=settings.item_vectors,
        text_size=0 if text_vectors is None else text_vectors.shape[1],
        num_context=num_context,
    )  # fmt: skip
    model.set_items(
        torch.from_numpy(catalogue.codes), None if text_vectors is None else torch.from_numpy(text_vectors)
    )
    return model


def load_model(folder: Path) -> tuple[GeneratorForCausalLM, PreTrainedTokenizerFast]:
    """Model and tokenizer of a bundle's model/ folder, on the CPU in float32."""
    transformers_logging.disable_progress_bar()
    model = GeneratorForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)
