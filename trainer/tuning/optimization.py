"""The optimisation step that every training loop here takes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_MAX_GRADIENT_NORM = 1.0
# Steps between two looks at the loss of a training: some tenths of a second of a small model on a GPU.
STEPS_BETWEEN_LOOKS = 20


class ClippedAdamW:
    """AdamW (Loshchilov and Hutter 2019) on gradients that are clipped to a norm of 1."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, fused: bool = False
    ) -> None:
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, weight_decay=weight_decay, fused=fused or None
        )

    def clear_gradients(self) -> None:
        """Forget the gradients of the step before."""
        self.optimizer.zero_grad(set_to_none=True)

    def apply_gradients(self, lr: float | None = None) -> None:
        """Clip the gradients and step, at the rate `lr` from now on where one is given."""
        nn.utils.clip_grad_norm_(self.parameters, _MAX_GRADIENT_NORM)
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        self.optimizer.step()

    def minimise(self, loss: Tensor, lr: float | None = None) -> Tensor:
        """One step down a scalar loss, at the rate `lr` from now on if it is given; its value () there."""
        self.clear_gradients()
        loss.backward()
        self.apply_gradients(lr)
        return loss.detach()
