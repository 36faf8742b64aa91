"""Results that say where they come from: the hardware, versions, commit and date that rows belong to."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import tgt_fast as tgt
from tgt_fast.bench import rivals

_HERE = Path(__file__).parent


def origin(device: torch.device, copy_rate: float, command: str) -> dict[str, Any]:
    """The origin of results, as JSON; their rows come beside it, under "rows"."""
    native = next(row for row in tgt.backends() if row.name == "native")
    versions: dict[str, str] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tgt_fast": tgt.__version__,
    }
    versions |= {name: found for name in rivals.PACKAGES if (found := rivals.version(name)) is not None}
    made: dict[str, Any] = {
        "command": command,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": device.type,
        "hardware": hardware(device),
        "core": native.detail if native.available else native.reason,
        "versions": versions,
        "seeds": [0],  # of the inputs
        "copy_bytes_per_second": copy_rate,
    }
    if device.type == "cuda":
        made["driver"] = driver()
        made["cuda"] = torch.version.cuda
    return made


def hardware(device: torch.device) -> str:
    """The device that was measured."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} multiprocessors"
    return f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def driver() -> str:
    """The GPU driver's version."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return lines[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def commit() -> str:
    """Of the source tree that this package was imported from, with a + for changes.

    Where git tells nothing: what ``TGT_FAST_COMMIT`` names, else the version.
    """
    try:
        tracked = _git("ls-files", "--error-unmatch", __file__)
        if tracked:
            top = _git("rev-parse", "--show-toplevel")
            changes = _git("status", "--porcelain", "--", f"{top}/tgt_fast", f"{top}/csrc")
            return _git("rev-parse", "--short", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.SubprocessError):
        pass
    return os.environ.get("TGT_FAST_COMMIT") or f"version {tgt.__version__}"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_HERE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
