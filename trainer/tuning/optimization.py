"""The optimisation step that every training loop here takes, and the loop of those that need no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

_MAX_GRADIENT_NORM = 1.0
# Steps between two looks at the loss of a training: some tenths of a second of a small model on a GPU.
STEPS_BETWEEN_LOOKS = 20
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

    def minimise(self, loss: Tensor) -> Tensor:
        """One step down a scalar loss; its value (), on the device that it was computed on."""
        self.clear_gradients()
        loss.backward()
        self.apply_gradients()
        return loss.detach()


def train_on_batches(
    optimizer: ClippedAdamW,
    batches: Iterable[Batch],
    loss_of: Callable[[Batch], Tensor],
    *,
    stop: Callable[[], bool] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[int, float]:
    """A step for each batch until `stop()`, called before each -> how many steps, and the last one's loss.

    The loss is NaN where there was no step. `progress(step, loss)` is called every STEPS_BETWEEN_LOOKS steps:
    the host waits for a GPU to tell a loss. SFT has a loop of its own (trainer.tuning.sft): it shares its
    steps with other processes, and goes on from checkpoints.
    """
    steps, value = 0, torch.tensor(float("nan"))
    for batch in batches:
        if stop is not None and stop():
            break
        value = optimizer.minimise(loss_of(batch))
        steps += 1
        if progress is not None and steps % STEPS_BETWEEN_LOOKS == 0:
            progress(steps, float(value))
    return steps, float(value)
