"""The configuration of a generator: its sizes, which ids its vocabulary gives to what, and what it reads."""

from __future__ import annotations

from transformers import PreTrainedConfig


class GeneratorConfig(PreTrainedConfig):
    """The shape of a generator. `sizes` are the codes a level; level l's code c is the token
    `code_base + sum(sizes[:l]) + c`; tokens below `code_base` are special, those after all codes words, but
    for the last `num_context`, which are a request's context."""

    model_type = "sidstream-generator"

    sizes: list[int] | tuple[int, ...] = (16, 16, 16)
    code_base: int = 16
    vocab_size: int = 64
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 256
    depth_size: int = 128
    kernel_size: int = 5
    norm_groups: int = (
        1  # a merged generator normalises each of its members by itself (trainer.generator.merge)
    )
    dropout: float = 0.2
    rope_theta: float = 10_000.0
    max_items: int = 50
    num_items: int = 0
    text_size: int = 0
    item_dropout: float = 0.0
    item_vectors: bool = True
    num_context: int = 0
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True
    use_cache: bool = False

    @property
    def levels(self) -> int:
        """L, the number of codes of an item."""
        return len(self.sizes)

    def code_range(self, level: int) -> tuple[int, int]:
        """First and one past the last token id of a level's codes."""
        start = self.code_base + sum(self.sizes[:level])
        return start, start + self.sizes[level]
