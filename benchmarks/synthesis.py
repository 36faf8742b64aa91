"""Times two local workers of ``tgt-fast synthesize`` beside one, and looks at the memory of a long synthesis, on a CPU.

    python benchmarks/synthesis.py [--rounds 5] [--save]

One worker and two take turns, each on one thread a worker, so that what else the machine does meets both. What is timed
is the slowest worker from its first batch to its last, so that starting processes, which a job of hours does not feel,
is left out; the whole is told, too. The load of the machine is written down with each. With --save the figures go to
benchmarks/results/synthesis-cpu.json.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import save
from torch import Tensor, nn

import tgt_fast as tgt
from tgt_fast._threads import threads
from tgt_fast.bench import record
from tgt_fast.synthesis.engines import local
from tgt_fast.synthesis.filters import Filters
from tgt_fast.synthesis.job import Job

LEAST = 1.6  # times one worker's rate
FEATURES, LATENT, CLASSES, WIDTH, BATCH, BATCHES = 256, 64, 100, 2048, 128, 160
LONG, LONG_BATCH = 100_000, 500
MOST_GROWTH = 32 << 20  # bytes, from the first tenth of the long synthesis to its end
TIMES = "TGT_FAST_BENCHMARK_TIMES"  # a folder of files, one a worker, with the seconds that it was at work


def teacher() -> tgt.Teacher:
    """Whose labeler is most of the work."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = nn.Sequential(nn.Linear(LATENT, WIDTH), nn.Tanh(), nn.Linear(WIDTH, FEATURES))
        layers = [nn.Linear(FEATURES, WIDTH), nn.ReLU(), *(nn.Linear(WIDTH, WIDTH), nn.ReLU()) * 2]
        return tgt.Teacher(nn.Linear(FEATURES, LATENT), decoder, nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES)))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    begun = time.perf_counter(), time.process_time()
    for number in range(BATCHES):
        yield torch.arange(BATCH) + number * BATCH, torch.randn(BATCH, FEATURES, generator=generator)

    Path(os.environ[TIMES], f"{os.getpid()}").write_text(
        f"{time.perf_counter() - begun[0]} {time.process_time() - begun[1]}"
    )


def job(folder: Path) -> Job:
    name = Path(__file__).stem
    return Job(
        folder=str(folder), teacher=f"{name}:teacher", data=f"{name}:batches", student=None,
        options=(("units", "absolute"), ("sigma", 0.5)), replicas=1, k=None, latents=False, step=0,
        format="safetensors", shard_bytes=64 << 20, filters=Filters(), calibrate=1, threads=1, gpus=0,
    )  # fmt: skip


class Timed(NamedTuple):
    work: float  # seconds of the slowest worker
    cpu: float  # those of a core that the busiest worker had: what work would be on a machine that does nothing else
    whole: float  # seconds of the command
    digest: str  # of what was made


def timed(workers: int) -> Timed:
    with tempfile.TemporaryDirectory() as name:
        times = Path(name) / "times"
        times.mkdir()
        os.environ[TIMES] = str(times)
        start = time.perf_counter()
        told = local.run(job(Path(name) / "rows"), workers, progress=False)
        whole = time.perf_counter() - start
        assert told.computed == BATCH * BATCHES, told
        found = [tuple(map(float, path.read_text().split())) for path in times.iterdir()]
        work, cpu = (max(column) for column in zip(*found, strict=True))
        return Timed(work, cpu, whole, digest(Path(name) / "rows"))


def digest(folder: Path) -> str:
    rows = tgt.SyntheticDataset(folder).read()
    assert isinstance(rows.labels, Tensor)
    found = hashlib.sha256()
    for part in (rows.keys, rows.x, rows.labels):
        found.update(part.contiguous().numpy().tobytes())
    return found.hexdigest()


def workers(rounds: int) -> dict[str, Any]:
    taken: dict[int, list[Timed]] = {1: [], 2: []}
    loads = []
    for _ in range(rounds):
        for count in taken:
            loads.append(os.getloadavg()[0])
            taken[count].append(timed(count))
            last = taken[count][-1]
            print(f"{count} workers: {last.work:.2f} s of work, {last.cpu:.2f} s of a core, {last.whole:.2f} s in all")
    digests = {one.digest for some in taken.values() for one in some}
    one, two = (statistics.median(each.work for each in some) for some in taken.values())
    cpu = [statistics.median(each.cpu for each in some) for some in taken.values()]
    whole = [statistics.median(each.whole for each in some) for some in taken.values()]
    return {
        "load_average": loads, "rounds": rounds, "rows": BATCH * BATCHES,
        "threads_a_worker": 1, "seconds_of_one": one, "seconds_of_two": two,
        "ratio": one / two, "cpu_ratio": cpu[0] / cpu[1],
        "ratios": [a.work / b.work for a, b in zip(taken[1], taken[2], strict=True)],
        "whole_seconds_of_one": whole[0], "whole_seconds_of_two": whole[1], "all_rows_equal": len(digests) == 1,
    }  # fmt: skip


def memory() -> dict[str, Any]:
    """Anonymous memory of this process while it makes a hundred thousand small examples."""
    small = tgt.Teacher(nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 10))
    sampler = tgt.LatentSampler(small, sigma=0.5, units="absolute")
    seen: list[int] = []

    def long() -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(LONG // LONG_BATCH):
            seen.append(anonymous())
            yield torch.arange(LONG_BATCH) + number * LONG_BATCH, torch.zeros(LONG_BATCH, 8)

    with tempfile.TemporaryDirectory() as folder, threads(1):
        told = tgt.synthesize(sampler, long(), folder, shard_bytes=1 << 20, progress=False)
        assert told.computed == LONG
    early, late = max(seen[: len(seen) // 10]), max(seen)
    return {"rows": LONG, "bytes_after_a_tenth": early, "bytes_at_the_most": late, "growth": late - early}


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError("this system does not tell")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    long = memory()
    print(f"{long['rows']} rows: {long['growth'] / 2**20:.1f} MiB more at the end than after a tenth")
    side_by_side = workers(given.rounds)
    ratio, cpu = side_by_side["ratio"], side_by_side["cpu_ratio"]
    print(f"two workers: {ratio:.2f} times the rate of one, {cpu:.2f} by time of a core")
    print(f"all rows equal: {side_by_side['all_rows_equal']}")
    if given.save:
        origin = record.origin(torch.device("cpu"), 0.0, "python benchmarks/synthesis.py --save")
        print(save("synthesis-cpu", {**origin, "workers": side_by_side, "memory": long}))
    good = side_by_side["ratio"] >= LEAST and side_by_side["all_rows_equal"] and long["growth"] <= MOST_GROWTH
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
