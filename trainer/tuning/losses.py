"""The softmax cross-entropy over a whole catalogue, without keeping its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows whose logits are held at once: 256 of 12,000 items in bfloat16 are 6 MB, near a core's cache.
_ROWS = 256


class _Softmax(torch.autograd.Function):
    """Loss and gradients in one pass over the logits: they are made, used and dropped chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, items: Tensor, targets: Tensor, dtype: torch.dtype,
        bias_places: tuple[Tensor, Tensor] | None, bias: Tensor | None, weights: Tensor,
    ) -> Tensor:  # fmt: skip
        rows, table = queries.to(dtype), items.to(dtype)
        total_weight = weights.sum()
        grad_queries = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        grad_items = torch.zeros(items.shape, dtype=torch.float32, device=rows.device)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        for low in range(0, len(rows), _ROWS):
            chunk, target_columns = rows[low : low + _ROWS], targets[low : low + _ROWS, None]
            weight = weights[low : low + _ROWS, None]
            logits = chunk @ table.T
            if bias_places is not None and bias is not None:
                first, end = torch.searchsorted(
                    bias_places[0], torch.tensor([low, low + len(chunk)])
                ).tolist()
                at = (bias_places[0][first:end] - low, bias_places[1][first:end])
                logits.index_put_(at, bias[first:end].to(dtype), accumulate=True)
            max_logits = logits.amax(1, keepdim=True)
            target_logits = logits.gather(1, target_columns).float() - max_logits.float()
            shares = logits.sub_(max_logits).exp_()
            mass = shares.sum(1, keepdim=True, dtype=torch.float32)
            total += ((mass.log() - target_logits) * weight).sum()
            # From here on the gradient of the mean: softmax less one at the target.
            shares.mul_((weight / (mass * total_weight)).to(dtype))
            shares.scatter_add_(1, target_columns, (-weight / total_weight).to(dtype))
            if grad_bias is not None:
                grad_bias[first:end] = shares[at].float()
            grad_queries[low : low + _ROWS] = shares @ table
            grad_items += shares.T @ chunk
        ctx.save_for_backward(grad_queries, grad_items, grad_bias)
        ctx.dtypes = queries.dtype, items.dtype
        return total / total_weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_queries, grad_items, grad_bias = ctx.saved_tensors
        first, second = ctx.dtypes
        third = None if grad_bias is None else grad_bias * grads[0]
        return (
            (grad_queries * grads[0]).to(first),
            (grad_items * grads[0]).to(second),
            None,
            None,
            None,
            third,
            None,
        )


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of values (N,) by weights (N,), a scalar; None: all weigh the same."""
    return values.mean() if weights is None else (values * weights).sum() / weights.sum()


def softmax_loss(
    queries: Tensor, items: Tensor, targets: Tensor, smoothing: float = 0.0,
    bias_places: tuple[Tensor, Tensor] | None = None, bias: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mean over N of the cross-entropy of softmax(queries @ items^T), a scalar in float32.

    queries (N, D), items (I, D), targets (N,) int64 rows of `items`, N >= 1. Under autocast the products are
    in its dtype. `smoothing`: share of a target's weight that is spread evenly over all items (Szegedy et al.
    2016, section 7). `bias` (M,) float32 is added to the logits of `bias_places`: ascending queries (M,) and
    items (M,), no pair twice. `weights` (N,) float32 above 0: of each row in the mean; None: all the same.
    """
    mixed = torch.is_autocast_enabled(queries.device.type)
    dtype = torch.get_autocast_dtype(queries.device.type) if mixed else torch.float32
    with torch.autocast(queries.device.type, enabled=False):
        loss: Tensor = _Softmax.apply(
            queries, items, targets, dtype, bias_places, bias,
            torch.ones(len(targets), device=queries.device) if weights is None else weights,
        )  # fmt: skip
        if smoothing:
            # -mean_j log p_j = log sum exp - mean logit; the first part is what the loss has already.
            target_logits = (queries.float() * F.embedding(targets, items).float()).sum(-1)
            mean_logits = queries.float() @ items.float().mean(0)
            loss = loss + smoothing * weighted_mean(target_logits - mean_logits, weights)
    return loss
