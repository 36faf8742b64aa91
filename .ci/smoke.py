"""Smoke test of an installed wheel: the right package, its contents, its libraries, and one training step.

python smoke.py SITE WHEEL
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

import tgt_fast as tgt
from tgt_fast.kernels.native import core as load_core

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from cuda_report import find_tool


def check(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(f"smoke test: {message}")


def check_device_code(library: Path) -> str:
    """That the library holds code for the architectures it says; what that is."""
    info = load_core().build_info()
    if not info["cuda"]:
        return "no CUDA"
    entries = [entry.partition("-") for entry in info["cuda_architectures"].split(";")]
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        return f"CUDA {info['cuda']} for {info['cuda_architectures']} (no cuobjdump to look)"
    for option, absent in (("--list-elf", "virtual"), ("--list-ptx", "real")):
        listed = subprocess.run([cuobjdump, option, str(library)], capture_output=True, text=True).stdout
        found = set(re.findall(r"\.sm_(\w+)\.", listed))
        wanted = {number for number, _, kind in entries if kind != absent}
        check(found == wanted, f"{option} finds {sorted(found)}, the core was built for {sorted(wanted)}")
    return f"CUDA {info['cuda']} for {info['cuda_architectures']}"


def main() -> None:
    site, wheel = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    check(Path(tgt.__file__).resolve().is_relative_to(site), f"tested {tgt.__file__}, not the wheel")
    check("tgt_fast._core" not in sys.modules, "importing the package loaded the core")

    names = zipfile.ZipFile(wheel).namelist()
    (core,) = (name for name in names if re.fullmatch(r"tgt_fast/_core\..*\.so", name))
    check("tgt_fast/py.typed" in names, "py.typed is missing")
    check(not any(name.startswith(("csrc/", "python_tests/")) for name in names), "the wheel holds sources or tests")
    check(wheel.stat().st_size < 10 * 2**20, f"the wheel has {wheel.stat().st_size} bytes")
    needed = subprocess.run(["ldd", str(site / core)], capture_output=True, text=True, check=True).stdout
    check(not re.search(r"libtorch|libc10|libcuda|libgomp|not found", needed), f"the core needs {needed}")
    exported = subprocess.run(["nm", "-D", "--defined-only", str(site / core)], capture_output=True, text=True).stdout
    symbols = {line.split()[-1] for line in exported.splitlines()}
    check(symbols == {"PyInit__core"} or not symbols, f"the core exports {sorted(symbols)}")

    device_code = check_device_code(site / core)
    native = tgt.backends()[0]
    check(native.available, native.reason)
    student = torch.nn.Linear(8, 3)
    teacher = tgt.Teacher(torch.nn.Linear(8, 2), torch.nn.Linear(2, 8), torch.nn.Linear(8, 3))
    sampler = tgt.LatentSampler(teacher, mode="gradient", sigma=0.5, units="absolute")
    loss_fn = tgt.DistillationLoss(temperature=2.0, hard_weight=1.0, backend="native")
    x, y = torch.randn(4, 8), torch.tensor([0, 1, 2, -1])
    synth = sampler(x, student=student)
    loss = loss_fn(student(x), teacher.label(x), y) + loss_fn.soft(student(synth.x), synth.teacher_logits)
    loss.backward()
    check(bool(torch.isfinite(loss)) and student.weight.grad is not None, "the training step failed")
    print(f"wheel {wheel.name}: {wheel.stat().st_size / 2**10:.0f} KiB, device code: {device_code}; {native.detail}")


if __name__ == "__main__":
    main()
