"""What every benchmark shares: interleaved timing, peak memory, and result files that say where they come from."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tgt_fast as tgt

RESULTS = Path(__file__).parent / "results"


def interleave(calls: dict[str, Callable[[], Any]], *, seconds: float, least: int = 5) -> dict[str, float]:
    """Median milliseconds of each call. The calls take turns, so that a slow spell of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def relative_error(out: torch.Tensor, truth: torch.Tensor, floor: float) -> float:
    """|out - truth| / max(|truth|, floor), Frobenius norms in float64."""
    truth = truth.double()
    return float((out.double() - truth).norm() / max(float(truth.norm()), floor))


def peak_mib() -> float:
    """The process's peak resident memory so far, MiB. Of this program alone: ru_maxrss begins with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def in_fresh_process(script: str, *arguments: str) -> float:
    """The number that `script` prints last, run in a process of its own: peak memory never falls again in this one."""
    run = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    run = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return run.stdout.strip() or f"version {tgt.__version__}"


def save(name: str, rows: list[dict[str, Any]], command: str) -> Path:
    """Writes results/NAME.json: the rows, and the hardware, versions, commit and date that they belong to."""
    native = tgt.backends()[0]
    record = {
        "command": command,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "hardware": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "core": native.detail,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "tgt_fast": tgt.__version__},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
