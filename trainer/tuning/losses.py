"""The softmax cross-entropy over a whole catalogue, without keeping its logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows whose logits are held at once: 256 of 12,000 items in bfloat16 are 6 MB, near a core's cache.
_CPU_ROWS = 256
# On a GPU each chunk is a dozen launches, and memory holds more: this many logits in bfloat16 are 128 MB.
_GPU_LOGITS = 2**26


class ItemBias(NamedTuple):
    """What is added to the logits of a few items of each of N queries; S places, each item at most once."""

    items: Tensor  # (N, S) int64, -1 where a place is empty
    values: Tensor  # (N, S) float32

    def at(self, targets: Tensor) -> Tensor:
        """What is added (N,) to the logit of one item (N,) of each query."""
        return self.values.masked_fill(self.items != targets[:, None], 0.0).sum(1)

    def added_to(self, logits: Tensor) -> Tensor:
        """Logits (N, I) with it."""
        values = self.values.masked_fill(self.items < 0, 0.0).to(logits.dtype)
        return logits.scatter_add(1, self.items.clamp(min=0), values)

    @property
    def total(self) -> Tensor:
        """What is added (N,) to all logits of each query together."""
        return self.values.masked_fill(self.items < 0, 0.0).sum(1)


def _chunk_rows(items: int, device: torch.device) -> int:
    return _CPU_ROWS if device.type == "cpu" else max(_CPU_ROWS, _GPU_LOGITS // max(1, items))


class _Softmax(torch.autograd.Function):
    """Loss and gradients in one pass over the logits: they are made, used and dropped chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, items: Tensor, targets: Tensor, dtype: torch.dtype,
        bias_items: Tensor | None, bias_values: Tensor | None, weights: Tensor,
    ) -> Tensor:  # fmt: skip
        rows, table = queries.to(dtype), items.to(dtype)
        # Of no rows that count, the loss is 0.
        total_weight = weights.sum().clamp(min=torch.finfo(torch.float32).tiny)
        grad_queries = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        grad_items = torch.zeros(items.shape, dtype=torch.float32, device=rows.device)
        grad_bias = None if bias_values is None else torch.zeros_like(bias_values)
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        count = _chunk_rows(len(table), rows.device)
        for low in range(0, len(rows), count):
            chunk, target_columns = rows[low : low + count], targets[low : low + count, None]
            weight = weights[low : low + count, None]
            logits = chunk @ table.T
            if bias_items is not None and bias_values is not None:
                places = bias_items[low : low + count]
                empty, columns = places < 0, places.clamp(min=0)
                values = bias_values[low : low + count].masked_fill(empty, 0.0)
                logits.scatter_add_(1, columns, values.to(dtype))
            max_logits = logits.amax(1, keepdim=True)
            target_logits = logits.gather(1, target_columns).float() - max_logits.float()
            shares = logits.sub_(max_logits).exp_()
            mass = shares.sum(1, keepdim=True, dtype=torch.float32)
            total += ((mass.log() - target_logits) * weight).sum()
            # From here on the gradient of the mean: softmax less one at the target.
            shares.mul_((weight / (mass * total_weight)).to(dtype))
            shares.scatter_add_(1, target_columns, (-weight / total_weight).to(dtype))
            if grad_bias is not None:
                grad_bias[low : low + count] = shares.gather(1, columns).float().masked_fill(empty, 0.0)
            grad_queries[low : low + count] = shares @ table
            grad_items += shares.T @ chunk
        ctx.save_for_backward(grad_queries, grad_items, grad_bias)
        ctx.dtypes = queries.dtype, items.dtype
        return total / total_weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_queries, grad_items, grad_bias = ctx.saved_tensors
        queries_dtype, items_dtype = ctx.dtypes
        return (
            (grad_queries * grads[0]).to(queries_dtype),
            (grad_items * grads[0]).to(items_dtype),
            None,
            None,
            None,
            None if grad_bias is None else grad_bias * grads[0],
            None,
        )


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of values (N,) by weights (N,), a scalar; None: all weigh the same."""
    return values.mean() if weights is None else (values * weights).sum() / weights.sum()


def softmax_loss(
    queries: Tensor, items: Tensor, targets: Tensor, smoothing: float = 0.0,
    bias: ItemBias | None = None, weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mean over N of the cross-entropy of softmax(queries @ items^T + bias), a scalar in float32.

    queries (N, D), items (I, D), targets (N,) int64 rows of `items`, N >= 1. Under autocast the products are
    in its dtype. `smoothing`: share of a target's weight that is spread evenly over all items (Szegedy et al.
    2016, section 7). `bias` names rows of `items`. `weights` (N,) float32 from 0: of each row in the mean;
    None: all the same. Where all weigh 0 the loss is 0.
    """
    mixed = torch.is_autocast_enabled(queries.device.type)
    dtype = torch.get_autocast_dtype(queries.device.type) if mixed else torch.float32
    with torch.autocast(queries.device.type, enabled=False):
        loss: Tensor = _Softmax.apply(
            queries, items, targets, dtype, *((None, None) if bias is None else bias),
            torch.ones(len(targets), device=queries.device) if weights is None else weights,
        )  # fmt: skip
        if smoothing:
            # -mean_j log p_j = log sum exp - mean logit; the first part is what the loss has already.
            target_logits = (queries.float() * F.embedding(targets, items).float()).sum(-1)
            mean_logits = queries.float() @ items.float().mean(0)
            if bias is not None:
                target_logits = target_logits + bias.at(targets)
                mean_logits = mean_logits + bias.total / len(items)
            loss = loss + smoothing * weighted_mean(target_logits - mean_logits, weights)
    return loss
