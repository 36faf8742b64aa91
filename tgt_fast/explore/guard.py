"""Run a student without a trace: it is found afterwards as it was before, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tgt_fast._rng import isolated_rng
from tgt_fast.teacher.modes import eval_mode
from tgt_fast.teacher.parts import modules_of
from tgt_fast.teacher.teacher import module_behind


def unwrapped(student: Callable[..., Any]) -> Callable[..., Any]:
    """The module inside a DistributedDataParallel, whose forward would broadcast buffers, arm reduction."""
    inner = _uncompiled(student)
    return inner.module if isinstance(inner, DistributedDataParallel) else student


def underlying_callable(part: Callable[..., Any]) -> Callable[..., Any]:
    """The module, or the function, at the bottom of a callable, to tell whether two are the same."""
    part = _uncompiled(part)
    module = module_behind(part)
    return part if module is None else _uncompiled(module)  # not by truth: a module may have a length


def _uncompiled(part: Any) -> Any:
    """The callable that ``torch.compile`` was given."""
    while True:
        held = part._modules if isinstance(part, nn.Module) else getattr(part, "__dict__", {})
        inner = held.get("_orig_mod", held.get("_torchdynamo_orig_callable"))
        if inner is None:
            return part
        part = inner


@contextmanager
def preserve_student(student: Callable[..., Any]) -> Iterator[None]:
    """Inside, the student is in eval mode; after, its flags, buffers and the global generators (torch, numpy,
    Python) are as before.

    Parameters and their ``.grad`` are the caller's part: differentiate with ``torch.autograd.grad`` alone. Under
    ``torch.compile`` only the flags are looked after: a student that draws random numbers or writes to its buffers in
    eval mode is then not undone.
    """
    root = module_behind(student)
    if torch.compiler.is_compiling():  # which sees neither versions of buffers nor the generators
        with eval_mode(*([] if root is None else [root])):
            yield
        return
    roots = modules_of(student) if root is None else [root]
    buffers = [
        (m, name, buffer, None if buffer is None else (buffer._version, buffer.detach().clone()))
        for root in roots
        for m in root.modules()
        for name, buffer in m._buffers.items()
    ]
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    try:
        with isolated_rng(cuda=not capturing), eval_mode(*roots):
            yield
    finally:
        for m, name, buffer, before in buffers:
            if m._buffers.get(name) is not buffer:
                m._buffers[name] = buffer
            if buffer is not None and before is not None and buffer._version != before[0]:
                with torch.no_grad():
                    buffer.copy_(before[1])
