"""The small generator: one position an item, and a depth head that spells its SID code by code.

To transformers, TRL and peft it is an ordinary causal language model over flat token ids. Inside, the L
codes of an item fold into one position (the sum of their embeddings), a causal backbone runs over positions,
and the vector that predicts an item's next code is made from the last position and the codes already chosen
(RQ-Transformer's spatial and depth parts, Lee et al. 2022, arXiv 2203.01941). A convolution over the last
few positions runs beside attention (a local filter, after BSARec, arXiv 2312.10325).

Shapes: B rows, T flat tokens, P positions, L levels, D width, V tokens of vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

IGNORE = -100


class GeneratorConfig(PreTrainedConfig):
    """The shape of a generator. `sizes` are the codes a level; level l's code c is the token
    `code_base + sum(sizes[:l]) + c`; tokens below `code_base` are special, those after all codes words."""

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
    dropout: float = 0.2
    rope_theta: float = 10_000.0
    max_items: int = 50
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


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a gain (Zhang and Sennrich 2019)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * scale.to(x.dtype) * self.weight


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions (Su et al. 2021) on (B, H, P, E): scores depend on distances alone."""
    half = x.shape[-1] // 2
    steps = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angles = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * theta**-steps
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Layer(nn.Module):
    """One causal layer: attention and a short convolution side by side, then a feed-forward part."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.theta, self.dropout = config.num_attention_heads, config.rope_theta, config.dropout
        self.kernel = config.kernel_size
        self.mix_norm, self.ffn_norm = RMSNorm(width), RMSNorm(width)
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.conv = nn.Conv1d(width, width, self.kernel, groups=width, bias=False)
        self.up_proj = nn.Linear(width, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, width, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, D) -> (B, P, D); place p sees places 0 to p."""
        y = self.mix_norm(x)
        batch, places, width = y.shape
        q, k, v = self.qkv_proj(y).view(batch, places, 3, self.heads, width // self.heads).unbind(2)
        q, k = (_rotate(part.transpose(1, 2), self.theta) for part in (q, k))
        seen = F.scaled_dot_product_attention(
            q, k, v.transpose(1, 2), is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        local = self.conv(F.pad(y.transpose(1, 2), (self.kernel - 1, 0))).transpose(1, 2)
        x = x + self.drop(self.o_proj(seen.transpose(1, 2).reshape(batch, places, width)) + local)
        return x + self.drop(self.down_proj(F.gelu(self.up_proj(self.ffn_norm(x)))))


class DepthLevel(nn.Module):
    """The depth head of one level: state and chosen codes -> the vector that scores this level's code."""

    def __init__(self, config: GeneratorConfig, level: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.state_proj = nn.Linear(width, config.depth_size, bias=False)
        self.prefix_proj = nn.Linear(width, config.depth_size, bias=False) if level else None
        self.out_proj = nn.Linear(config.depth_size, width, bias=False)
        self.norm = RMSNorm(width)

    def forward(self, state: Tensor, prefix: Tensor | None) -> Tensor:
        """state (N, D); prefix (N, D) = sum of the chosen codes' embeddings, None at level 0 -> (N, D)."""
        mixed = self.state_proj(state)
        if self.prefix_proj is not None and prefix is not None:
            mixed = mixed + self.prefix_proj(prefix)
            state = state + prefix
        out: Tensor = self.norm(state + self.out_proj(F.gelu(mixed)))
        return out


class GeneratorPreTrainedModel(PreTrainedModel):
    """What the two models share: the configuration, and how weights start."""

    config_class = GeneratorConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        from transformers import initialization as init

        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
        elif isinstance(module, nn.Conv1d):
            init.normal_(module.weight, mean=0.0, std=self.config.kernel_size**-0.5 / 2)
        elif isinstance(module, nn.Embedding):
            # Rows of unit length: a normalised vector's logits then start with unit spread.
            init.normal_(module.weight, mean=0.0, std=self.config.hidden_size**-0.5)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, GeneratorModel):
            init.zeros_(module.start)


class GeneratorModel(GeneratorPreTrainedModel):
    """Folding, backbone and depth head: one vector a flat place, made to be multiplied with E^T."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # What is known before the first position: only malformed input, which has no BOS, reads it.
        self.start = nn.Parameter(torch.zeros(config.hidden_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.depth = nn.ModuleList(DepthLevel(config, level) for level in range(config.levels))
        self.drop = nn.Dropout(config.dropout)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings E (V, D)."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace E."""
        self.embed_tokens = value

    def states(self, positions: Tensor) -> Tensor:
        """Backbone: embeddings of positions (B, P, D), oldest first -> states (B, P, D)."""
        x = self.drop(positions)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x)
        return out

    def embed_items(self, codes: Tensor) -> Tensor:
        """Items as codes (B, P, L) of token ids -> positions (B, P, D)."""
        return self.embed_tokens(codes).sum(-2)

    def _levels_of(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> 0 for specials, 1..L for codes of level 0..L-1, L+1 for words."""
        bounds = [self.config.code_range(level)[0] for level in range(self.config.levels)]
        bounds.append(self.config.code_range(self.config.levels - 1)[1])
        return torch.bucketize(ids.contiguous(), torch.tensor(bounds, device=ids.device), right=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """input_ids (B, T) int64, attention_mask (B, T) of 0 and 1 or None -> last_hidden_state (B, T, D).

        The vector of place t scores token t + 1. Padding may be on either side.
        """
        if input_ids is None:
            raise ValueError("the generator folds token ids: pass input_ids, not inputs_embeds")
        levels, last = self._levels_of(input_ids), self.config.levels
        real = input_ids != self.config.pad_token_id
        if attention_mask is not None:
            real = real & attention_mask.bool()
        # A place closes a position unless it is a code that leaves its item open.
        opens = (levels >= 1) & (levels < last)
        closes = real & ~opens
        done = closes.long().cumsum(1)
        group = done - closes.long()

        embeds = self.embed_tokens(input_ids)
        folded = embeds * real[..., None]
        for back in range(1, last):
            same = real[:, back:] & real[:, :-back] & (group[:, back:] == group[:, :-back])
            folded = folded + F.pad(embeds[:, :-back] * same[..., None], (0, 0, back, 0))

        batch, length, width = folded.shape
        count = max(int(done[:, -1].max()), 1)
        # Where each position was closed; rows with fewer positions read place 0, which nothing real sees.
        slots = torch.where(closes, group, count)
        places = torch.zeros(batch, count + 1, dtype=torch.long, device=folded.device)
        places.scatter_(1, slots, torch.arange(length, device=folded.device).expand(batch, -1))
        rows = torch.arange(batch, device=folded.device)[:, None]
        states = self.states(folded[rows, places[:, :count]])

        states = torch.cat((self.start.to(states.dtype).expand(batch, 1, width), states), dim=1)
        state = states[rows, done]
        vectors = torch.zeros_like(state)
        chosen = torch.where(real & opens, levels, 0)
        for level, head in enumerate(self.depth):
            at = (chosen == level).nonzero(as_tuple=True)
            scored = head(state[at], folded[at] if level else None)
            vectors = vectors.index_put(at, scored.to(vectors.dtype))
        return BaseModelOutput(last_hidden_state=vectors)


class GeneratorForCausalLM(GeneratorPreTrainedModel, GenerationMixin):
    """The generator with its output layer, which is E itself."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        self.model = GeneratorModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The output layer, tied to the token embeddings."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the output layer."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits (B, T, V) over the whole vocabulary, and the mean next-token loss where labels are given."""
        vectors = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.lm_head(vectors[:, -logits_to_keep:] if logits_to_keep else vectors)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE
            )
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What `generate` passes to `forward`: always the whole sequence, since nothing is cached."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def encode(self, codes: Tensor, lengths: Tensor) -> Tensor:
        """The state after BOS and a row's items: what a request is decoded from.

        codes (B, P, L) token ids, oldest first, right-padded with 0; lengths (B,) items a row, 0 allowed
        -> (B, D). Equals the state that `forward` keeps at the last place of BOS and the items.
        """
        base = self.model
        begin = base.embed_tokens(torch.full_like(lengths, self.config.bos_token_id))[:, None]
        states = base.states(torch.cat((begin, base.embed_items(codes)), dim=1))
        return states.gather(1, lengths[:, None, None].expand(-1, 1, states.shape[-1]))[:, 0]

    def step(self, level: int, state: Tensor, prefix: Tensor | None) -> Tensor:
        """Log-probabilities of one level's codes, normalised over the whole vocabulary.

        state (N, D), prefix (N, level) token ids of the codes chosen (None at level 0) -> (N, K_level).
        """
        chosen = None if prefix is None else self.model.embed_tokens(prefix).sum(-2)
        logits = self.lm_head(self.model.depth[level](state, chosen))
        first, end = self.config.code_range(level)
        return logits[:, first:end] - logits.logsumexp(-1, keepdim=True)


def new_generator(
    sizes: Sequence[int], code_base: int, vocab_size: int, **shape: Any
) -> GeneratorForCausalLM:
    """A generator with fresh weights (torch's current seed)."""
    config = GeneratorConfig(sizes=list(sizes), code_base=code_base, vocab_size=vocab_size, **shape)
    return GeneratorForCausalLM(config)


AutoConfig.register(GeneratorConfig.model_type, GeneratorConfig)
AutoModelForCausalLM.register(GeneratorConfig, GeneratorForCausalLM)
