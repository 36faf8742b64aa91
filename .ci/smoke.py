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


def check(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(f"smoke test: {message}")


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
    print(f"wheel {wheel.name}: {wheel.stat().st_size / 2**10:.0f} KiB, {native.detail}")


if __name__ == "__main__":
    main()
