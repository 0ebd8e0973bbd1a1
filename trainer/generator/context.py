"""How a request's context bends the state of its history: feature-wise linear modulation.

FiLM (Perez et al. 2018, arXiv 1709.07871): with c the sum of the embeddings of the context's tokens,
state' = state * (1 + A c) + B c. It comes after the backbone, so the state of a history does not depend on
the request, and a request without a context is answered from the state itself.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainer.generator.configuration import GeneratorConfig


class Modulation(nn.Module):
    """A and B, which start at zero: at first a context changes nothing."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.scale_proj = nn.Linear(width, width, bias=False)
        self.shift_proj = nn.Linear(width, width, bias=False)

    def forward(self, state: Tensor, context: Tensor) -> Tensor:
        """state (..., D), context (..., D) the sum of its tokens' embeddings -> state (..., D)."""
        modulated: Tensor = state * (1 + self.scale_proj(context)) + self.shift_proj(context)
        return modulated
