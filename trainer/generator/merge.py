"""Several generators as one: as wide as all of them, with logits that are the mean of theirs.

Members of one shape that know the same items by the same codes and tokens stand side by side in the state:
every matrix is block-diagonal, every norm has a group a member, and both heads' products with concatenated
vectors are sums of the members' own. So the mean of their logits costs one model and one beam, and whatever
takes a generator (export, serving, alignment, a refresh) takes this one. An ensemble of networks that differ
by their seed errs in fewer places than each of them (Lakshminarayanan et al. 2017, arXiv 1612.01474).

Shapes: M members, D width of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.generator.backbone import RMSNorm
from trainer.generator.items import ItemTable
from trainer.generator.model import GeneratorForCausalLM, GeneratorModel

# What is M times as large in the merged shape; all else of the shape is the members'.
_WIDENED_SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "depth_size", "norm_groups")


@torch.no_grad()
def merge_generators(members: Sequence[GeneratorForCausalLM]) -> GeneratorForCausalLM:
    """One generator whose logits, of codes, words and items, are the mean of the members'.

    A single member is returned as it is. Raises ValueError where the members differ in shape, vocabulary or
    items.
    """
    first = members[0]
    if len(members) == 1:
        return first
    shape = _member_shape(first)
    table = first.model.items
    for other in members[1:]:
        other_table = other.model.items
        same = _member_shape(other) == shape and all(
            torch.equal(getattr(table, name), getattr(other_table, name))
            for name in ("keys", "codes", "text")
        )
        if not same:
            raise ValueError("only generators of one shape, vocabulary and catalogue can be merged")
    widened = {name: len(members) * getattr(first.config, name) for name in _WIDENED_SIZES}
    config = type(first.config).from_dict(first.config.to_dict() | widened)
    wide_model = GeneratorForCausalLM(config).to(first.device)
    wide_model.set_items(table.codes, table.text if config.text_size else None)
    parts = [dict(member.named_modules()) for member in members]
    for name, module in wide_model.named_modules():
        _join_module(name, module, [part[name] for part in parts])
    return wide_model.train(first.training)


def _member_shape(model: GeneratorForCausalLM) -> dict[str, object]:
    fields = model.config.to_dict()
    return {name: value for name, value in fields.items() if name not in ("_name_or_path", "dtype")}


def _join_module(name: str, module: nn.Module, parts: list[Any]) -> None:
    """Fill a module of the merged model from the members' modules of the same name."""
    kind = name.rpartition(".")[2]

    def parts_of(parameter: str = "weight") -> list[Tensor]:
        return [getattr(part, parameter) for part in parts]

    def set_value(value: Tensor, parameter: str = "weight") -> None:
        getattr(module, parameter).copy_(value)

    if kind == "lm_head":
        return  # tied to the token embeddings
    if isinstance(module, nn.Embedding):
        set_value(torch.cat(parts_of(), dim=1))
    elif isinstance(module, RMSNorm):
        # The depth head's last norm gives what is multiplied with the embeddings: a sum over the members,
        # which the division makes a mean.
        set_value(torch.cat(parts_of()) / (len(parts) if ".depth." in f".{name}" else 1))
    elif isinstance(module, nn.Conv1d):
        set_value(torch.cat(parts_of()))
    elif isinstance(module, ItemTable):
        set_value(torch.cat(parts_of("own"), dim=1), "own")
        # The merged model has one strength, 1: each member's own is multiplied into its vectors.
        set_value(
            torch.cat([part.repeat_vectors * part.repeat_strength for part in parts], dim=1), "repeat_vectors"
        )
    elif isinstance(module, nn.Linear):
        set_value(_JOINS.get(kind, _block_diagonal)(parts_of()))
    elif isinstance(module, GeneratorModel):
        set_value(torch.cat(parts_of("start")), "start")


def _block_diagonal(weights: Sequence[Tensor]) -> Tensor:
    return torch.block_diag(*weights)


def _block_diagonal_thirds(weights: Sequence[Tensor]) -> Tensor:
    """Queries, keys and values (3 D, D) of each: all queries first, then all keys, then all values."""
    return torch.cat(
        [_block_diagonal(part) for part in zip(*(weight.chunk(3) for weight in weights), strict=True)]
    )


def _stacked_rows(weights: Sequence[Tensor]) -> Tensor:
    return torch.cat(tuple(weights))


def _block_diagonal_mean(weights: Sequence[Tensor]) -> Tensor:
    return _block_diagonal(weights) / len(weights)


_JOINS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "qkv_proj": _block_diagonal_thirds,
    # The dense head's products with items' vectors are a sum over the members: made a mean.
    "query_proj": _block_diagonal_mean,
    # All members read the same text.
    "text_proj": _stacked_rows,
}
