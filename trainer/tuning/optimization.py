"""The optimisation step that every training loop here takes, and the loop of those that need no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

_MAX_GRADIENT_NORM = 1.0
Batch = TypeVar("Batch")


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

    def minimise(self, loss: Tensor, lr: float | None = None) -> float:
        """One step down a scalar loss, at the rate `lr` from now on where one is given; its value."""
        self.clear_gradients()
        loss.backward()
        self.apply_gradients(lr)
        return float(loss.detach())


def train_on_batches(
    optimizer: ClippedAdamW,
    batches: Iterable[Batch],
    loss_of: Callable[[Batch], Tensor],
    *,
    stop: Callable[[], bool] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[int, float]:
    """A step for each batch until `stop()`, called before each -> how many steps, and the last one's loss.

    The loss is NaN where there was no step. `progress(step, loss)` is called after each step. SFT has a loop
    of its own (trainer.tuning.sft): it shares its steps with other processes, and goes on from checkpoints.
    """
    steps, value = 0, float("nan")
    for batch in batches:
        if stop is not None and stop():
            break
        value = optimizer.minimise(loss_of(batch))
        steps += 1
        if progress is not None:
            progress(steps, value)
    return steps, value
