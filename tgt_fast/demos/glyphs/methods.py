"""Training the student, one method at a time. Every method shows it the same number of examples a step."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tgt_fast.cache import TeacherCache
from tgt_fast.demos.digits.data import Batches, Images
from tgt_fast.demos.digits.methods import Objective, OneHot, StudentResult, accuracy_on, measured
from tgt_fast.demos.digits.models import seeded
from tgt_fast.demos.digits.teachers import cosine
from tgt_fast.demos.glyphs import models
from tgt_fast.demos.glyphs.data import CLASSES, Balanced, BalancedBatches
from tgt_fast.demos.glyphs.settings import BASELINES, Settings
from tgt_fast.explore import LatentSampler, SyntheticReplay
from tgt_fast.losses.distill import DistillationLoss
from tgt_fast.teacher import Teacher
from tgt_fast.train import TGTObjective, fit

ALONE = ("one-hot", "distillation")  # they see real examples only


class Augmented:
    """As ``TGTObjective``, with augmented images, labelled by the teacher, in the place of synthetic ones.

    ``draw``: rows of ``images`` to augment; None: the batch's own.
    """

    def __init__(
        self,
        teacher: Teacher,
        augmentation: Callable[[Tensor, torch.Generator], Tensor],
        real: TGTObjective,
        images: Images,
        draw: Balanced | None,
        seed: int,
    ) -> None:
        self.teacher, self.augmentation, self.real = teacher, augmentation, real
        self.images, self.draw = images, draw
        self.generator = seeded(seed)

    def __call__(self, student: nn.Module, x: Tensor, y: Tensor | None, /, **given: Any) -> dict[str, Tensor]:
        anchors = x if self.draw is None else self.images.x[self.draw(len(x))]
        made = self.augmentation(anchors, self.generator)
        soft = cast(Tensor, self.real.loss.soft(student(made), self.teacher.label(made)))
        return {"loss": self.real(student, x, y, **given)["loss"] + soft}


class InTurn:
    """One objective at even steps, another at odd ones."""

    def __init__(self, *objectives: Objective) -> None:
        self.objectives = objectives

    def __call__(self, student: nn.Module, x: Tensor, y: Tensor | None, /, **given: Any) -> Mapping[str, Any]:
        return self.objectives[int(given["step"]) % 2](student, x, y, **given)


def sampler(method: str, teacher: Teacher, settings: Settings, seed: int, **options: Any) -> LatentSampler:
    """The sampler of a method of teacher-guided training; ``options`` replace its own."""
    mode = method.split("-")[1]
    chosen: dict[str, Any] = {
        "mode": mode,
        "sigma": settings.prior_sigma if mode == "prior" else settings.sigma,
        "step_size": settings.step_size,
        "steps": settings.ascent_steps if mode == "gradient" else 1,
        "anchors": "batch" if mode == "prior" else settings.anchors,
        "temperature": settings.temperature,
        "seed": seed,
    }
    return LatentSampler(teacher, **{**chosen, **options})


def by_class(images: Images, settings: Settings) -> dict[str, Any]:
    """Options of a sampler that looks after the tail: rare classes are anchors more often, and explored further."""
    counts = images.y.bincount(minlength=CLASSES).clamp(min=1).double()
    rarity = 1 - counts.log() / counts.log().max().clamp(min=1e-9)  # 0 for the most frequent, 1 for a single image
    return {
        "anchors": counts**-settings.tail_weight,
        "sigma": settings.sigma * (1 + settings.tail_sigma * rarity),
    }


def objective(
    method: str, teacher: Teacher, images: Images, settings: Settings, seed: int, cache: TeacherCache
) -> Objective:
    """The loss that a method minimises."""
    if method == "one-hot":
        return OneHot()
    loss = DistillationLoss(temperature=settings.temperature_of(method), hard_weight=1.0)
    real = TGTObjective(teacher, None, loss=loss, cache=cache)
    if method == "distillation":
        return real
    augmentation = settings.mixup if method == "distillation-mixup" else settings.augmentation
    draw = Balanced(images, seed) if method in settings.balanced else None
    augmented = Augmented(teacher, augmentation, real, images, draw, seed)
    if method in BASELINES:
        return augmented
    options = by_class(images, settings) if method.endswith("-tail") else {}
    explorer = sampler(method, teacher, settings, seed, **options)
    if explorer.options.mode != "prior":
        explorer.calibrate([(images.x, images.y)], progress=False)
    served: LatentSampler | SyntheticReplay = explorer
    if method.endswith(("-replay", "-augmented")):
        served = SyntheticReplay(
            explorer, reuse=settings.reuse, select="disagreement", candidates=settings.candidates, seed=seed
        )
    guided = TGTObjective(teacher, served, loss=loss, cache=cache)
    return InTurn(augmented, guided) if method.endswith("-augmented") else guided


def train_student(
    method: str,
    teacher: Teacher,
    images: Images,
    test: Images,
    theirs: Tensor,
    counts: Sequence[int],
    settings: Settings,
    seed: int,
) -> StudentResult:
    """Train on ``images`` (``counts`` a class), measure on ``test``, of which the labeler says ``theirs``.

    The test accuracies along the way are for the learning curve alone: the student that is measured is that of
    the last step, whatever they say.
    """
    torch.manual_seed(seed)
    student = models.student()
    alone = method in ALONE
    drawn = BalancedBatches if alone and method in settings.balanced else Batches
    loader = drawn(images, settings.real * (2 if alone else 1), settings.steps, seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=settings.rate_of(method), fused=True)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(folder, teacher, k=None, latents=True, version="glyphs")
        try:
            result = fit(
                student,
                objective(method, teacher, images, settings, seed, cache),
                loader,
                steps=settings.steps,
                optimizer=optimizer,
                scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(settings.steps)),
                evaluate=accuracy_on(test),
                eval_every=max(1, settings.steps // settings.evaluations),
                seed=seed,
                progress=False,
            )
        finally:
            cache.close()
    seconds = time.process_time() - started
    curve = tuple((int(record["step"]), record["accuracy"]) for record in result.history)
    return measured(method, seed, student, theirs, len(images), test, counts, seconds, curve)
