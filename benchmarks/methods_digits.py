"""Trains the digits demo's student by every recipe of ``tgt-fast demo digits --with``.

    python benchmarks/methods_digits.py [--seeds 3] [--only NAME ...] [--tune] [--save]

All students of a seed have one start, the same labelled images and the same batches; all have one teacher, of the
demo's quick settings. --tune compares, on the validation split, the values of the number that a recipe leaves open:
with another seed and half of the steps, and what all others are compared with, plain distillation, with three seeds and
all steps. A recipe is to have the best of them. With --save the result goes to benchmarks/results/methods-digits.json,
or methods-digits-tuning.json; with --only it replaces those methods there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from harness import RESULTS, save

from tgt_fast._versions import versions
from tgt_fast.bench.record import commit
from tgt_fast.demos.digits import teachers
from tgt_fast.demos.digits.cooking import train_recipe
from tgt_fast.demos.digits.data import class_counts, load_digits, long_tailed, validation_split
from tgt_fast.demos.digits.methods import StudentResult
from tgt_fast.demos.digits.recipes import RECIPES
from tgt_fast.demos.digits.settings import Settings, quick
from tgt_fast.demos.digits.teachers import TeacherWeights
from tgt_fast.report.numbers import summary

STEPS, FIRST_TUNING_SEED = 400, 100
TUNING = "methods-digits-tuning"
PARTS = ("head", "middle", "tail", "agreement", "mean_kl")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), metavar="NAME")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    settings = replace(quick(Settings()), steps=STEPS, evaluations=1)
    pool, test = load_digits()
    if given.tune:
        pool, test = validation_split(pool)
    first = FIRST_TUNING_SEED if given.tune else 0
    vae, labeler = (train(pool, settings, first) for train in (teachers.train_vae, teachers.train_labeler))
    teacher = TeacherWeights(*vae, labeler).build(settings)

    def trained(name: str, count: int, steps: int, number: float | None = None) -> list[StudentResult]:
        found = []
        for seed in range(first, first + count):
            images, its = long_tailed(pool, class_counts(), seed), replace(settings, steps=steps)
            found.append(train_recipe(name, teacher, images, test, class_counts(), its, seed, None, number))
        return found

    kept = TUNING if given.tune else "methods-digits"
    students = _saved(kept) if given.save and given.only else {}
    what = "--tune" if given.tune else f"--seeds {given.seeds}"
    for name in given.only or RECIPES:
        if not given.tune:
            students[name] = compared(name, partial(trained, name, given.seeds, STEPS))
        elif RECIPES[name].number is not None:
            count, steps = (3, STEPS) if name == "plain" else (1, STEPS // 2)
            found = tried(name, partial(trained, name, count, steps))
            students[name] = found | {"seeds": list(range(first, first + count)), "steps": steps}
        if given.save:  # after each, for a run that is stopped
            record = {
                "command": f"python benchmarks/methods_digits.py {what} --save", "commit": commit(),
                "versions": versions(), "total_seconds": time.perf_counter() - begun,
                "students": {name: students[name] for name in RECIPES if name in students},
            }  # fmt: skip
            more = {} if given.tune else {"seeds": list(range(given.seeds)), "steps": STEPS}
            save(kept, record | more)
    return 0


def _saved(name: str) -> dict[str, Any]:
    file = RESULTS / f"{name}.json"
    return dict(json.loads(file.read_text())["students"]) if file.exists() else {}


def compared(name: str, trained: Callable[[], list[StudentResult]]) -> dict[str, Any]:
    before = time.process_time()
    reached = trained()
    spent = time.process_time() - before
    number = RECIPES[name].number
    made: dict[str, Any] = {
        "group": RECIPES[name].group,
        "label": RECIPES[name].label,
        "number": None if number is None else [number.name, number.value],
        # On the validation split:
        "chosen": number is not None and _saved(TUNING).get(name, {}).get("best") == number.value,
        "accuracy": summary([one.accuracy for one in reached]),
        **{part: sum(getattr(one, part) for one in reached) / len(reached) for part in PARTS},
        "step_milliseconds": 1e3 * spent / len(reached) / STEPS,
    }
    print(name, {part: round(made[part], 2) for part in PARTS}, made["accuracy"], flush=True)
    return made


def tried(name: str, trained: Callable[[float], list[StudentResult]]) -> dict[str, Any]:
    """The mean validation accuracy with each value of the recipe's number."""
    number = RECIPES[name].number
    assert number is not None
    found = [summary([one.accuracy for one in trained(value)]) for value in number.tried]
    best = max(zip(found, number.tried, strict=True), key=lambda pair: pair[0]["mean"])[1]
    print(name, number.name, dict(zip(number.tried, [one["mean"] for one in found], strict=True)), best, flush=True)
    return {"number": number.name, "tried": list(number.tried), "accuracy": found, "best": best}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
