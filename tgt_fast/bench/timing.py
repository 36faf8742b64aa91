"""Interleaved medians. The contenders take turns, so that a slow spell of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

_LEAST: Final = 5  # turns
_SHORT: Final = 1.0  # ms; below it the launches of a call may take longer than its kernels
_BACK_TO_BACK: Final = 20  # calls


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of a call: ``total`` is what it costs its user.

    On a GPU that is the longer of two: ``device``, between two events on the stream with a cold L2 cache, and
    ``wall``, a call among many issued one after the other, which shows calls that are bound by the host.
    """

    total: float
    device: float | None = None
    wall: float | None = None
    spread: float | None = field(default=None, compare=False)  # between the quartiles, as a share of the median


def spread(values: Sequence[float]) -> float:
    """The distance of the quartiles of several times, as a share of their median."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle if middle > 0 else 0.0


def medians(calls: Mapping[str, Callable[[], Any]], *, seconds: float, device: torch.device) -> dict[str, Timing]:
    """Time the calls for about so many seconds, after a warm-up, and at least a few turns each."""
    for call in calls.values():
        call()
        call()
    return _on_cuda(calls, seconds, device) if device.type == "cuda" else _on_cpu(calls, seconds)


def _on_cpu(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Timing]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    turns = 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or turns < _LEAST:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
        turns += 1
    return {name: Timing(statistics.median(values), spread=spread(values)) for name, values in times.items()}


def _on_cuda(calls: Mapping[str, Callable[[], Any]], seconds: float, device: torch.device) -> dict[str, Timing]:
    flush = Flush(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    turns = 0
    torch.cuda.synchronize(device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or turns < _LEAST:
        events = []
        for name, call in calls.items():
            flush()
            start, stop = _event(), _event()
            start.record()
            call()
            stop.record()
            events.append((name, start, stop))
        torch.cuda.synchronize(device)  # outside every timed stretch
        for name, start, stop in events:
            times[name].append(start.elapsed_time(stop))
        turns += 1
    found: dict[str, Timing] = {}
    for name, values in times.items():
        on_device = statistics.median(values)
        wall = _wall(calls[name], device) if on_device < _SHORT else None
        found[name] = Timing(max(on_device, wall or 0.0), on_device, wall, spread(values))
    return found


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _wall(call: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(_LEAST):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(_BACK_TO_BACK):
            call()
        torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) * 1e3 / _BACK_TO_BACK)
    return statistics.median(times)


_UNTOLD_CACHE, _LEAST_FLUSHED = 64 << 20, 128 << 20  # bytes


class Flush:
    """Empties the L2 cache by reading a buffer several times its size: what is left in it is of no use, and clean."""

    def __init__(self, device: torch.device) -> None:
        cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or _UNTOLD_CACHE
        self._buffer = torch.zeros(max(4 * cache, _LEAST_FLUSHED) // 4, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        self._buffer.amax()
