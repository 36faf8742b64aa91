"""Stand-ins for a GPU that run the host side of tests written for one: a device that is another, a graph that is
captured and replayed, and what ``torch.cuda`` tells of a device.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Elsewhere(TorchFunctionMode):
    """Stand in for a GPU: what is made on or sent to one lies on another device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = torch.device(device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        there = {name: self._instead(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._instead, args), **there)

    def _instead(self, value: Any) -> Any:
        is_gpu = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"
        return self._device if is_gpu else value


class Graph:
    """A captured graph: its replay makes the same calls on the same memory, the host's part left out."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, made in self.calls:
                for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class _Capture(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._calls = graph.calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, made))
        return made


class Event:
    """After each call the device was busy for 5 ms."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 5.0


@contextmanager
def a_gpu_that_is_the_host() -> Iterator[None]:
    """Within it tensors of a GPU lie on the host, and the streams, graphs, clocks and memory of ``torch.cuda`` are
    stand-ins. Neither the library nor torch sees a GPU."""
    properties = types.SimpleNamespace(
        name="a stand-in", total_memory=1 << 30, multi_processor_count=1, L2_cache_size=1 << 10
    )
    held = itertools.count(1)
    instead: dict[str, Callable[..., Any]] = {
        "Stream": object, "stream": lambda stream: nullcontext(), "synchronize": lambda device=None: None,
        "CUDAGraph": Graph, "graph": _Capture, "Event": Event, "get_device_properties": lambda device: properties,
        "empty_cache": lambda: None, "mem_get_info": lambda device=None: (1 << 40, 1 << 40),
        "reset_peak_memory_stats": lambda device=None: None, "memory_allocated": lambda device=None: next(held),
        "max_memory_allocated": lambda device=None: next(held),
    }  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(Elsewhere("cpu"))
        for name, value in instead.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(torch.random, "fork_rng", _fork_rng))
        yield


class _KindOfGenerator(type):
    plain = torch.Generator

    def __call__(cls, device: Any = None) -> torch.Generator:
        return cls.plain()

    def __instancecheck__(cls, thing: Any) -> bool:
        return isinstance(thing, cls.plain)


class _Generator(metaclass=_KindOfGenerator):
    """One of the host, for any device."""


def _fork_rng(devices: Any = None, *, plain: Callable[..., Any] = torch.random.fork_rng) -> Any:
    return plain([])
