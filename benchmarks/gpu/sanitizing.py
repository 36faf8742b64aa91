"""compute-sanitizer over every kernel, native and Triton's, gradients in place among them."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages import FAILED, PASSED, SKIPPED, Stages, run

TOOLS = ("memcheck", "racecheck", "initcheck")
PROBE_LIMIT = 60.0
PROBE = 'import torch; torch.ones(1, device="cuda").add_(1).cpu()'
EXIT = "9"  # of a program in which the tool found something
WORKER = str(Path(__file__).with_name("worker.py"))


def sanitizers(stages: Stages, limit: float, calls: Sequence[str], device: str) -> None:
    """Each tool over each backend's calls, but for what an earlier call has shown to be clean."""
    end = time.monotonic() + stages.left(limit)
    known: dict[str, Any] = dict(stages.results.proven("sanitizer") or {})
    found: dict[str, Any] = {name: one for name, one in known.items() if one.get("outcome") == PASSED}
    if not shutil.which("compute-sanitizer"):
        stages.record("sanitizers", SKIPPED, 0, "no compute-sanitizer on the PATH")
        return
    began, log = time.monotonic(), stages.log("sanitizers")
    status, note = run(
        ["compute-sanitizer", "--error-exitcode", EXIT, sys.executable, "-c", PROBE if device == "cuda" else ""],
        min(PROBE_LIMIT, max(1.0, end - time.monotonic())), log,
    )  # fmt: skip
    if status:
        stages.results.update(sanitizer=found)
        stages.record("sanitizers", SKIPPED, time.monotonic() - began, f"it does not run here ({note or status})", log)
        return
    for backend in ("native", "triton"):  # one after the other, the tools side by side
        mine = [name for name in calls if name.split()[0] == backend]
        half = (end - time.monotonic()) / (2 if backend == "native" else 1)
        threads = [
            threading.Thread(target=_check, args=(stages, tool, backend, mine, half, device, found))
            for tool in TOOLS
            if mine and f"{tool} {backend}" not in found
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    stages.results.update(sanitizer=dict(found))


def _check(
    stages: Stages, tool: str, backend: str, calls: Sequence[str], limit: float, device: str, found: dict[str, Any]
) -> None:
    name, began = f"{tool} {backend}", time.monotonic()
    log = stages.log(f"{tool}-{backend}")
    command = [
        "compute-sanitizer", "--tool", tool, "--error-exitcode", EXIT, sys.executable, WORKER, "--device", device,
        "--calls", *calls,
    ]  # fmt: skip
    status, note = run(command, max(1.0, limit), log, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    note = note or ("" if status == 0 else "it found something" if status == int(EXIT) else f"exit status {status}")
    found[name] = {"outcome": PASSED if status == 0 else FAILED, "note": note, "calls": len(calls)}
    stages.results.update(sanitizer=dict(found))
    stages.record(name, found[name]["outcome"], time.monotonic() - began, note, log)
