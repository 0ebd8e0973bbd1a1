"""A fresh generator for a catalogue, in the shape that the settings say."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from registry.prompt import Prompt
from trainer.data import Catalogue
from trainer.generator import GeneratorForCausalLM, new_generator
from trainer.settings import TrainerSettings


def fresh_generator(
    known: Catalogue,
    text: npt.NDArray[np.float32] | None,
    prompt: Prompt,
    words: int,
    settings: TrainerSettings,
) -> GeneratorForCausalLM:
    """Weights drawn from `settings.seed`, over `words` tokens in all; it knows every item of the catalogue.

    text (I, T) float32: a vector of each item's text, None where the generator does not see texts.
    """
    torch.manual_seed(settings.seed)
    model = new_generator(
        prompt.sizes, prompt.code_base(0), words, hidden_size=settings.width,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads, dropout=settings.dropout,
        intermediate_size=settings.ffn_factor * settings.width,
        depth_size=settings.depth_factor * settings.width, max_items=prompt.max_items,
        item_dropout=settings.item_dropout, item_vectors=settings.item_vectors,
        text_size=0 if text is None else text.shape[1],
    )  # fmt: skip
    model.know(torch.from_numpy(known.codes), None if text is None else torch.from_numpy(text))
    return model
