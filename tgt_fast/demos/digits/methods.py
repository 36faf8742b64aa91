"""Training the student, one method at a time. Every method shows it the same number of examples a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tgt_fast.demos import networks
from tgt_fast.demos.digits import models
from tgt_fast.demos.digits.augment import Augmentation
from tgt_fast.demos.digits.data import Batches, Images
from tgt_fast.demos.digits.settings import Settings
from tgt_fast.demos.digits.teachers import cosine
from tgt_fast.demos.networks import Weights
from tgt_fast.errors import ArgumentError
from tgt_fast.explore import LatentSampler, SyntheticReplay
from tgt_fast.losses.distill import DistillationLoss
from tgt_fast.teacher import Teacher
from tgt_fast.train import TGTObjective, agreement, class_accuracy, class_thirds, fit, mean_kl

Objective = Callable[..., Mapping[str, Any]]


@dataclass(frozen=True)
class StudentResult:
    """One student on the test images. Accuracies in percent."""

    method: str
    seed: int
    labels: int  # labelled examples it was trained on
    accuracy: float
    head: float
    middle: float
    tail: float
    agreement: float
    mean_kl: float  # nats, at temperature 1
    seconds: float  # of training, on one core
    per_class: tuple[float, ...]
    curve: tuple[tuple[int, float], ...]  # (step, accuracy)
    weights: Weights


class OneHot:
    """Cross-entropy with the labels; the teacher has no say."""

    def __call__(self, student: nn.Module, x: Tensor, y: Tensor | None, /, **_: Any) -> dict[str, Tensor]:
        if y is None:
            raise ArgumentError("one-hot training needs labels")
        return {"loss": F.cross_entropy(student(x), y)}


class Augmented:
    """As ``TGTObjective``, with augmented images, labelled by the teacher, in the place of synthetic ones."""

    def __init__(self, teacher: Teacher, augmentation: Augmentation, loss: DistillationLoss, seed: int) -> None:
        self.teacher, self.augmentation, self.loss = teacher, augmentation, loss
        self.real = TGTObjective(teacher, None, loss=loss)
        self.generator = models.seeded(seed)

    def __call__(self, student: nn.Module, x: Tensor, y: Tensor | None, /, **_: Any) -> dict[str, Tensor]:
        made = self.augmentation(x, self.generator)
        soft = cast(Tensor, self.loss.soft(student(made), self.teacher.label(made)))
        return {"loss": self.real(student, x, y)["loss"] + soft}


def sampler(method: str, teacher: Teacher, settings: Settings, seed: int, **options: Any) -> LatentSampler:
    """The sampler of a method of teacher-guided training; ``options`` replace its own."""
    persistent = method == "tgt-persistent"
    chosen: dict[str, Any] = {
        "mode": method.removeprefix("tgt-"),
        "sigma": settings.prior_sigma if method == "tgt-prior" else settings.sigma,
        "step_size": settings.persistent_step_size if persistent else settings.step_size,
        "steps": settings.ascent_steps if method == "tgt-gradient" else 1,
        "radius": settings.persistent_radius if persistent else None,
        "restart_probability": settings.restart_probability,
        "anchors": settings.anchors if method in ("tgt-random", "tgt-gradient") else "batch",
        "temperature": settings.temperature,
        "seed": seed,
    }
    return LatentSampler(teacher, **{**chosen, **options})


def objective(
    method: str,
    teacher: Teacher,
    images: Images,
    settings: Settings,
    seed: int,
    replay: Mapping[str, Any] | None = None,
) -> Objective:
    """The loss that a method minimises; ``replay``: options of a :class:`tgt_fast.SyntheticReplay` of its examples."""
    loss = DistillationLoss(temperature=settings.temperature_of(method), hard_weight=1.0)
    if method == "one-hot":
        return OneHot()
    if method == "distillation":
        return TGTObjective(teacher, None, loss=loss)
    if method == "distillation-augmented":
        return Augmented(teacher, settings.augmentation, loss, seed)
    explorer = sampler(method, teacher, settings, seed)
    if method != "tgt-prior":
        explorer.calibrate([(images.x, images.y)])
    served = explorer if replay is None else SyntheticReplay(explorer, seed=seed, **replay)
    return TGTObjective(teacher, served, loss=loss)


def train_student(
    method: str,
    teacher: Teacher,
    images: Images,
    test: Images,
    counts: Sequence[int],
    settings: Settings,
    seed: int,
    replay: Mapping[str, Any] | None = None,
) -> StudentResult:
    """Train on ``images`` (``counts`` a class), measure on ``test``.

    The test accuracies along the way are for the learning curve alone: the student that is measured is that of
    the last step, whatever they say.
    """
    alone = method in ("one-hot", "distillation")
    torch.manual_seed(seed)
    student = models.student()
    # Fewer epochs, of many steps, because the evaluation and not the epoch is the unit of progress here.
    loader = Batches(images, settings.real * (2 if alone else 1), settings.steps, seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=settings.rate_of(method), fused=True)
    started = time.perf_counter()
    result = fit(
        student,
        objective(method, teacher, images, settings, seed, replay),
        loader,
        steps=settings.steps,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(settings.steps)),
        evaluate=accuracy_on(test),
        eval_every=max(1, settings.steps // settings.evaluations),
        seed=seed,
        progress=False,
    )
    seconds = time.perf_counter() - started
    curve = tuple((int(record["step"]), record["accuracy"]) for record in result.history)
    with torch.no_grad():
        theirs = teacher.label(test.x)
    return measured(method, seed, student, theirs, len(images), test, counts, seconds, curve)


def accuracy_on(test: Images) -> Callable[[nn.Module], dict[str, float]]:
    """What ``fit`` calls to evaluate: the accuracy in percent."""

    @torch.no_grad()
    def evaluate(student: nn.Module) -> dict[str, float]:
        return {"accuracy": 100 * (student(test.x).argmax(1) == test.y).float().mean().item()}

    return evaluate


@torch.no_grad()
def measured(
    method: str,
    seed: int,
    student: nn.Module,
    theirs: Tensor,
    labels: int,
    test: Images,
    counts: Sequence[int],
    seconds: float,
    curve: tuple[tuple[int, float], ...],
) -> StudentResult:
    """A student on the test images, beside the labeler, whose logits are ``theirs``."""
    logits = student.eval()(test.x)
    right = logits.argmax(1) == test.y

    def share(classes: Tensor | None = None) -> float:
        counted = right if classes is None else right[torch.isin(test.y, classes)]
        return 100 * float(counted.float().mean())

    head, middle, tail = class_thirds(counts)
    return StudentResult(
        method=method,
        seed=seed,
        labels=labels,
        accuracy=share(),
        head=share(head),
        middle=share(middle),
        tail=share(tail),
        agreement=100 * agreement(logits, theirs),
        mean_kl=mean_kl(logits, theirs),
        seconds=seconds,
        per_class=tuple(100 * value for value in class_accuracy(logits, test.y)),
        curve=curve,
        weights=networks.weights_of(student),
    )
