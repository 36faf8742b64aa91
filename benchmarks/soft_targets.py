"""Times the distillation loss with shares of the classes beside the same with labels, forward and backward, on a CPU.

    python benchmarks/soft_targets.py [--rounds 15] [--save]

The two take turns, so that what else the machine does meets both. With --save the medians and their ratio go to
benchmarks/results/soft-targets-cpu.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from harness import save

import tgt_fast as tgt
from tgt_fast.bench import record

ROWS, CLASSES, TEMPERATURE = 1024, 32000, 2.0
MOST = 1.5  # times what labels cost
WARM_UP = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    rows = [measured(dtype, given.rounds) for dtype in (torch.float32, torch.bfloat16)]
    for row in rows:
        print(row)
    if given.save:
        origin = record.origin(torch.device("cpu"), 0.0, "python benchmarks/soft_targets.py --save")
        print(save("soft-targets-cpu", {**origin, "rows": rows}))
    return int(any(row["ratio"] > MOST for row in rows))


def measured(dtype: torch.dtype, rounds: int) -> dict[str, float | str | int]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(ROWS, CLASSES, generator=generator).mul_(2).to(dtype) for _ in range(2))
    student.requires_grad_()
    labels = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    shares = torch.rand(ROWS, CLASSES, generator=generator)
    shares = (shares / shares.sum(-1, keepdim=True)).to(dtype)
    targets = {"labels": labels, "shares": shares}
    times: dict[str, list[float]] = {name: [] for name in targets}
    for number in range(WARM_UP + rounds):
        for name, target in targets.items():
            begun = time.perf_counter()
            loss = tgt.distillation_loss(student, teacher, target, temperature=TEMPERATURE, hard_weight=1.0)
            torch.autograd.grad(loss, student)
            if number >= WARM_UP:
                times[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "shape": f"{ROWS} x {CLASSES}", "dtype": str(dtype).removeprefix("torch."), "rounds": rounds,
        "labels_seconds": medians["labels"], "shares_seconds": medians["shares"],
        "ratio": medians["shares"] / medians["labels"],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
