"""A student trained by a recipe."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tgt_fast.demos.digits.data import Batches, Images
from tgt_fast.demos.digits.methods import StudentResult, accuracy_on, measured
from tgt_fast.demos.digits.recipe import Kitchen, Recipe
from tgt_fast.demos.digits.recipes import RECIPES
from tgt_fast.demos.digits.settings import Settings
from tgt_fast.demos.digits.teachers import cosine
from tgt_fast.teacher import Teacher
from tgt_fast.train import fit


class _Drawn:
    """Batches whose rows a sampler draws; a row that comes again gets an id of its own."""

    def __init__(self, images: Images, draw: Any, size: int, count: int, seed: int) -> None:
        self.images, self.size = images, size
        self.rows = draw(images.y, num_samples=size * count, seed=seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for rows in torch.split(torch.tensor(list(self.rows)), self.size):
            yield torch.arange(len(rows)), self.images.x[rows], self.images.y[rows]


def train_recipe(
    name: str,
    teacher: Teacher,
    images: Images,
    test: Images,
    counts: Sequence[int],
    settings: Settings,
    seed: int,
    recipe: Recipe | None = None,
    number: float | None = None,
) -> StudentResult:
    """Train on ``images`` (``counts`` a class) by the recipe of that name, or another one, and measure on ``test``.

    Args:
        number: in the place of that which the recipe chose.
    """
    recipe = RECIPES[name] if recipe is None else recipe
    torch.manual_seed(seed)
    student = recipe.student()
    if number is None:
        number = math.nan if recipe.number is None else recipe.number.value
    kitchen = Kitchen(teacher, images, settings, seed, student, number)
    size = settings.real * (1 if recipe.synthetic else 2)
    loader: Any = Batches(images, size, settings.steps, seed)
    if recipe.draw is not None:
        loader = _Drawn(images, recipe.draw, size, settings.steps, seed)
    objective: Any = recipe.objective(kitchen)
    parameters = {id(p): p for p in (*student.parameters(), *getattr(objective, "parameters", list)())}
    optimizer = torch.optim.Adam(parameters.values(), lr=recipe.rate or settings.rate, fused=True)
    started = time.perf_counter()
    result = fit(
        student,
        objective,
        loader,
        steps=settings.steps,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(settings.steps)),
        evaluate=accuracy_on(test),
        eval_every=max(1, settings.steps // settings.evaluations),
        seed=seed,
        progress=False,
    )
    if recipe.after is not None:
        student = recipe.after(student, kitchen)
    seconds = time.perf_counter() - started
    curve = tuple((int(record["step"]), record["accuracy"]) for record in result.history)
    with torch.no_grad():
        theirs = teacher.label(test.x)
    return measured(name, seed, student, theirs, len(images), test, counts, seconds, curve)
