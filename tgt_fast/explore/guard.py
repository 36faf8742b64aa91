"""Run a student without a trace: it is found afterwards as it was before, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tgt_fast.teacher.teacher import module_behind


def unwrapped(student: Callable[..., Any]) -> Callable[..., Any]:
    """The module inside a DistributedDataParallel, whose forward would broadcast buffers, arm reduction."""
    inner = _uncompiled(student)
    return inner.module if isinstance(inner, DistributedDataParallel) else student


def what_runs(part: Callable[..., Any]) -> Callable[..., Any]:
    """The module, or the function, at the bottom of a callable, to tell whether two are the same."""
    part = _uncompiled(part)
    module = module_behind(part)
    return part if module is None else _uncompiled(module)  # not by truth: a module may have a length


def _uncompiled(part: Any) -> Any:
    """What ``torch.compile`` was given."""
    while True:
        held = part._modules if isinstance(part, nn.Module) else getattr(part, "__dict__", {})
        inner = held.get("_orig_mod", held.get("_torchdynamo_orig_callable"))
        if inner is None:
            return part
        part = inner


@contextmanager
def left_as_found(student: Callable[..., Any], device: torch.device) -> Iterator[None]:
    """Inside, the student is in eval mode; after, its flags, buffers and the global generators are as before.

    Parameters and their ``.grad`` are the caller's part: differentiate with ``torch.autograd.grad`` alone.
    """
    module = module_behind(student)
    modules = list(module.modules()) if module is not None else []
    flags = [(m, m.training) for m in modules]
    buffers = [
        (m, name, buffer, buffer._version, buffer.detach().clone())
        for m in modules
        for name, buffer in m._buffers.items()
        if buffer is not None
    ]
    devices = [device] if device.type == "cuda" and not torch.cuda.is_current_stream_capturing() else []
    try:
        with torch.random.fork_rng(devices):
            for m in modules:
                # Not m.eval(): an adapter's train() may merge weights there, and the rounding would stay.
                m.training = False
            yield
    finally:
        for m, flag in flags:
            m.training = flag
        for m, name, buffer, version, before in buffers:
            _restore(m, name, buffer, version, before)


def _restore(module: nn.Module, name: str, buffer: Tensor, version: int, before: Tensor) -> None:
    if module._buffers.get(name) is not buffer:
        module._buffers[name] = buffer
    if buffer._version != version:
        with torch.no_grad():
            buffer.copy_(before)
