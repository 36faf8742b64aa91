"""Times TeacherCache.read against plain reads of as many bytes from a file of rows, in the same run.

    python benchmarks/bench_cache.py [--seconds 2] [--folder DIR] [--quick] [--save]

Warm: batches of ids, one after the other or shuffled, out of the page cache; beside it numpy.memmap of one array with
rows of as many bytes, indexed by the same ids, and, for shuffled ids, one os.pread a row and one slice of safetensors'
safe_open a row and tensor. Cold: the page cache is dropped (posix_fadvise), then a cache is opened and all its rows are
read in order, checksums included; beside it, the same for the memmap, and for read() of one file of as many bytes. With
--save the numbers go to benchmarks/results/cache-cpu.json, which the documentation's table is made from.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from harness import save
from rich.console import Console
from rich.table import Table

import tgt_fast as tgt
from tgt_fast.bench.copying import copy_rate
from tgt_fast.bench.record import hardware, origin
from tgt_fast.bench.timing import medians

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A data set."""

    name: str
    samples: int
    shape: tuple[int, ...]  # of a sample, without the classes
    classes: int
    k: int | None
    batch: int


CASES = [
    Case("top 64 of 32000, a row a sample", 200_000, (), 32_000, 64, 256),
    Case("top 64 of 32000, 128 positions", 2_000, (128,), 32_000, 64, 16),
    Case("logits of 1000 classes", 30_000, (), 1_000, None, 256),
    Case("logits of 10 classes", 200_000, (), 10, None, 256),
]


def record(case: Case, count: int, generator: torch.Generator) -> torch.Tensor | tgt.TeacherTopK:
    """Outputs as a teacher gives them; what they say does not matter here."""
    if case.k is None:
        return torch.randn(count, *case.shape, case.classes, generator=generator)
    step = torch.randint(1, case.classes // case.k, (count, *case.shape, case.k), generator=generator)
    log_probs = torch.randn(count, *case.shape, case.k, generator=generator)
    return tgt.TeacherTopK(step.cumsum(-1), log_probs, log_probs[..., 0], 2.0, case.classes)


def fill(case: Case, folder: Path) -> int:
    """A cache of random rows, of which there are as many bytes a sample as returned."""
    generator = torch.Generator().manual_seed(0)
    with tgt.TeacherCache(folder, k=case.k, version="random") as cache:
        for ids in torch.arange(case.samples).split(max(1, (4 << 20) // max(1, case.classes // 8))):
            cache.add(ids, record(case, len(ids), generator))
        return cache.contents().layout.row_bytes


def drop(folder: Path) -> None:
    """Have the files read from the disk the next time."""
    gc.collect()  # maps keep pages
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def batches(case: Case, shuffled: bool) -> Iterator[torch.Tensor]:
    order = torch.randperm(case.samples, generator=torch.Generator().manual_seed(1))
    whole = case.samples // case.batch * case.batch
    rows = (order if shuffled else torch.arange(case.samples))[:whole]
    return itertools.cycle(rows.split(case.batch))


def warm(case: Case, folder: Path, plain: Path, row_bytes: int, shuffled: bool, seconds: float) -> dict[str, float]:
    """Milliseconds a batch."""
    mapped = np.memmap(plain, np.uint8, "r").reshape(case.samples, row_bytes)
    descriptor = os.open(plain, os.O_RDONLY)
    drawn = {name: batches(case, shuffled) for name in ("ours", "memmap", "pread", "safe_open")}

    def read_rows() -> Any:
        return [os.pread(descriptor, row_bytes, i * row_bytes) for i in next(drawn["pread"]).tolist()]

    with tgt.TeacherCache.open(folder) as cache:
        mapped.max()
        cache.missing(range(case.samples))  # every checksum, as in the first moments of a training run
        calls: dict[str, Callable[[], Any]] = {
            "ours": lambda: cache.read(next(drawn["ours"])),
            "memmap": lambda: mapped[next(drawn["memmap"]).numpy()],
        }
        if shuffled:
            calls["pread"] = read_rows
        timings = medians(calls, seconds=seconds, device=CPU)
        if shuffled:  # in turns with the others it would empty the caches for them
            timings |= medians({"safe_open": slices(folder, drawn["safe_open"])}, seconds=seconds / 2, device=CPU)
    os.close(descriptor)
    return {name: timing.total for name, timing in timings.items()}


def slices(folder: Path, drawn: Iterator[torch.Tensor]) -> Callable[[], Any]:
    """The library's own way for rows: a slice each."""
    files = [safetensors.safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    where = {int(i): (file, row) for file in files for row, i in enumerate(file.get_tensor("sample_ids").tolist())}
    fields = {id(file): [file.get_slice(name) for name in file.keys() if name != "sample_ids"] for file in files}  # noqa: SIM118

    def call() -> Any:
        places = [where[i] for i in next(drawn).tolist()]
        return [
            torch.cat(column)
            for column in zip(*([x[r : r + 1] for x in fields[id(f)]] for f, r in places), strict=True)
        ]

    return call


def cold(case: Case, folder: Path, plain: Path, row_bytes: int, turns: int) -> dict[str, float]:
    """Milliseconds of reading everything once."""
    times: dict[str, list[float]] = {"ours": [], "memmap": [], "file": []}
    for _ in range(turns):
        drop(folder)
        start = time.perf_counter()
        with tgt.TeacherCache.open(folder) as cache:
            for ids in torch.arange(case.samples).split(case.batch):
                cache.read(ids)
        times["ours"].append(time.perf_counter() - start)
        drop(plain.parent)
        start = time.perf_counter()
        mapped = np.memmap(plain, np.uint8, "r").reshape(case.samples, row_bytes)
        for ids in torch.arange(case.samples).split(case.batch):
            mapped[ids.numpy()]
        times["memmap"].append(time.perf_counter() - start)
        del mapped
        drop(plain.parent)
        start = time.perf_counter()
        with open(plain, "rb", buffering=0) as file:
            while file.read(case.batch * row_bytes):
                pass
        times["file"].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def measure(case: Case, folder: Path, seconds: float, turns: int) -> Iterator[dict[str, Any]]:
    row_bytes = fill(case, folder / "cache")
    (folder / "plain").mkdir()
    plain = folder / "plain" / "rows"
    with open(plain, "wb") as file:
        generator = np.random.default_rng(0)
        for start in range(0, case.samples, 4096):
            file.write(generator.bytes(min(4096, case.samples - start) * row_bytes))
    common = {"case": case.name, "samples": case.samples, "row_bytes": row_bytes, "batch": case.batch}
    for order in ("in order", "shuffled", "cold"):
        if order == "cold":
            found, count = cold(case, folder / "cache", plain, row_bytes, turns), case.samples
        else:
            found = warm(case, folder / "cache", plain, row_bytes, order == "shuffled", seconds)
            count = case.batch
        rate = count / found["ours"] * 1e3
        over = {f"over_{name}": value / found["ours"] for name, value in found.items() if name != "ours"}
        yield {
            **common, "order": order, "milliseconds": found, "rows_per_second": rate,
            "bytes_per_second": rate * row_bytes, **over,
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for timing a case and order")
    parser.add_argument("--folder", type=Path, help="where to write the data: on the disk to be measured")
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples; never saved")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cache-cpu.json")
    given = parser.parse_args()
    if given.save and given.quick:
        parser.error("--save is for the full set")
    made = origin(CPU, copy_rate(CPU), "python benchmarks/bench_cache.py --save")
    made["versions"]["safetensors"] = safetensors.__version__
    made["load"] = os.getloadavg()[0]
    made["rows"] = []
    table = Table(title=hardware(CPU))
    for column in ("", "order", "rows/s", "MB/s", "memmap", "pread", "safe_open", "file"):
        table.add_column(column, justify="left" if column in ("", "order") else "right")
    for case in CASES:
        if given.quick:
            case = Case(case.name, case.samples // 10, case.shape, case.classes, case.k, case.batch)
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            for row in measure(case, Path(folder), given.seconds, 2 if given.quick else 5):
                made["rows"].append(row)
                others = [row.get(f"over_{name}") for name in ("memmap", "pread", "safe_open", "file")]
                rates = f"{row['rows_per_second']:,.0f}", f"{row['bytes_per_second'] / 1e6:,.0f}"
                table.add_row(row["case"], row["order"], *rates, *("-" if x is None else f"{x:.2f}x" for x in others))
    Console(width=120).print(table)
    if given.save:
        print(save("cache-cpu", made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
