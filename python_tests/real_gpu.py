"""The native backend's CUDA side on a real device, for tests that hold their tensors on the host.

``tensors_moved_to(device)`` sends what the native kernels are given to a device, with strides and offsets as they are,
and brings the results back. So every test of the ``backend`` fixture also runs on a GPU where there is one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tgt_fast.kernels import latent_calls, tokens_calls
from tgt_fast.kernels.calls import DistillCall, Gradients, gradients, outputs
from tgt_fast.kernels.native import distill, latent, tokens, topk


def wait_for_memory(gigabytes: int, patience: float = 30.0) -> None:
    """Until so much of the device is free: other processes run tests beside this one. Skips where it never is."""
    end = time.monotonic() + patience
    while torch.cuda.mem_get_info()[0] < gigabytes << 30:
        if time.monotonic() > end:
            pytest.skip(f"needs {gigabytes} GB of free device memory")
        time.sleep(0.5)


def give_memory_back() -> None:
    """Free the memory that torch keeps of a test for a next one: others may need it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device in memory that is laid out alike, gaps between rows included."""
    storage = tensor.detach().untyped_storage()
    everything = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)  # type: ignore[call-overload]
    copy = everything.to(device, copy=True)
    return copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Mover:
    """Makes functions of host tensors of functions of device tensors."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def there(self, value: Any) -> Any:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.there, value))
        return moved(value, self.device) if isinstance(value, Tensor) else value

    def forward(self, function: Callable[..., None], outputs: Callable[[Any], Any] = outputs) -> Callable[..., None]:
        """Of an op's forward, which fills what it is given."""

        def run(call: Any, out: Any, **chosen: Any) -> None:
            there = self.there(call)
            made = outputs(there)
            function(there, made, **chosen)
            _bring(made, out)

        return run

    def backward(self, function: Callable[..., None]) -> Callable[..., None]:
        """Of its backward."""

        def run(call: DistillCall, row_state: Tensor, d_loss: Tensor, grads: Gradients, **chosen: Any) -> None:
            there = self.there(call)
            made = gradients(there)
            function(there, self.there(row_state), self.there(d_loss), made, **chosen)
            _bring(made, grads)

        return run

    def in_place(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Of one that changes its first argument."""

        def run(changed: Tensor, *arguments: Any) -> None:
            on_device = self.there(changed)
            function(on_device, *map(self.there, arguments))
            changed.copy_(on_device)

        return run


def _bring(made: Any, room: Any) -> None:
    if isinstance(room, Tensor):
        made, room = (made,), (room,)
    for value, here in zip(made, room, strict=True):
        if value is not None and here is not None:
            here.copy_(value)


@contextmanager
def tensors_moved_to(device: torch.device) -> Iterator[None]:
    """Within it the native kernels run on ``device`` and their results come back."""
    mover = Mover(device)
    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (distill, "forward", mover.forward(distill.forward)),
        (distill, "backward", mover.backward(distill.backward)),
        (distill, "scale_", mover.in_place(distill.scale_)),
        (distill, "takes_shares", lambda call: False),  # asked of tensors that are still on the host
        (topk, "forward", mover.forward(topk.forward)),
        (topk, "backward", mover.backward(topk.backward)),
        (topk, "scale_", mover.in_place(topk.scale_)),
        (latent, "forward", mover.forward(latent.forward, latent_calls.outputs)),
        (tokens, "forward", mover.forward(tokens.forward, tokens_calls.outputs)),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, function in replaced:
        setattr(module, name, function)
    try:
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)
