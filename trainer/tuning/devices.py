"""The processes that train one model together, one a device, and what they send one another.

A launcher (`torchrun`, `accelerate launch`) starts them and says in the environment how many they are. The
process of rank 0 is the main one: it alone reads Kafka, validates, writes and speaks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from streams.errors import SidstreamError
from trainer.settings import Arithmetic

# The others wait while the main process reads the window and validates. A process that ends is noticed by
# the launcher at once, which ends the others: this is not how an error is found.
_WAIT = timedelta(days=1)
# How a launcher names the processes. One that works alone again must not show this to libraries.
_NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def has_gpu() -> bool:
    """Whether this machine has a GPU that torch can use."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if has_gpu() else "cpu")


def fast_bf16(processor: torch.device) -> bool:
    """Whether the processor has instructions for matrix products in bfloat16, which make them the faster."""
    if processor.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported())


def resolved_arithmetic(arithmetic: Arithmetic, processor: torch.device) -> Literal["float32", "bfloat16"]:
    """The type of matrix products in training on this device: "auto" is the faster one there.

    Weights, gradients and the optimizer are float32 in both cases. A processor without instructions for
    bfloat16 computes it in more time, with the same rounding.
    """
    if arithmetic == "auto":
        return "bfloat16" if fast_bf16(processor) else "float32"
    return arithmetic


def training_arithmetic(arithmetic: Arithmetic, processor: torch.device) -> torch.autocast:
    """The context in which training computes its losses, and a baseline its states."""
    return torch.autocast(
        processor.type, torch.bfloat16, enabled=resolved_arithmetic(arithmetic, processor) == "bfloat16"
    )


class Devices:
    """The processes of a training. This class is a single process: no method sends anything."""

    rank = 0
    count = 1

    @property
    def main(self) -> bool:
        """Whether this process leads."""
        return self.rank == 0

    def broadcast(self, numbers: Sequence[float]) -> list[float]:
        """The main process's numbers, in every process."""
        return list(numbers)

    def broadcast_weights(self, model: nn.Module) -> None:
        """Give every process the main one's weights; all have come here when this returns."""

    def average_gradients(self, model: nn.Module, loss: Tensor | None) -> Tensor:
        """Put the mean gradient over batches in place of each process's own, and return the mean loss ().

        A process that has no batch in this step gives None. A parameter that no batch reached keeps no
        gradient.
        """
        assert loss is not None, "one process has a batch in every step"
        return loss.detach()

    def send(self, folder: Path) -> None:
        """Tell the others, who are in `receive`, in which folder the next training lies."""

    def receive(self) -> Path | None:
        """Wait for the folder of the next training; None when the main process needs the others no more."""
        return None

    def leave(self) -> None:
        """Let the others go: this process works alone from here on. Again it does nothing."""


class ProcessGroup(Devices):
    """The processes that a launcher started, joined by NCCL where there are GPUs, else by Gloo.

    Raises SidstreamError where another process is gone.
    """

    def __init__(self) -> None:
        # Here: a training in one process does not pay for the import.
        from accelerate import PartialState

        gpu = has_gpu()
        with _together():
            self._state = PartialState(cpu=not gpu, backend=None if gpu else "gloo", timeout=_WAIT)
        self.rank, self.count = self._state.process_index, self._state.num_processes

    def broadcast(self, numbers: Sequence[float]) -> list[float]:
        from accelerate.utils import broadcast

        with _together():
            sent = torch.tensor(numbers, dtype=torch.float64, device=self._state.device)
            main_numbers: list[float] = broadcast(sent).tolist()
        return main_numbers

    def broadcast_weights(self, model: nn.Module) -> None:
        from accelerate.utils import broadcast

        with _together(), torch.no_grad():
            flat = nn.utils.parameters_to_vector(model.parameters())
            nn.utils.vector_to_parameters(broadcast(flat), model.parameters())
            self._state.wait_for_everyone()

    def average_gradients(self, model: nn.Module, loss: Tensor | None) -> Tensor:
        from accelerate.utils import reduce

        parameters = list(model.parameters())
        reached = [float(value.grad is not None) for value in parameters]
        own = [torch.zeros_like(value) if value.grad is None else value.grad for value in parameters]
        # One message: the gradients, whose are there, the loss, and whether there was a batch.
        last = torch.tensor([*reached, 0.0, float(loss is not None)], device=own[0].device)
        if loss is not None:
            last[-2] = loss.detach()
        sent = torch.cat([*(grad.flatten() for grad in own), last])
        with _together():
            total = reduce(sent, "sum")
        # The one look at the host: a parameter that no batch reached must keep no gradient.
        *reached, value, batches = total[-len(last) :].tolist()
        grads = (total[: -len(last)] / batches).split([grad.numel() for grad in own])
        for parameter, grad, there in zip(parameters, grads, reached, strict=True):
            parameter.grad = grad.view_as(parameter) if there else None
        return total.new_tensor(value / batches)

    def send(self, folder: Path) -> None:
        self._broadcast_text(str(folder.absolute()))

    def receive(self) -> Path | None:
        named = self._broadcast_text("")
        return Path(named) if named else None

    def leave(self) -> None:
        from accelerate import PartialState

        if self.count == 1:
            return
        if self.main:
            self._broadcast_text("")
        with _together():
            self._state.wait_for_everyone()
            self._state.destroy_process_group()
        PartialState._reset_state()
        _forget_launcher()
        self.rank, self.count = 0, 1

    def _broadcast_text(self, text: str) -> str:
        """The main process's text, in every process."""
        size = int(self.broadcast([float(len(text.encode()))])[0])
        data = list(text.encode()) if self.main else [0] * size
        return bytes(int(number) for number in self.broadcast(data)).decode() if size else ""


@contextmanager
def _together() -> Iterator[None]:
    """A message that cannot be sent or received is one line, not a traceback."""
    try:
        yield
    except RuntimeError as error:
        raise SidstreamError(
            "another process of this training ended, or cannot be reached: see its error, then start all "
            f"again ({str(error).splitlines()[0]})"
        ) from error


def _forget_launcher() -> None:
    for name in list(os.environ):
        if name in _NAMES or name.startswith("TORCHELASTIC_"):
            del os.environ[name]


def launched_devices() -> Devices:
    """The processes that the launcher started; one where there is no launcher, or it started one."""
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return ProcessGroup()
    _forget_launcher()
    return Devices()
