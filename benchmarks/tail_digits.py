"""Trains the digits demo's student with exploration that minds the tail and with one that does not, seed by seed.

    python benchmarks/tail_digits.py [--seeds 10] [--save]
    python benchmarks/tail_digits.py --tune

The seeds are neither the demo's nor those it was tuned on; five of them share a teacher of the demo's quick settings.
All students of a seed have one start, the same labelled images and the same real batches. --tune compares choices on
the validation split of other seeds, without the test images. With --save the result goes to
benchmarks/results/tail-digits.json; exit status 1: the rarest third of the classes gained less than a point, or
accuracy over all was lost.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from harness import save

from tgt_fast._versions import versions
from tgt_fast.bench.record import commit
from tgt_fast.demos.digits import tail_recipes, teachers
from tgt_fast.demos.digits.cooking import train_recipe
from tgt_fast.demos.digits.data import Images, class_counts, load_digits, long_tailed, validation_split
from tgt_fast.demos.digits.recipe import Kitchen, Recipe
from tgt_fast.demos.digits.recipes import RECIPES
from tgt_fast.demos.digits.settings import Settings, quick
from tgt_fast.demos.digits.teachers import TeacherWeights
from tgt_fast.teacher import Teacher

FIRST_SEED, TUNING_SEEDS = 300, (100, 101)
KINDS = ("tgt-batch", "tgt-tail", "tgt-batch-adjusted", "tgt-tail-adjusted")
STEPS = 600
SEEDS_OF_A_TEACHER = 5
LEAST = 1.0  # points that the rarest third must gain
PARTS = ("accuracy", "head", "middle", "tail", "seconds")
TRIED = [(0.0, 1.0), (0.25, 1.0), (0.25, 1.3), (0.25, 1.4), (0.5, 1.4)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    begun, settings = time.perf_counter(), replace(quick(Settings()), steps=STEPS, evaluations=1)
    pool, test = load_digits()
    if given.tune:
        fit, validation = validation_split(pool)
        students(settings, TUNING_SEEDS, fit, validation, {**_tried(), "tgt-batch": RECIPES["tgt-batch"]})
        return 0
    seeds = range(FIRST_SEED, FIRST_SEED + given.seeds)
    found = students(settings, seeds, pool, test, {kind: RECIPES[kind] for kind in KINDS})
    bars = bars_of(found)
    for bar in bars:
        print(bar)
    if given.save:
        record = {
            "command": f"python benchmarks/tail_digits.py --seeds {given.seeds} --save", "commit": commit(),
            "versions": versions(), "seeds": list(seeds), "steps": settings.steps, "power": tail_recipes.TAIL_POWER,
            "sigma": tail_recipes.TAIL_SIGMA, "total_seconds": time.perf_counter() - begun, "students": found,
            "bars": bars,
        }  # fmt: skip
        print(save("tail-digits", record))
    return int(not all(bar.get("kept", True) for bar in bars))


def students(
    settings: Settings, seeds: Iterable[int], pool: Images, test: Images, kinds: dict[str, Recipe]
) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {kind: {part: [] for part in PARTS} for kind in kinds}
    taught: dict[int, Teacher] = {}
    for seed in seeds:
        first = seed - seed % SEEDS_OF_A_TEACHER
        if first not in taught:
            vae, labeler = teachers.train_vae(pool, settings, first), teachers.train_labeler(pool, settings, first)
            taught[first] = TeacherWeights(*vae, labeler).build(settings)
        teacher = taught[first]
        images = long_tailed(pool, class_counts(), seed)
        for kind, recipe in kinds.items():
            made = train_recipe(kind, teacher, images, test, class_counts(), settings, seed, recipe)
            for part in PARTS:
                found[kind][part].append(getattr(made, part))
        print(seed, {kind: [round(fmean(of[p]), 2) for p in PARTS[:4]] for kind, of in found.items()}, flush=True)
    return found


def bars_of(found: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """What the tail-aware student must gain; and, without a bar, what logit adjustment adds to each."""
    bars: list[dict[str, Any]] = []
    for name, one, other, judged in (
        ("tail-aware - batch anchors", "tgt-tail", "tgt-batch", True),
        ("batch anchors: logit adjustment - none", "tgt-batch-adjusted", "tgt-batch", False),
        ("tail-aware: logit adjustment - none", "tgt-tail-adjusted", "tgt-tail", False),
    ):
        for part, least in (("tail", LEAST), ("accuracy", 0.0)):
            gaps = [a - b for a, b in zip(found[one][part], found[other][part], strict=True)]
            mean = fmean(gaps)
            kept = {"kept": mean >= least} if judged else {}
            bars.append({"bar": f"{name}, {part}", "points": gaps, "mean": mean, **kept})
    return bars


def _tried() -> dict[str, Recipe]:
    def made(power: float, most: float) -> Recipe:
        def objective(kitchen: Kitchen) -> Any:
            return tail_recipes.explored(
                kitchen, **tail_recipes.tail_options(kitchen.counts, kitchen.settings.sigma, power, most)
            )

        return Recipe("exploration", f"power {power}, sigma {most}", objective, synthetic=True)

    return {f"power {power}, sigma {most}": made(power, most) for power, most in TRIED}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
