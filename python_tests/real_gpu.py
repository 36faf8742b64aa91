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

from tgt_fast.kernels.native import distill, latent, sparse, tokens
from tgt_fast.kernels.options import Forward, Listed


def wait_for_memory(gigabytes: int, patience: float = 30.0) -> None:
    """Until so much of the device is free: other processes run tests beside this one. Skips where it never is."""
    end = time.monotonic() + patience
    while torch.cuda.mem_get_info()[0] < gigabytes << 30:
        if time.monotonic() > end:
            pytest.skip(f"needs {gigabytes} GB of free device memory")
        time.sleep(0.5)


def give_memory_back() -> None:
    """What torch keeps of a test for a next one, others may need."""
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
        if isinstance(value, Listed):
            return Listed(*map(self.there, value))
        return moved(value, self.device) if isinstance(value, Tensor) else value

    def back(self, value: Any) -> Any:
        return value.cpu() if isinstance(value, Tensor) else value

    def plain(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            options = {name: self.there(value) for name, value in options.items()}
            return self.back(function(*map(self.there, arguments), **options))

        return run

    def of_student(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Of one that may write the student's gradient over its logits."""

        def run(student: Tensor, *arguments: Any, inplace: bool = False, **options: Any) -> Any:
            on_device = self.there(student)
            out = function(on_device, *map(self.there, arguments), inplace=inplace, **options)
            results = [self.back(value) for value in (out if isinstance(out, tuple) else (out,))]
            if inplace:
                student.detach().copy_(on_device)
                results[1 if isinstance(out, Forward) else 0] = student.detach()
            if isinstance(out, Forward):
                return Forward(*results)
            return tuple(results) if isinstance(out, tuple) else results[0]

        return run

    def in_place(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Of one that changes its first argument."""

        def run(changed: Tensor, *arguments: Any) -> None:
            on_device = self.there(changed)
            function(on_device, *map(self.there, arguments))
            changed.copy_(on_device)

        return run


@contextmanager
def tensors_moved_to(device: torch.device) -> Iterator[None]:
    """Within it the native kernels run on ``device`` and their results come back."""
    mover = Mover(device)
    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (distill, "forward", mover.of_student(distill.forward)),
        (distill, "backward", mover.of_student(distill.backward)),
        (distill, "scale_", mover.in_place(distill.scale_)),
        (sparse, "forward", mover.of_student(sparse.forward)),
        (sparse, "backward", mover.of_student(sparse.backward)),
        (sparse, "scale_", mover.in_place(sparse.scale_)),
        (latent, "perturb", mover.plain(latent.perturb)),
        (latent, "ascend", mover.plain(latent.ascend)),
        (tokens, "sample", mover.plain(tokens.sample)),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, function in replaced:
        setattr(module, name, function)
    try:
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)
