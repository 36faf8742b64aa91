"""The cut of a call into programs: a small table by classes and type, and the file that may overrule it.

Nothing is tuned at a first call. A table of one's own is a JSON file of the form ::

    [{"kernel": "rows", "classes": 4096, "rows": 1, "block": 4096, "warps": 8}, ...]

and its first entry with as many classes as the call, or more, is taken (``kernel``: "rows" or "stream"; ``block`` a
power of 2, at least the classes for "rows"). It is read once a process, from ``$TGT_FAST_TRITON_PLANS``, or else from
``triton-plans-VERSION-DEVICE.json`` in ``$XDG_CACHE_HOME/tgt_fast`` (``~/.cache/tgt_fast``).
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

PLANS_VARIABLE = "TGT_FAST_TRITON_PLANS"
MOST_CLASSES = 1 << 30  # of a row: beyond, a column's number would not fit 32 bits


LATENT_REGISTERS = 112  # a thread may have: above what the kernels take, see streaming_of
SOFT_REGISTERS = 255
LISTWISE_BLOCK, LISTWISE_WARPS = 1024, 4


class Plan(NamedTuple):
    """The cut of a call's rows."""

    kernel: str  # "rows": whole rows in registers; "stream": tile by tile
    rows: int  # a program, of "rows" and of the elementwise kernels
    block: int  # classes a tile, a power of 2
    warps: int


class _Limit(NamedTuple):
    classes: int
    plan: Plan


def power_of_two(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def shipped_plan(classes: int, is_fp64: bool) -> Plan:
    """The table: at most 16 elements of a row pair a thread, for what a thread keeps of them must fit its registers.

    ``benchmarks/triton_report.py`` shows that nothing spills. Not yet timed on a GPU.
    """
    if classes <= 1024:
        block = power_of_two(classes)
        # Where short rows do not start on 16 bytes, each element of a thread may be of another row, with a state of its
        # own for the registers to hold: 4 of them fit, 8 do not.
        tile = 512 if block <= 128 else 1024
        return Plan("rows", max(1, min(32, tile // block)), block, 4)
    if is_fp64:
        return Plan("rows", 1, 2048, 8) if classes <= 2048 else Plan("stream", 1, 1024, 4)
    if classes <= 4096:
        block = power_of_two(classes)
        return Plan("rows", 1, block, block // 512)
    return Plan("stream", 1, 1024, 4)  # three such programs fit a multiprocessor where one of 8 warps did


class Streaming(NamedTuple):
    """(stages, registers) that keep a streamed row in flight."""

    stages: int  # tiles under way at once
    registers: int | None  # a thread may have; None: as the compiler likes


def streaming_of(divergence: str) -> Streaming:
    """jsd has no registers to spare for tiles to come, and the most to do meanwhile.

    The limit for the others is above what they take: without one the assembler spills a register or two on its way to a
    rounder number.
    """
    return Streaming(1, None) if divergence == "jsd" else Streaming(3, 168)


def interpreted_plan(rows: int, classes: int) -> Plan:
    """Few and large programs, since the interpreter's time goes by their number; the kernel is the GPU's."""
    if classes > 16384:
        return Plan("stream", 1, 16384, 1)
    block = power_of_two(classes)
    return Plan("rows", max(1, min(power_of_two(rows), (1 << 18) // block)), block, 1)


def adjusted_plan(rows: int, classes: int, is_fp64: bool, device: torch.device | None) -> Plan:
    """The cut of adjusted rows, which are always taken tile by tile: of short ones several a program. Not yet timed.

    There is much to know of a row, so that no thread's registers would hold two of them.
    """
    block = power_of_two(classes)
    if device is None:
        block = min(block, 16384)
        return Plan("stream", max(1, min(power_of_two(rows), (1 << 18) // block)), block, 1)
    block = min(block, 512 if is_fp64 else 1024)
    return Plan("stream", max(1, 128 // block), block, 4)


def adjusted_registers(divergence: str, is_fp64: bool) -> int:
    """What a thread of them may have: three programs then fit a multiprocessor, see streaming_of. symmetric, which has
    all of forward_kl's sums and of reverse_kl's, spills with it."""
    return 255 if is_fp64 else 192 if divergence == "symmetric" else 168


def elementwise_plan(plan: Plan) -> Plan:
    """The same rows and threads for a kernel in which no element waits for another: tiles of 4096 classes at most."""
    if plan.block <= 4096:
        return plan
    return plan._replace(block=4096, warps=min(plan.warps, 8))


@functools.cache
def own_plans(device: torch.device | None) -> tuple[_Limit, ...]:
    """The user's table; empty where there is none, or where it cannot be read, which is a warning."""
    path = _plans_file(device)
    if path is None or not path.is_file():
        return ()
    try:
        return tuple(_limit(entry) for entry in json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is ignored: it holds no table of Triton plans ({error})", stacklevel=2)
        return ()


def _plans_file(device: torch.device | None) -> Path | None:
    named = os.environ.get(PLANS_VARIABLE)
    if named:
        return Path(named)
    if device is None:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    chip = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(device))
    version = re.sub(r"[^A-Za-z0-9.]+", "-", importlib.metadata.version("triton"))
    return Path(home) / "tgt_fast" / f"triton-plans-{version}-{chip}.json"


def _limit(entry: dict[str, object]) -> _Limit:
    numbers = [entry[name] for name in ("classes", "rows", "block", "warps")]
    if not all(isinstance(n, int) and n > 0 for n in numbers):
        raise ValueError(f"{entry}: classes, rows, block and warps must be positive integers")
    classes, rows, block, warps = (int(n) for n in numbers)  # type: ignore[call-overload]
    if any(n & (n - 1) for n in (rows, block, warps)) or rows * block > 1 << 20 or warps > 32:
        raise ValueError(f"{entry}: rows, block and warps must be powers of 2, rows * block <= 2**20, warps <= 32")
    kernel = entry["kernel"]
    if kernel not in ("rows", "stream") or (kernel == "rows" and block < classes) or (kernel == "stream" and rows > 1):
        raise ValueError(f'{entry}: kernel is "rows" with block >= classes, or "stream" with rows = 1')
    return _Limit(classes, Plan(str(kernel), rows, block, warps))


def plan_of(rows: int, classes: int, is_fp64: bool, device: torch.device | None) -> Plan:
    """The cut of ``[rows, classes]``. ``device``: None where kernels are interpreted."""
    for limit in own_plans(device):
        if classes <= limit.classes:
            return limit.plan
    return interpreted_plan(rows, classes) if device is None else shipped_plan(classes, is_fp64)


def latent_plan(samples: int, size: int, *, alone: bool, device: torch.device | None) -> Plan:
    """The cut of ``[samples, size]`` latents. ``alone``: no coordinate needs to know of another.

    A sample within a tile takes one launch: 8 coordinates a thread, for a step keeps half a dozen numbers of each.
    """
    block = max(16, power_of_two(size))
    if device is None:
        block = min(block, 8192)
        return Plan("rows", max(1, min(power_of_two(samples), (1 << 17) // block)), block, 1)
    block = min(block, 1024 if alone else 4096 if size <= 4096 else 2048)
    return Plan("rows", max(1, min(64, 1024 // block)), block, max(4, block // 256))


class SoftPlan(NamedTuple):
    """The cut of a soft embedding: tiles of rows, of the vocabulary and of the embedding, each a power of 2."""

    rows: int
    classes: int
    width: int
    splits: int  # of the vocabulary in forward, so that few rows still fill the chip
    warps: int
    noisy: tuple[int, int, int] | None = None  # the first three in forward with noise, where they differ

    def forward(self, noise: bool) -> SoftPlan:
        """The cut of forward."""
        if self.noisy is None or not noise:
            return self
        rows, classes, width = self.noisy
        return self._replace(rows=rows, classes=classes, width=width)


def soft_plan(rows: int, classes: int, width: int, table: torch.dtype, device: torch.device | None) -> SoftPlan:
    """``device``: None where kernels are interpreted. Not yet timed."""
    widest = tile = min(256, max(16, power_of_two(width)))
    if device is None:
        tiles = -(-classes // 1024)
        return SoftPlan(min(64, max(16, power_of_two(rows))), min(1024, max(16, power_of_two(classes))), tile, tiles, 1)
    # A product of float32 numbers is three, whose parts take registers and shared memory.
    height, deep, tile = (32, 32, min(tile, 64)) if table == torch.float32 else (64, 64, min(tile, 128))
    # Forward draws noise once for each tile of the embedding, so these are as wide as registers hold without spilling.
    noisy = (32, 32, min(widest, 128 if table == torch.float32 else 256)) if widest > tile else None
    programs = max(1, -(-rows // height) * -(-width // tile))
    splits = max(1, min(64, 264 // programs, -(-classes // 512)))
    return SoftPlan(height, deep, tile, splits, 8, noisy)


def slope_width(plan: SoftPlan, table: torch.dtype) -> int:
    """The part of the embedding that the slopes' products take at once: parts of float32 numbers spill beyond 32."""
    return min(plan.width, 32) if table == torch.float32 else plan.width
