"""A GPU that is not there: tensors that say they are on one, and compute on the CPU, bit for bit as it does.

Torch's fake tensors carry a device, too, but have no numbers, and no backward pass on a machine without a
GPU. Here whole trainings run. An operation that mixes devices is refused, as on a real one, and so is what a
real one allows and pays for with a copy (an index on the CPU). What makes the host wait for the GPU is noted.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

import trainer

GPU = torch.device("cuda", 0)
_TRAINER = str(Path(trainer.__file__).parent) + "/"
# Their result has a shape, or is a number, that only the GPU knows.
_WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::equal", "aten::is_nonzero", "aten::bincount",
}  # fmt: skip
_ALIASING_COPIES = {"aten::copy_", "aten::_foreach_copy_"}


class MixedDevices(RuntimeError):
    """An operation on tensors of the CPU and of the GPU."""


class GpuTensor(Tensor):
    """A tensor whose numbers are `held`, on the CPU, and whose device is a GPU to all who ask."""

    held: Tensor
    waits: list[str]  # of the newest `pretend_gpu`: where the host waited

    @staticmethod
    def __new__(cls, held: Tensor, *_: Any) -> GpuTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=held.device, requires_grad=False,
        )  # fmt: skip

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cuda(self) -> bool:
        return True

    def __repr__(self, **_: Any) -> str:
        return f"GpuTensor({self.held!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> GpuTensor:
        return GpuTensor(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split(".")[0]
        if name not in _ALIASING_COPIES:
            for other in pytree.tree_leaves((args, kwargs)):
                # A number on the CPU may meet tensors of the GPU.
                if isinstance(other, Tensor) and not isinstance(other, GpuTensor) and other.dim():
                    raise MixedDevices(f"{func.name()}: tensors of the GPU, and one of the CPU")
        if name in _WAITS or _has_mask(name, args):
            _note(name)
        held_args, held_kwargs = pytree.tree_map_only(GpuTensor, lambda part: part.held, (args, kwargs))
        result = pytree.tree_map_only(Tensor, GpuTensor, func(*held_args, **held_kwargs))
        return return_and_correct_aliasing(func, args, kwargs, result)


def _has_mask(name: str, args: Any) -> bool:
    """Whether it is an index by a mask, whose number of places only the GPU knows."""
    return name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_") and any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )


def _note(what: str) -> None:
    stack = traceback.extract_stack()
    if any(frame.filename.endswith("/clip_grad.py") for frame in stack):
        return  # it sorts gradients by their device in C++, where these are on the CPU
    ours = [frame for frame in stack if frame.filename.startswith(_TRAINER)]
    where = f" at {ours[-1].filename.removeprefix(_TRAINER)}:{ours[-1].lineno}" if ours else ""
    GpuTensor.waits.append(what + where)


class _Placement(TorchFunctionMode):
    """Gives tensors to the GPU, and fetches them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.numpy and isinstance(args[0], GpuTensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")
        if func is Tensor.tolist and isinstance(args[0], GpuTensor):
            _note("tolist")
            return args[0].held.tolist()
        if any(isinstance(part, GpuTensor) for part in args):
            with self:
                kwargs |= _inner_tensors(func, args, kwargs)
            if func is F.embedding_bag:
                args = (args[0].flatten(), *args[1:])
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return _moved(func, args, kwargs)
        target = kwargs.get("device")
        if target is not None and torch.device(target).type == "cuda":
            kwargs["device"] = "cpu"
            result = func(*args, **kwargs)
            return result if isinstance(result, GpuTensor) else GpuTensor(result)
        return func(*args, **kwargs)


def _inner_tensors(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments in place of what a function would otherwise make itself, out of the mode's sight."""
    if func is F.embedding_bag and kwargs.get("offsets") is None:
        return {"offsets": torch.arange(0, args[0].numel(), args[0].shape[-1], device=GPU)}
    if func is F.scaled_dot_product_attention and kwargs.get("dropout_p") and kwargs.get("is_causal"):
        causal = torch.ones(args[0].shape[-2], args[1].shape[-2], dtype=torch.bool, device=GPU).tril()
        return {"attn_mask": causal, "is_causal": False}
    return {}


def _moved(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    tensor = args[0]
    on_gpu = isinstance(tensor, GpuTensor)
    target: Any = {Tensor.cpu: "cpu", Tensor.cuda: "cuda"}.get(func)
    dtype = kwargs.get("dtype")
    if func is Tensor.to:
        target = kwargs.get("device")
        for part in args[1:]:
            if isinstance(part, Tensor):
                target, dtype = part.device, part.dtype
            elif isinstance(part, str | torch.device):
                target = part
            elif isinstance(part, torch.dtype):
                dtype = part
    if dtype is not None and dtype != tensor.dtype:
        tensor = tensor.type(dtype)
    wants_gpu = on_gpu if target is None else torch.device(target).type == "cuda"
    if wants_gpu == on_gpu:
        return tensor
    if on_gpu:
        _note("cpu")
        return _Fetch.apply(tensor)
    return _Give.apply(tensor)


class _Give(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return GpuTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].held


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        return tensor.held.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return GpuTensor(grads[0])


@contextmanager
def pretend_gpu() -> Iterator[list[str]]:
    """While it lasts, `device()` is a GPU. Gives the list of what made the host wait, and where."""
    GpuTensor.waits = []
    with pytest.MonkeyPatch.context() as patch, _Placement():
        patch.setattr("trainer.tuning.devices.has_gpu", lambda: True)
        yield GpuTensor.waits
