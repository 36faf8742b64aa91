"""Kill ``fit`` or the writers of a cache at random moments, and look at what is in the folder each time.

    python python_tests/kills.py fit --kills 250
    python python_tests/kills.py cache --kills 250

After each kill every file must be whole, bit for bit what an undisturbed process writes, or be a temporary file of a
name of ours; after each finished run nothing else than the result may be there. It prints figures as JSON, and fails
with the first difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from cache_kit import RowWise, data, forked, record_by_record, same
from training_kit import make_run

import tgt_fast as tgt
from tgt_fast.train.checkpoint import load_checkpoint
from tgt_fast.train.data import BatchStream

TEMPORARY = re.compile(r"\.tgt_fast_[0-9a-f]{16}-\w*\.tmp")
STEPS = 10
WRITERS, EPISODE = 3, 25  # kills in one folder of a cache
K, KINDS = 3, 64
SHARED, OWN = 1000, 10**6  # ids that all writers write; where those of each begin


EXPECTED = record_by_record(RowWise(), data(KINDS), K)


def check(holds: bool, *told: object) -> None:
    if not holds:
        raise SystemExit(" ".join(map(str, told)))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill(process: BaseProcess) -> bool:
    """True if it was still running."""
    process.kill()
    process.join()
    code = process.exitcode
    process.close()
    check(code in (0, -signal.SIGKILL), "a process ended by itself with", code)
    return code != 0


# ---- fit ----


def train(folder: Path) -> None:
    tgt.fit(
        **make_run("gradient"), steps=STEPS, checkpoint_dir=folder, checkpoint_every=1, resume=True, eval_every=2,
        evaluate=lambda student: {"accuracy": student[0].weight[0, 0].item()},
    )  # fmt: skip


def undisturbed(folder: Path) -> dict[str, set[str]]:
    """The hashes of what a run writes, by the first letters of a name."""
    found: dict[str, set[str]] = {"best": set(), "checkpoint-": set(), "checkpoint.": set()}
    replace = os.replace

    def noted(*paths: Any) -> None:
        replace(*paths)
        found[kind(Path(paths[1]).name)].add(digest(Path(paths[1])))

    os.replace = noted
    try:
        train(folder)
    finally:
        os.replace = replace
    check(len(found["checkpoint."]) == len(found["checkpoint-"]) == STEPS, "steps that leave no trace")
    check(len(found["best"]) > 1, "one best")
    return found


def kind(name: str) -> str:
    return next(begins for begins in ("best", "checkpoint-", "checkpoint.") if name.startswith(begins))


def look_at_run(folder: Path, expected: dict[str, set[str]], figures: Counter[str]) -> None:
    found = names(folder)
    left = [name for name in found if TEMPORARY.fullmatch(name)]
    figures["temporary files met"] += bool(left)
    for name in found:
        if name not in left:
            check(digest(folder / name) in expected[kind(name)], name, "is not what an undisturbed run writes")
    if "checkpoint.json" in found:
        run = make_run("gradient")
        parts = {name: run[name] for name in ("student", "optimizer", "scheduler")}
        loaded = load_checkpoint(
            folder, **parts, sampler=run["objective"].sampler, data=BatchStream(run["loader"])
        )  # fmt: skip
        check(0 < loaded.step <= STEPS, "step", loaded.step)
        figures["checkpoints met"] += 1


def kill_fit(kills: int, folder: Path, draw: random.Random) -> Counter[str]:
    figures: Counter[str] = Counter()
    whole = folder / "undisturbed"
    expected = undisturbed(whole)
    start = time.monotonic()
    forked(train, folder / "timed").join()
    length = time.monotonic() - start
    while figures["kills"] < kills:
        run = folder / f"run {figures['runs']}"
        figures["runs"] += 1
        ended = False
        while not ended:
            process = forked(train, run)
            process.join(draw.uniform(0, 1.2 * length) if figures["kills"] < kills else None)
            ended = not kill(process)
            if not ended:
                figures["kills"] += 1
                if run.exists():
                    look_at_run(run, expected, figures)
        check(names(run) == names(whole), "left:", names(run))
        for name in names(whole):
            check(digest(run / name) == digest(whole / name), name, "differs from the undisturbed run's")
    return figures


# ---- caches ----


def cache_in(folder: Path) -> tgt.TeacherCache:
    teacher = RowWise()
    return tgt.TeacherCache(
        folder, lambda x: record_by_record(teacher, x, K), k=K, version="rows", shard_bytes=300
    )  # fmt: skip


def write(folder: Path, number: int) -> None:
    """Rows of its own, and rows that others write as well, without end."""
    draw = random.Random(number)
    x = data(KINDS)
    with cache_in(folder) as cache:
        for at in range(number * OWN, (number + 1) * OWN, 4):
            ids = torch.tensor([*range(at, at + 4), *draw.sample(range(SHARED), 2)])
            check(same(cache.label(x[ids % KINDS], ids), EXPECTED[ids % KINDS]), "a row differs as it is written")


def look_at_cache(folder: Path, figures: Counter[str]) -> None:
    """As a reader, while others write."""
    found = names(folder)
    for name in found:
        ours = name in ("manifest.json",) or name.endswith(".safetensors") or TEMPORARY.fullmatch(name)
        check(bool(ours), "left:", name)
    figures["temporary files met"] += any(TEMPORARY.fullmatch(name) for name in found)
    if "manifest.json" not in found:
        return
    with tgt.TeacherCache.open(folder) as cache:
        check(cache.verify() == {}, cache.verify())
        ids = cache.ids()
        figures["rows compared"] += len(ids)
        if len(ids):
            check(same(cache.read(ids), EXPECTED[torch.as_tensor(ids) % KINDS]), "a row is not what was written")


def kill_cache(kills: int, folder: Path, draw: random.Random) -> Counter[str]:
    figures: Counter[str] = Counter()
    number = 0
    while figures["kills"] < kills:
        place = folder / f"cache {figures['folders']}"
        figures["folders"] += 1
        writers: list[BaseProcess] = []
        for _ in range(min(EPISODE, kills - figures["kills"])):
            while len(writers) < WRITERS:
                number += 1
                writers.append(forked(write, place, number))
            time.sleep(draw.uniform(0, 0.15))
            check(kill(writers.pop(draw.randrange(WRITERS))), "a writer ended by itself")
            figures["kills"] += 1
            if place.exists():
                look_at_cache(place, figures)
        for writer in writers:  # they are killed as well, and not counted: what follows must be alone
            kill(writer)
        with cache_in(place) as cache:
            ids = torch.arange(SHARED)
            check(same(cache.label(data(KINDS)[ids % KINDS], ids), EXPECTED[ids % KINDS]), "a row was not made again")
        left = [name for name in names(place) if name != "manifest.json" and not name.endswith(".safetensors")]
        check(not left, "left:", left)
        look_at_cache(place, figures)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fit", "cache"])
    parser.add_argument("--kills", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the clock has its say as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = {"fit": kill_fit, "cache": kill_cache}[options.what]
        figures = run(options.kills, Path(folder), random.Random(options.seed))
    print(json.dumps({"killed": options.what, **figures, "seconds": round(time.monotonic() - start)}))


if __name__ == "__main__":
    main()
