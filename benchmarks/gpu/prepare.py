"""A look at the machine, and a core that runs on it: one that came along if it is of these sources, else a new one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from results import ROOT, digest_of_core
from stages import FAILED, PASSED, Stages, run

BUILD = ROOT / "build" / "gpu"

ENVIRONMENT = """
import importlib.metadata as metadata
import json, platform, torch
packages = ("triton", "numpy", "pytest", "pytest-xdist", "hypothesis", "pybind11", "cmake", "ninja")
versions = {"python": platform.python_version(), "torch": torch.__version__}
for name in packages:
    try:
        versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        versions[name] = "-"
made = {"versions": versions, "cuda": torch.version.cuda, "devices": torch.cuda.device_count()}
if made["devices"]:
    from tgt_fast.bench.record import driver, hardware
    made |= {"hardware": hardware(torch.device("cuda", 0)), "driver": driver()}
print(json.dumps(made))
"""

CORE = """
import json, sys, torch
from tgt_fast.kernels.native import core, cuda
info = core().build_info()
device = torch.device(sys.argv[1])
problem = cuda.refusal(torch.device("cuda", 0)) or "" if device.type == "cuda" else ""
print(json.dumps({"sources": info.get("sources", "unknown"), "cuda": info["cuda"], "problem": problem}))
"""


def environment(stages: Stages, device: str) -> None:
    """Versions and hardware, into the summary and the log."""
    log, began = stages.log("environment"), time.monotonic()
    notes = []
    for command in (["uname", "-a"], ["nvidia-smi"], ["nvcc", "--version"]):
        status, note = run(command, 20, log)
        if status and device == "cuda":
            notes.append(f"{command[0]}: {note or f'exit status {status}'}")
    found = _told([sys.executable, "-c", ENVIRONMENT], 60)
    stages.results.update(**{key: value for key, value in found.items() if key != "problem"})
    if "problem" in found or (device == "cuda" and not found.get("devices")):
        notes.append(found.get("problem") or "torch finds no GPU")
    stages.record(
        "environment", FAILED if notes else PASSED, time.monotonic() - began, "; ".join(notes), log
    )  # fmt: skip


def core(stages: Stages, device: str, limit: float) -> bool:
    """True if there is a core of these sources in the package."""
    began, log = time.monotonic(), stages.log("build")
    problem = unfit_core(device)
    if not problem:
        stages.record("build", PASSED, time.monotonic() - began, "the core that is there is of these sources")
        return True
    stages.tell(f"building: {problem}")
    BUILD.mkdir(parents=True, exist_ok=True)
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    found = _told([sys.executable, "-c", "import json, pybind11; print(json.dumps(pybind11.get_cmake_dir()))"], 30)
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(BUILD), *ninja, f"-DTGT_CUDA={'ON' if device == 'cuda' else 'OFF'}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={found}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(BUILD), "--parallel", str(os.cpu_count() or 2)]):
        status, note = run(command, max(1.0, limit - (time.monotonic() - began)), log)
        if status:
            stages.record("build", FAILED, time.monotonic() - began, note or f"exit status {status}", log)
            return False
    for library in BUILD.glob("_core*.so"):
        shutil.copy2(library, ROOT / "tgt_fast")
    problem = unfit_core(device)
    stages.record("build", FAILED if problem else PASSED, time.monotonic() - began, problem, log)
    return not problem


def unfit_core(device: str) -> str:
    """Why the core in the package cannot be used; empty when it can."""
    if not list((ROOT / "tgt_fast").glob("_core*.so")):
        return "there is no core"
    found = _told([sys.executable, "-c", CORE, device], 60)
    if "problem" not in found or found["problem"]:
        return str(found.get("problem"))
    if found["sources"] != digest_of_core():
        return "the core that is there is of other sources"
    return "it was built for the CPU alone" if device == "cuda" and not found["cuda"] else ""


def peers(stages: Stages, folder: Path) -> None:
    """Other libraries to compare with, from a folder of wheels."""
    wheels = os.environ.get("TGT_PEERS")
    if not wheels:
        return
    found = [str(path) for path in sorted(Path(wheels).glob("*.whl"))]
    options = ["--no-index", "--no-deps", "--quiet", "--target", str(folder)]
    stages.command("peers", [sys.executable, "-m", "pip", "install", *options, *found], 20)


def _told(command: list[str], limit: float) -> Any:
    """The last line that a command prints, as JSON; its failure as its ``problem``."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT)
        if done.returncode == 0:
            return json.loads(done.stdout.strip().splitlines()[-1])
        return {"problem": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        return {"problem": f"{type(error).__name__}: {error}"[:300]}
