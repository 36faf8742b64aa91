"""Times the distillation loss with its options beside the same without, forward and backward, on a CPU.

    python benchmarks/loss_options.py [--rounds 9] [--rows 1024] [--save]

Each option and the plain loss take turns in one process; a row is the median of the pairs' ratios, of wall time and of
the processor's. Skewed divergences stand beside jsd. With --save they go to benchmarks/results/loss-options-cpu.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import Any

import torch
from harness import save

import tgt_fast as tgt
from tgt_fast.bench import record

CLASSES, TEMPERATURE = 32000, 2.0
WARM_UP = 1
JSD = {"divergence": "jsd"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    rows = measured(given.rows, given.rounds)
    if given.save:
        origin = record.origin(torch.device("cpu"), 0.0, "python benchmarks/loss_options.py --save")
        shape = {"shape": f"{given.rows} x {CLASSES}", "rounds": given.rounds, "load": os.getloadavg()[0]}
        print(save("loss-options-cpu", {**origin, **shape, "rows": rows}))
    return 0


def measured(rows: int, rounds: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, CLASSES, generator=generator).mul_(2) for _ in range(2))
    student.requires_grad_()
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    bias = torch.randn(CLASSES, generator=generator)
    margin = torch.rand(CLASSES, generator=generator)

    def taken(**options: Any) -> tuple[float, float]:
        begun = time.perf_counter(), time.process_time()
        loss = tgt.distillation_loss(student, teacher, labels, temperature=TEMPERATURE, **options)
        torch.autograd.grad(loss, student)
        return time.perf_counter() - begun[0], time.process_time() - begun[1]

    both = {"hard_weight": 0.5}
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("student_bias, teacher_bias", both, {"student_bias": bias, "teacher_bias": bias}),
        ("label_margin", both, {"label_margin": margin}),
        ("standardize", {}, {"standardize": True}),
        ("decoupled", {}, {"decoupled": (1.0, 8.0)}),
        ("skew", JSD, {"divergence": "forward_kl", "skew": 0.1}),
    ]
    found = []
    for name, plain, options in cases:
        pairs = [(taken(**plain), taken(**{**plain, **options})) for _ in range(WARM_UP + rounds)][WARM_UP:]
        found.append({
            "option": name, "plain_seconds": statistics.median(a[0] for a, _ in pairs),
            "seconds": statistics.median(b[0] for _, b in pairs),
            "ratio": statistics.median(b[0] / a[0] for a, b in pairs),
            "processor_ratio": statistics.median(b[1] / a[1] for a, b in pairs),
        })  # fmt: skip
        print(found[-1], flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
