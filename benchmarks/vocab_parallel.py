"""Two processes with half the classes each beside one that has all: the loss and its gradient, one thread a process.

    python benchmarks/vocab_parallel.py [--save]

A round times one process alone, then two at once, of each divergence; the shortest of the rounds counts. Beside the
time stands the processor's time of the first process, which says the same where other programs keep the cores busy.
``--save`` writes benchmarks/results/vocab-parallel-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from harness import save
from worlds import found_by

import tgt_fast as tgt
from tgt_fast.bench.record import origin

ROWS, CLASSES = 1024, 128_256
ROUNDS = 3
CALLS: dict[str, dict[str, Any]] = {
    "forward_kl": {"divergence": "forward_kl", "temperature": 2.0},
    "forward_kl, labels": {"divergence": "forward_kl", "temperature": 2.0, "hard_weight": 1.0},
    "reverse_kl": {"divergence": "reverse_kl", "temperature": 2.0},
    "jsd": {"divergence": "jsd", "temperature": 2.0},
    "tvd": {"divergence": "tvd", "temperature": 2.0},
}


def _worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    here = CLASSES // world
    generator = torch.Generator().manual_seed(rank)
    student = (torch.randn(ROWS, here, generator=generator) * 2).requires_grad_()
    teacher = torch.randn(ROWS, here, generator=generator) * 2
    target = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(9))
    found = {}
    for name, options in CALLS.items():
        given = target if "hard_weight" in options else None

        def run(given: Any = given, options: Any = options) -> None:
            student.grad = None
            tgt.distillation_loss(student, teacher, given, vocab_group="world", **options).backward()

        run()
        torch.distributed.barrier()
        start, worked = time.perf_counter(), time.process_time()
        run()
        torch.distributed.barrier()
        found[name] = time.perf_counter() - start
        found[f"{name}, processor"] = time.process_time() - worked
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def timed(world: int) -> dict[str, float]:
    """Seconds of each call."""
    found: dict[str, float] = found_by(_worker, world)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/vocab-parallel-cpu.json")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rounds: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for world, seconds in rounds.items():
            seconds.append(timed(world))
            print(world, seconds[-1], flush=True)
    rows = []
    for name, options in CALLS.items():
        row: dict[str, Any] = {"call": name, "options": options}
        for what in (name, f"{name}, processor"):
            one, two = (min(seconds[what] for seconds in rounds[world]) for world in (1, 2))
            row["processor" if what != name else "time"] = {"one": one, "two": two, "factor": one / two}
            print(f"{what}: one process {one:.3f} s, two {two:.3f} s, a factor of {one / two:.2f}")
        rows.append(row | {"all": {world: [s[name] for s in seconds] for world, seconds in rounds.items()}})
    record = origin(torch.device("cpu"), 0.0, "python benchmarks/vocab_parallel.py --save")
    record |= {"rows": ROWS, "classes": CLASSES, "load": os.getloadavg(), "points": rows}
    if given.save:
        print(save("vocab-parallel-cpu", record))


if __name__ == "__main__":
    main()
