"""Kill ``tgt-fast synthesize`` at random moments, and look at what is in the folder each time.

    python python_tests/synthesis_kills.py --engine local --kills 20
    python python_tests/synthesis_kills.py --engine torchrun --kills 5 --format parquet

Each time the command itself or one of its workers is killed with SIGKILL, then the command is run again. After each
kill every row that can be read must be the one that an undisturbed run makes, and no file may hold a row that another
one holds; after a run that nobody disturbs all rows must be there. It prints figures as JSON, and fails with the first
difference.
``--engine forked``, of the tests, is one worker in a process that was forked here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import toys
from cache_kit import forked
from kills import TEMPORARY, check
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.cache.shard import Shard
from tgt_fast.errors import CacheError

ROWS, BATCH, REPLICAS, PAUSE = 60, 5, 2, 0.02
OPTIONS = ["--units", "absolute", "--sigma", "0.5", "--replicas", str(REPLICAS), "--shard-bytes", "300"]


def teacher() -> tgt.Teacher:
    return toys.vector_teacher(prior="normal")


def batches() -> Any:
    x = toys.normal(ROWS, toys.FEATURES)
    for ids in torch.arange(ROWS).split(BATCH):
        time.sleep(PAUSE)
        yield ids, x[ids]


def words(folder: Path, engine: str, format: str) -> list[str]:
    own = Path(__file__).stem
    found = [f"--teacher={own}:teacher", f"--data={own}:batches", *OPTIONS, f"--out={folder}", f"--format={format}"]
    return ["synthesize", *found, f"--engine={engine}", "--workers=2"]


def work(folder: Path, format: str) -> None:
    sampler = tgt.LatentSampler(teacher(), sigma=0.5, units="absolute")
    tgt.synthesize(sampler, batches(), folder, replicas=REPLICAS, format=format, shard_bytes=300, progress=False)


def content(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    rows = tgt.SyntheticDataset(folder).read()
    assert isinstance(rows.labels, Tensor)
    return rows.keys, rows.x, rows.labels


def look(folder: Path, whole: tuple[Tensor, Tensor, Tensor], figures: Counter[str]) -> None:
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    ends = (".safetensors", ".parquet", "manifest.json")
    for name in names:
        check(name.endswith(ends) or bool(TEMPORARY.fullmatch(name)), "left:", name)
    figures["temporary files met"] += any(TEMPORARY.fullmatch(name) for name in names)
    try:
        keys, x, labels = content(folder)
    except CacheError:  # nothing yet
        return
    figures["rows compared"] += len(keys)
    where = {tuple(key): row for row, key in enumerate(whole[0].tolist())}
    rows = torch.tensor([where[tuple(key)] for key in keys.tolist()], dtype=torch.int64)
    check(torch.equal(x, whole[1][rows]) and torch.equal(labels, whole[2][rows]), "a row is not what it should be")
    held: Counter[Any] = Counter(key for path in folder.iterdir() for key in keys_in(path))
    check(len(held) == len(keys) and set(held.values()) <= {1}, "a row lies in two files")


def keys_in(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        columns = parquet.read_table(path, columns=["sample_id", "replica", "step"]).to_pydict()
        return list(zip(*columns.values(), strict=True))
    if path.suffix == ".safetensors":
        manifest = tgt.cache.manifest.Manifest.read(path.parent)
        assert manifest is not None
        return Shard(path, manifest.layout).ids.tolist()
    return []


def descendants(process: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [process]
    while waiting:
        waiting += (mine := parents.get(waiting.pop(), []))
        found += mine
    return found


def end(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


def disturbed(folder: Path, engine: str, format: str, draw: random.Random, length: float) -> bool:
    """Run the command and kill it, or one of its processes; whether it was still at work."""
    if engine == "forked":
        process: BaseProcess = forked(work, folder, format)
        process.join(draw.uniform(0, length))
        process.kill()
        process.join()
        return process.exitcode != 0
    command = [sys.executable, "-m", "tgt_fast", *words(folder, engine, format)]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun = time.monotonic()
    while started.poll() is None and not list(folder.glob("*.*")) and time.monotonic() - begun < 4 * length:
        time.sleep(0.01)  # until the work begins: what comes before takes the most time, and writes nothing
    time.sleep(draw.uniform(0, PAUSE * ROWS / BATCH))
    mine = descendants(started.pid)
    busy = started.poll() is None
    end(draw.choice([started.pid, *mine]))
    with suppress(subprocess.TimeoutExpired):
        started.wait(120 if draw.random() < 0.5 else 1)
    mine = list(dict.fromkeys([*mine, *descendants(started.pid)]))
    for one in [started.pid, *mine]:
        end(one)
    started.wait()
    while any(Path(f"/proc/{one}/stat").exists() and state(one) not in "ZX" for one in mine):
        time.sleep(0.01)
    return busy


def state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"


def run(engine: str, kills: int, format: str, seed: int) -> Counter[str]:
    figures: Counter[str] = Counter()
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        begun = time.monotonic()
        work(Path(name) / "whole", "safetensors")
        length = time.monotonic() - begun if engine == "forked" else 60.0
        whole = content(Path(name) / "whole")
        check(len(whole[0]) == ROWS * REPLICAS, "rows:", len(whole[0]))
        while figures["kills"] < kills:
            folder = Path(name) / f"folder {figures['folders']}"
            figures["folders"] += 1
            for _ in range(3):  # of one folder, which is then finished
                figures["kills"] += disturbed(folder, engine, format, draw, length)
                look(folder, whole, figures)
            if engine == "forked":
                work(folder, format)
            else:
                command = [sys.executable, "-m", "tgt_fast", *words(folder, engine, format)]
                done = subprocess.run(command, capture_output=True, text=True)
                check(done.returncode == 0, done.stderr)
            look(folder, whole, figures)
            check(all(torch.equal(a, b) for a, b in zip(content(folder), whole, strict=True)), "rows are missing")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["forked", "local", "torchrun", "ray"], default="local")
    parser.add_argument("--format", choices=["safetensors", "parquet"], default="safetensors")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the clock has its say as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    own = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([own, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    begun = time.monotonic()
    figures = run(options.engine, options.kills, options.format, options.seed)
    told = {"engine": options.engine, "format": options.format, **figures}
    print(json.dumps({**told, "seconds": round(time.monotonic() - begun)}))


if __name__ == "__main__":
    main()
