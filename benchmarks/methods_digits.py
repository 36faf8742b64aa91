"""Trains the digits demo's student by every recipe of ``tgt-fast demo digits --with``.

    python benchmarks/methods_digits.py [--seeds 3] [--only NAME ...] [--tune] [--save]

All students of a seed have one start, the same labelled images and the same batches; all have one teacher, of the
demo's quick settings. --tune compares weights of the losses, on the validation split, one seed and half of the steps.
With --save the result goes to benchmarks/results/methods-digits.json; with --only it replaces those methods there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from harness import RESULTS, save

from tgt_fast._versions import versions
from tgt_fast.bench.record import commit
from tgt_fast.demos.digits import teachers
from tgt_fast.demos.digits.cooking import train_recipe
from tgt_fast.demos.digits.data import class_counts, load_digits, long_tailed, validation_split
from tgt_fast.demos.digits.loss_recipes import LOSS_RECIPES
from tgt_fast.demos.digits.recipes import RECIPES
from tgt_fast.demos.digits.settings import Settings, quick
from tgt_fast.demos.digits.teachers import TeacherWeights
from tgt_fast.report.numbers import summary

STEPS, TUNING_SEED = 400, 100
FACTORS = (0.1, 0.3, 1.0, 3.0)
PARTS = ("head", "middle", "tail", "agreement", "mean_kl")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), metavar="NAME")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    begun, names = time.perf_counter(), given.only or list(RECIPES)
    settings = replace(quick(Settings()), steps=STEPS // (2 if given.tune else 1), evaluations=1)
    pool, test = load_digits()
    seeds = range(given.seeds)
    if given.tune:
        (pool, test), seeds = validation_split(pool), range(TUNING_SEED, TUNING_SEED + 1)
    vae, labeler = (train(pool, settings, seeds[0]) for train in (teachers.train_vae, teachers.train_labeler))
    teacher = TeacherWeights(*vae, labeler).build(settings)
    if given.tune:
        images = long_tailed(pool, class_counts(), seeds[0])
        for name in names if given.only else LOSS_RECIPES:
            for factor in FACTORS:
                made = train_recipe(name, teacher, images, test, class_counts(), settings, seeds[0], None, factor)
                print(f"{name} x {factor:g}: {made.accuracy:.2f} {made.tail:.2f}", flush=True)
        return 0
    students: dict[str, Any] = {}
    for name in names:
        reached, spent = [], 0.0
        for seed in seeds:
            images = long_tailed(pool, class_counts(), seed)
            before = time.process_time()
            reached.append(train_recipe(name, teacher, images, test, class_counts(), settings, seed))
            spent += time.process_time() - before
        students[name] = {
            "group": RECIPES[name].group,
            "label": RECIPES[name].label,
            "accuracy": summary([one.accuracy for one in reached]),
            **{part: sum(getattr(one, part) for one in reached) / len(reached) for part in PARTS},
            "step_milliseconds": 1e3 * spent / len(seeds) / settings.steps,
        }
        print(name, {part: round(students[name][part], 2) for part in PARTS}, students[name]["accuracy"], flush=True)
    if given.save:
        command = f"python benchmarks/methods_digits.py --seeds {given.seeds} --save"
        file = RESULTS / "methods-digits.json"
        before_it = json.loads(file.read_text())["students"] if given.only and file.exists() else {}
        students = {name: (before_it | students)[name] for name in RECIPES if name in before_it | students}
        record = {
            "command": command, "commit": commit(), "versions": versions(), "seeds": list(seeds),
            "steps": settings.steps, "total_seconds": time.perf_counter() - begun, "students": students,
        }  # fmt: skip
        print(save("methods-digits", record))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
