"""The small generator: one position an item, and a depth head that spells its SID code by code.

To transformers and peft it is an ordinary causal language model over flat token ids. Inside, the L
codes of an item fold into one position (the sum of their embeddings), a causal backbone runs over positions,
and the vector that predicts an item's next code is made from the last position and the codes already chosen
(RQ-Transformer's spatial and depth parts, Lee et al. 2022, arXiv 2203.01941). A convolution over the last
few positions runs beside attention (a local filter, after BSARec, arXiv 2312.10325). Beside the SID's codes a
position holds the item's own vector and text (trainer.generator.items), and the dense head scores a state
against every item's vector at once. The context of a request, beside its history (registry.bundles.context),
modulates the state that answers are decoded from (trainer.generator.context).

Shapes: B rows, T flat tokens, P positions, L levels, D width, V tokens of vocabulary, C context tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from trainer.generator.backbone import DepthLevel, Layer, RMSNorm
from trainer.generator.configuration import GeneratorConfig
from trainer.generator.context import Modulation
from trainer.generator.items import ItemTable, PastOccurrences
from trainer.generator.layout import TokenLayout, token_layout
from trainer.sequences.batches import IGNORE

# Spread of fresh weights, as in BERT and GPT-2.
_INITIAL_STD = 0.02


class GeneratorPreTrainedModel(PreTrainedModel):
    """The configuration and the initial weights of `GeneratorModel` and `GeneratorForCausalLM`."""

    config_class = GeneratorConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        from transformers import initialization as init

        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=_INITIAL_STD)
        elif isinstance(module, nn.Conv1d):
            init.normal_(module.weight, mean=0.0, std=self.config.kernel_size**-0.5 / 2)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=_INITIAL_STD)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, ItemTable):
            init.normal_(module.own, mean=0.0, std=_INITIAL_STD if module.has_own else 0.0)
            init.eye_(module.query_proj.weight)
            init.ones_(module.repeat_strength)
        elif isinstance(module, GeneratorModel):
            init.zeros_(module.start)
            # Here: transformers passes over a module of another package that has no weights of its own.
            if module.modulation is not None:
                init.zeros_(module.modulation.scale_proj.weight)
                init.zeros_(module.modulation.shift_proj.weight)


class GeneratorModel(GeneratorPreTrainedModel):
    """Folding, backbone and depth head: a vector for each flat token; its product with E^T are logits."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # The state before the first position: only malformed input, without BOS, reads it.
        self.start = nn.Parameter(torch.zeros(config.hidden_size))
        self.items = ItemTable(config)
        # A position is a sum of several small vectors: the norm scales it to the size of the layers' outputs.
        self.position_norm = RMSNorm(config.hidden_size, config.norm_groups)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_groups)
        self.depth = nn.ModuleList(DepthLevel(config, level) for level in range(config.levels))
        # None without context tokens, so that weights of a model without them load unchanged.
        self.modulation = Modulation(config) if config.num_context else None
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
        x = self.drop(self.position_norm(positions))
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x)
        return out

    def embed_items(self, codes: Tensor) -> Tensor:
        """Items as codes (B, P, L) of token ids -> positions (B, P, D)."""
        return self.embed_tokens(codes).sum(-2) + self.items.beyond_codes(self.items.rows(codes))

    def queries(self, states: Tensor) -> Tensor:
        """States (..., D) -> the dense head's queries (..., D): times items' vectors they give logits."""
        queries: Tensor = self.items.query_proj(states)
        return queries

    def repeat_bias(
        self, query: Tensor, rows: Tensor, lengths: Tensor, as_learned: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The dense head's addends to the logits of items that are in their row's history.

        query (B, D) from `queries`; rows (B, P) of the item table, oldest first, -1 for items without a row;
        lengths (B,): how many of them are the history -> row of the batch (M,), row of the item table (M,),
        addend (M,) float32, without repeats. `as_learned`: without `repeat_strength`.
        """
        rows, addends = self.repeat_bias_at_places(query, rows, lengths, as_learned)
        batch, place = (rows >= 0).nonzero(as_tuple=True)
        return batch, rows[batch, place], addends[batch, place]

    def repeat_bias_at_places(
        self, query: Tensor, rows: Tensor, lengths: Tensor, as_learned: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`repeat_bias` in the shape of the histories: rows (B, P), addends (B, P) float32.

        Rows are -1 where the history has no item of the table, or has it again later. No shape depends on
        what is in the histories.
        """
        places = torch.arange(rows.shape[1], device=rows.device)
        is_history = (places < lengths[:, None]) & (rows >= 0)
        same = (rows[:, :, None] == rows[:, None]) & is_history[:, None]
        is_last = is_history & ~(same & (places[:, None] < places)).any(-1)
        occurrences = PastOccurrences((lengths[:, None] - places).clamp(min=1), same.sum(-1).clamp(min=1))
        return torch.where(is_last, rows, -1), self.items.repeat_bias(query, occurrences, as_learned)

    def with_context(self, states: Tensor, context: Tensor | None) -> Tensor:
        """States (..., D) under contexts (..., C) of token ids, padded with 0 -> (..., D)."""
        if self.modulation is None or context is None:
            return states
        real = context != self.config.pad_token_id
        modulated: Tensor = self.modulation(states, (self.embed_tokens(context) * real[..., None]).sum(-2))
        return modulated

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """input_ids (B, T) int64, attention_mask (B, T) of 0 and 1 or None -> last_hidden_state (B, T, D).

        The vector of place t scores token t + 1. Padding may be on either side. Context tokens stand where an
        item may begin: they make no position, and condition what comes after them until the item closes.
        """
        if input_ids is None:
            raise ValueError("the generator folds token ids: pass input_ids, not inputs_embeds")
        layout = token_layout(input_ids, attention_mask, self.config)
        state, folded = self.depth_inputs(input_ids, layout)
        vectors = torch.zeros_like(state)
        for level, head in enumerate(self.depth):
            at = (layout.chosen == level).nonzero(as_tuple=True)
            scored = head(state[at], folded[at] if level else None)
            vectors = vectors.index_put(at, scored.to(vectors.dtype))
        return BaseModelOutput(last_hidden_state=vectors)

    def depth_inputs(self, input_ids: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """The inputs of the depth head at each place of flat input (B, T) of a layout.

        States (B, T, D) after the last closed position, and sums (B, T, D) of the embeddings of the open
        item's codes. A prompt is decoded from the state of its last place.
        """
        real, is_context, closes, closed_count = layout[1:5]
        group, last = closed_count - closes.long(), self.config.levels

        embeds = self.embed_tokens(input_ids)
        context_embeds = embeds * is_context[..., None]
        embeds = embeds * (real & ~is_context)[..., None]
        folded = embeds
        for back in range(1, last):
            same = real[:, back:] & real[:, :-back] & (group[:, back:] == group[:, :-back])
            folded = folded + F.pad(embeds[:, :-back] * same[..., None], (0, 0, back, 0))

        batch, length, width = folded.shape
        count = layout.positions
        # Where each position was closed; rows with fewer positions read place 0, which nothing real sees.
        slots = torch.where(closes, group, count)
        places = torch.zeros(batch, count + 1, dtype=torch.long, device=folded.device)
        places.scatter_(1, slots, torch.arange(length, device=folded.device).expand(batch, -1))
        rows = torch.arange(batch, device=folded.device)[:, None]
        closed = places[:, :count]
        positions = folded[rows, closed]
        if len(self.items.keys):
            rows_of_items = self._closed_items(input_ids, layout.levels, closed)
            positions = positions + self.items.beyond_codes(rows_of_items)
        states = self.states(positions)

        states = torch.cat((self.start.to(states.dtype).expand(batch, 1, width), states), dim=1)
        state = states[rows, closed_count]
        if self.modulation is not None:
            # The context since the last closed position: the sum so far, less the sum up to there.
            context_sums = F.pad(context_embeds.cumsum(1), (0, 0, 1, 0))
            item_starts = F.pad(closed + 1, (1, 0))
            state = self.modulation(
                state, context_sums[:, 1:] - context_sums[rows, item_starts.gather(1, closed_count)]
            )
        return state, folded

    def _closed_items(self, input_ids: Tensor, levels: Tensor, closed: Tensor) -> Tensor:
        """Rows (B, P) of the item table for the items that close at places `closed` (B, P) of input (B, T).

        -1 where the L tokens up to the place are not one whole item. levels (B, T) as of `TokenLayout`.
        """
        last, row = self.config.levels, torch.arange(len(closed), device=closed.device)[:, None, None]
        places = (closed[..., None] - torch.arange(last - 1, -1, -1, device=closed.device)).clamp(min=0)
        ascending = torch.arange(1, last + 1, device=closed.device)
        is_item = (levels[row, places] == ascending).all(-1)
        return torch.where(is_item, self.items.rows(input_ids[row, places]), -1)


class GeneratorForCausalLM(GeneratorPreTrainedModel, GenerationMixin):
    """The generator with its output layer, whose weights are the token embeddings E."""

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

    def set_items(self, codes: Tensor, text: Tensor | None = None) -> Tensor:
        """Make these the items of the item table and of the configuration: see `ItemTable.set_items`."""
        rows = self.model.items.set_items(codes, text)
        self.config.num_items = len(codes)
        return rows

    def encode(
        self,
        codes: Tensor,
        lengths: Tensor,
        beyond_codes: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """The state after BOS, a row's items and its context: what a request is decoded from.

        codes (B, P, L) token ids, oldest first, right-padded with 0; lengths (B,) items a row, 0 allowed;
        beyond_codes (B, P, D) the items' own vectors and texts, default: the item table's; context (B, C)
        int64 token ids padded with 0, default: no context -> (B, D). Equals the state that `forward` has at
        the last place of BOS, the items and the context.
        """
        base = self.model
        begin = base.embed_tokens(torch.full_like(lengths, self.config.bos_token_id))[:, None]
        items = (
            base.embed_items(codes)
            if beyond_codes is None
            else base.embed_tokens(codes).sum(-2) + beyond_codes
        )
        states = base.states(torch.cat((begin, items), dim=1))
        state = states.gather(1, lengths[:, None, None].expand(-1, 1, states.shape[-1]))[:, 0]
        return base.with_context(state, context)

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
