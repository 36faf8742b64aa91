"""Trains the digits demo's student with fresh synthetic examples and with replayed ones, seed by seed.

    python benchmarks/replay_digits.py [--seeds 10] [--workers 1] [--methods tgt-random tgt-gradient] [--save]

The seeds are neither the demo's nor those it was tuned on. All students of a seed have one teacher, one start and the
same real batches. Counted are the rows that the teacher's decoder was given. With --save the result goes to
benchmarks/results/replay-digits-METHOD.json, a file a method; exit status 1: replay cost more than it may.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from harness import save
from torch import Tensor, nn

from tgt_fast._versions import versions
from tgt_fast.bench.record import commit
from tgt_fast.demos.digits import teachers
from tgt_fast.demos.digits.data import class_counts, load_digits, long_tailed
from tgt_fast.demos.digits.methods import train_student
from tgt_fast.demos.digits.settings import Settings
from tgt_fast.demos.digits.teachers import TeacherWeights
from tgt_fast.demos.workers import crew

FIRST_SEED = 200
REUSE, CANDIDATES = 8, 4
MOST = 0.5  # points of mean accuracy that replay may cost
KINDS: dict[str, dict[str, Any] | None] = {
    "fresh": None,
    "replay": {"reuse": REUSE},
    "replay-disagreement": {"reuse": REUSE, "select": "disagreement", "candidates": CANDIDATES},
}
METHODS = ("tgt-random", "tgt-gradient")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    begun, seeds = time.perf_counter(), range(FIRST_SEED, FIRST_SEED + given.seeds)
    settings = replace(Settings(), evaluations=1)
    found: dict[str, dict[int, dict[str, float]]] = {f"{m}, {kind}": {} for m in given.methods for kind in KINDS}

    with crew(given.workers) as team:

        def taught(seed: int, teacher: TeacherWeights) -> None:
            for method in given.methods:
                for kind in KINDS:
                    team.submit(
                        student_of, method, kind, teacher, settings, seed,
                        then=lambda row, name=f"{method}, {kind}", seed=seed: told(name, seed, row),
                    )  # fmt: skip

        def told(name: str, seed: int, row: dict[str, float]) -> None:
            found[name][seed] = row
            print(seed, name, row, flush=True)

        for seed in seeds:
            team.submit(teacher_of, settings, seed, then=lambda made, seed=seed: taught(seed, made))
        team.finish()

    rows = {
        name: {key: [by_seed[seed][key] for seed in seeds] for key in ("accuracy", "decoded", "seconds")}
        for name, by_seed in found.items()
    }
    kept = True
    for method in given.methods:
        bars = bars_of(method, rows)
        for bar in bars:
            print(bar)
            kept = kept and bar["kept"]
        if given.save:
            record = {
                "command": f"python benchmarks/replay_digits.py --seeds {given.seeds} --workers {given.workers} "
                f"--methods {method} --save",
                "methods": [method], "commit": commit(), "versions": versions(),
                "seeds": list(seeds), "reuse": REUSE, "candidates": CANDIDATES, "steps": settings.steps,
                "total_seconds": time.perf_counter() - begun,
                "students": {f"{method}, {kind}": rows[f"{method}, {kind}"] for kind in KINDS}, "bars": bars,
            }  # fmt: skip
            print(save(f"replay-digits-{method.removeprefix('tgt-')}", record))
    return int(not kept)


def bars_of(method: str, rows: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    fresh, uniform, chosen = (rows[f"{method}, {kind}"] for kind in KINDS)
    bars = []
    for name, one, other in (("replay - fresh", uniform, fresh), ("disagreement - uniform", chosen, uniform)):
        gaps = [a - b for a, b in zip(one["accuracy"], other["accuracy"], strict=True)]
        mean = sum(gaps) / len(gaps)
        bars.append({"bar": f"{method}: {name}", "points": gaps, "mean": mean, "kept": mean >= -MOST})
    for name, one in (("replay", uniform), ("disagreement", chosen)):
        share = sum(one["decoded"]) / sum(fresh["decoded"])
        bars.append({"bar": f"{method}: decoded rows, {name} / fresh", "mean": share, "kept": share == 1 / REUSE})
    return bars


def teacher_of(settings: Settings, seed: int) -> TeacherWeights:
    pool, _ = load_digits()
    return TeacherWeights(*teachers.train_vae(pool, settings, seed), teachers.train_labeler(pool, settings, seed))


def student_of(method: str, kind: str, weights: TeacherWeights, settings: Settings, seed: int) -> dict[str, float]:
    torch.set_num_threads(1)
    pool, test = load_digits()
    images = long_tailed(pool, class_counts(), seed)
    teacher, decoded = weights.build(settings), 0

    def count(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        nonlocal decoded
        decoded += len(given[0])

    assert isinstance(teacher.decoder, nn.Module)
    hook = teacher.decoder.register_forward_pre_hook(count)
    made = train_student(method, teacher, images, test, class_counts(), settings, seed, KINDS[kind])
    hook.remove()
    return {"accuracy": made.accuracy, "decoded": decoded, "seconds": made.seconds}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
