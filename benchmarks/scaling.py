"""Communication of a training step, calculated for many GPUs and measured for few processes on this machine.

    python benchmarks/scaling.py [--save]

The formulas stand in ``Step``; ``--save`` writes benchmarks/results/scaling-cpu.json with the measured points, the
sizes and the machine that are assumed, and what they come to, from which ``tables.py`` makes the tables of
docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness import save
from torch import nn
from worlds import found_by

import tgt_fast as tgt
from tgt_fast.bench.record import origin

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
WORLDS = (1, 2, 4)
NUMBERS = 4 << 20  # of the gradient that is measured
REPEATS = 5
BUCKET = 25 << 20  # bytes, of DistributedDataParallel


@dataclass(frozen=True)
class Machine:
    """Assumed, of a GPU in nodes of eight; not measured."""

    flops: float = 400e12  # a second, of matrix products in bfloat16
    node: int = 8
    inside: float = 400e9  # bytes a second and GPU, within a node
    outside: float = 50e9  # between nodes
    latency_inside: float = 3e-6  # seconds a message
    latency_outside: float = 10e-6

    def seconds(self, gpus: int, sent: float, messages: float) -> float:
        """Of collectives in a ring, which waits for its slowest link."""
        far = gpus > self.node
        rate, latency = (self.outside, self.latency_outside) if far else (self.inside, self.latency_inside)
        return sent / rate + messages * latency


@dataclass(frozen=True)
class Step:
    """Sizes of a step: a student of 1.2e9 weights, a teacher of 8e9, 8,192 tokens a GPU."""

    student: float = 1.2e9
    teacher: float = 8e9
    layers: int = 32  # groups that are gathered one by one
    tokens: int = 8192  # a GPU
    hidden: int = 2048
    classes: int = 151_936

    def flops(self) -> float:
        """A GPU: forward and backward of the student, forward of the teacher."""
        return self.tokens * (6 * self.student + 2 * self.teacher)

    def counts(self, gpus: int) -> tuple[float, float]:
        """Bytes that a GPU sends, and messages, for the two numbers of rows."""
        return ring(gpus, 16) * 2, 2.0 * (gpus - 1)

    def replicated(self, gpus: int) -> tuple[float, float]:
        """DistributedDataParallel: one all-reduce of the float32 gradient, in buckets."""
        gradient = 4 * self.student
        return 2 * ring(gpus, gradient), 2.0 * (gpus - 1) * math.ceil(gradient / BUCKET)

    def sharded(self, gpus: int) -> tuple[float, float]:
        """FSDP2: two gathers of the bfloat16 weights, and the float32 gradient scattered."""
        return ring(gpus, (2 + 2 + 4) * self.student), 3.0 * (gpus - 1) * self.layers

    def teacher_sharded(self, gpus: int) -> tuple[float, float]:
        """The frozen teacher by ``fully_shard``: one gather of its bfloat16 weights."""
        return ring(gpus, 2 * self.teacher), 1.0 * (gpus - 1) * self.layers

    def head_gathered(self, gpus: int) -> tuple[float, float]:
        """A sharded head as a DTensor: one gather in bfloat16, its gradient scattered in bfloat16."""
        return ring(gpus, 4 * self.classes * self.hidden), 2.0 * (gpus - 1)

    def vocabulary_sharded(self, gpus: int) -> tuple[float, float]:
        """Each GPU has its classes and sees all rows: states gathered, their gradient scattered, five sums a row."""
        rows = gpus * self.tokens
        return ring(gpus, rows * self.hidden * (2 + 4)) + 2 * ring(gpus, rows * 5 * 4), 4.0 * (gpus - 1)


def ring(gpus: int, size: float) -> float:
    """Bytes that a process sends of ``size`` in all: a gather or a scatter; an all-reduce is both."""
    return size * (gpus - 1) / gpus


WAYS = ("replicated", "sharded", "teacher_sharded", "head_gathered", "vocabulary_sharded", "counts")


def calculated(step: Step, machine: Machine) -> list[dict[str, Any]]:
    found = []
    for gpus in GPUS:
        row: dict[str, Any] = {"gpus": gpus, "flops": step.flops(), "compute": step.flops() / machine.flops}
        for way in WAYS:
            sent, messages = getattr(step, way)(gpus)
            row[way] = {"bytes": sent, "messages": messages, "seconds": machine.seconds(gpus, sent, messages)}
        found.append(row)
    return found


# ---- measured here ----


def _worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model = nn.parallel.DistributedDataParallel(nn.Linear(1024, NUMBERS // 1024, bias=False), bucket_cap_mb=1024)
    teacher, inputs = torch.randn(8, NUMBERS // 1024), torch.randn(8, 1024)
    loss_of = tgt.DistillationLoss(temperature=2.0, count_group="world")

    def gradients() -> None:
        loss_of(model(inputs), teacher, normalizer=8.0).backward()

    def count() -> None:
        loss_of(torch.zeros(8, 10), torch.zeros(8, 10))

    def gather() -> None:
        out = torch.empty(NUMBERS)
        torch.distributed.all_gather_into_tensor(out, torch.ones(NUMBERS // world))

    found = {}
    for name, run, repeats in (("gradients", gradients, REPEATS), ("count", count, 200), ("gather", gather, REPEATS)):
        run()
        torch.distributed.barrier()
        before, start = _sent(), time.perf_counter()
        for _ in range(repeats):
            run()
        torch.distributed.barrier()
        found[name] = (_sent() - before) / repeats / world, (time.perf_counter() - start) / repeats
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _sent() -> int:
    """Bytes over the loopback device so far; those of other programs are among them."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    return 0


def measured() -> list[dict[str, Any]]:
    formulas = {"gradients": lambda w: 2 * ring(w, 4 * NUMBERS), "count": lambda w: 2 * ring(w, 8),
                "gather": lambda w: ring(w, 4 * NUMBERS)}  # fmt: skip
    rows = []
    for world in WORLDS:
        for name, (sent, seconds) in found_by(_worker, world).items():
            row = {"world": world, "what": name, "calculated": formulas[name](world), "sent": sent, "seconds": seconds}
            rows.append(row)
            print(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/scaling-cpu.json")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    step, machine = Step(), Machine()
    record = origin(torch.device("cpu"), 0.0, "python benchmarks/scaling.py --save")
    record |= {"step": asdict(step), "machine": asdict(machine), "points": measured()}
    record["rows"] = calculated(step, machine)
    if given.save:
        print(save("scaling-cpu", record))


if __name__ == "__main__":
    main()
