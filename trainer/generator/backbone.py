"""The parts of the generator: causal layers over positions, and the depth head of one level.

Shapes: B rows, P positions, D width, N states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.generator.configuration import GeneratorConfig


# Not torch's own: that one has no export to opset 18, and rounds to bfloat16 where this one gives float32.
class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a gain (Zhang and Sennrich 2019), of `groups` equal parts alone."""

    def __init__(self, size: int, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if self.groups > 1:
            # Not unflatten: the exporter takes the sizes that it sees there for constants.
            parts = x.reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)
            return _normalise(parts).reshape(x.shape) * self.weight
        return _normalise(x) * self.weight


def _normalise(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)


def _rotate_positions(x: Tensor, theta: float) -> Tensor:
    """Rotary positions (Su et al. 2021) on (B, H, P, E): scores depend on distances alone."""
    half = x.shape[-1] // 2
    exponents = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angles = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * theta**-exponents
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Layer(nn.Module):
    """One causal layer: attention and a short convolution side by side, then a feed-forward part."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.theta = config.num_attention_heads, config.rope_theta
        self.kernel = config.kernel_size
        self.mix_norm, self.ffn_norm = (RMSNorm(width, config.norm_groups) for _ in range(2))
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.conv = nn.Conv1d(width, width, self.kernel, groups=width, bias=False)
        self.up_proj = nn.Linear(width, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, width, bias=False)
        self.drop = nn.Dropout(config.dropout)
        # Of attention's weights. A module, though only its rate is read: what switches dropout off in a model
        # looks for modules.
        self.attention_drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, D) -> (B, P, D); place p sees places 0 to p."""
        y = self.mix_norm(x)
        batch, positions, width = y.shape
        q, k, v = self.qkv_proj(y).view(batch, positions, 3, self.heads, width // self.heads).unbind(2)
        q, k = (_rotate_positions(part.transpose(1, 2), self.theta) for part in (q, k))
        drop = self.attention_drop
        attended = F.scaled_dot_product_attention(
            q, k, v.transpose(1, 2), is_causal=True, dropout_p=drop.p if drop.training else 0.0
        )
        local = self.conv(F.pad(y.transpose(1, 2), (self.kernel - 1, 0))).transpose(1, 2)
        x = x + self.drop(self.o_proj(attended.transpose(1, 2).reshape(batch, positions, width)) + local)
        return x + self.drop(self.down_proj(F.gelu(self.up_proj(self.ffn_norm(x)))))


class DepthLevel(nn.Module):
    """The depth head of one level: state and chosen codes -> the vector that scores this level's code."""

    def __init__(self, config: GeneratorConfig, level: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.state_proj = nn.Linear(width, config.depth_size, bias=False)
        self.prefix_proj = nn.Linear(width, config.depth_size, bias=False) if level else None
        self.out_proj = nn.Linear(config.depth_size, width, bias=False)
        self.norm = RMSNorm(width, config.norm_groups)

    def forward(self, state: Tensor, prefix: Tensor | None) -> Tensor:
        """state (N, D); prefix (N, D) = sum of the chosen codes' embeddings, None at level 0 -> (N, D)."""
        mixed = self.state_proj(state)
        if self.prefix_proj is not None and prefix is not None:
            mixed = mixed + self.prefix_proj(prefix)
            state = state + prefix
        out: Tensor = self.norm(state + self.out_proj(F.gelu(mixed)))
        return out
