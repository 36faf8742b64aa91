"""The roof of every memory-bound op: how fast plain copies are, in the same run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tgt_fast.bench.timing import medians

ROOF_BYTES = 256 << 20  # of each of the two buffers: far beyond any cache


def copy_rate(device: torch.device, seconds: float = 0.5) -> float:
    """Bytes a second of a device copy of 256 MiB: what is read plus what is written."""
    source = torch.zeros(ROOF_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    timing = medians({"copy": lambda: target.copy_(source)}, seconds=seconds, device=device)["copy"]
    return 2 * ROOF_BYTES / (timing.total * 1e-3)


def copier(count: int, device: torch.device) -> Callable[[], None]:
    """A call that moves ``count`` bytes, half of them read and half written, through at most two 256 MiB buffers."""
    half = max(1, count // 2)
    size = min(half, ROOF_BYTES)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    whole, rest = divmod(half, size)

    def copy() -> None:
        for _ in range(whole):
            target.copy_(source)
        if rest:
            target[:rest].copy_(source[:rest])

    return copy
