"""Quantities that the student's risk depends on in theory, measured for each source of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgt_fast.demos import networks
from tgt_fast.demos.digits import models
from tgt_fast.demos.digits.data import CLASSES, SIDE, Images
from tgt_fast.demos.digits.methods import sampler
from tgt_fast.demos.digits.settings import Settings
from tgt_fast.demos.networks import Weights
from tgt_fast.losses.distill import DistillationLoss
from tgt_fast.teacher import Teacher
from tgt_fast.train.diagnostics import SourceRow, ascent, measured, sliced_wasserstein

__all__ = ["Diagnostics", "SourceRow", "diagnose", "sliced_wasserstein"]

ASCENT_STEPS = 8
ASCENT_STEP_SIZE = 0.5
SAMPLES = 1024


@dataclass(frozen=True)
class Picture:
    """One 8x8 image and what the labeler makes of it."""

    pixels: npt.NDArray[np.float32]  # [8, 8]
    opinion: int
    confidence: float


@dataclass(frozen=True)
class Diagnostics:
    """Of one seed."""

    seed: int
    sources: tuple[SourceRow, ...]
    ascent: dict[str, tuple[float, ...]]  # student -> mean disagreement before each step and after the last
    grid: dict[str, tuple[Picture, ...]]  # source -> one picture a class


def diagnose(
    teacher: Teacher,
    images: Images,
    test: Images,
    students: Mapping[str, Weights],
    settings: Settings,
    seed: int,
) -> Diagnostics:
    """Measure the sources of one seed. ``students``: weights by method, "distillation" among them."""
    watcher = networks.with_weights(models.student(), students["distillation"]).eval()
    repeats = -(-SAMPLES // len(images))
    x = images.x.repeat(repeats, 1)[:SAMPLES]
    sources: dict[str, tuple[Tensor, Tensor | None]] = {
        "real, test": (test.x, test.y),
        "real, labelled": (images.x, images.y),
    }
    with torch.no_grad():
        sources["reconstruction"] = (teacher.decode(teacher.encode(images.x)), None)
    sources["augmented"] = (settings.augmentation(x, models.seeded(seed)), None)
    for method in ("tgt-prior", "tgt-random", "tgt-gradient"):
        explorer = sampler(method, teacher, settings, seed).calibrate([(images.x, images.y)])
        sources[method.removeprefix("tgt-")] = (explorer(x, student=watcher).x, None)
    loss = DistillationLoss(temperature=settings.temperature, reduction="none")
    rows = tuple(
        measured(name, made, labels, teacher, watcher, test.x, loss) for name, (made, labels) in sources.items()
    )
    paths = {method: _ascent(teacher, images, weights, settings, seed) for method, weights in students.items()}
    return Diagnostics(seed, rows, paths, _grid(teacher, images, watcher, settings, seed))


def _ascent(teacher: Teacher, images: Images, weights: Weights, settings: Settings, seed: int) -> tuple[float, ...]:
    """The disagreement of a trained student along a climb in small steps from the labelled images."""
    climber = sampler("tgt-gradient", teacher, settings, seed, anchors="batch").calibrate([images.x])
    student = networks.with_weights(models.student(), weights).eval()
    return ascent(climber, student, images.x, steps=ASCENT_STEPS, step_size=ASCENT_STEP_SIZE)


@torch.no_grad()
def _grid(
    teacher: Teacher, images: Images, student: torch.nn.Module, settings: Settings, seed: int
) -> dict[str, tuple[Picture, ...]]:
    """One labelled image of each class, and what becomes of it. Noise depends on the id, so both modes start alike."""
    rows = torch.stack([(images.y == c).nonzero()[0, 0] for c in range(CLASSES)])
    x = images.x[rows]
    made = {"real": x, "reconstruction": teacher.decode(teacher.encode(x))}
    for method in ("tgt-random", "tgt-gradient"):
        explorer = sampler(method, teacher, settings, seed, anchors="batch").calibrate([images.x])
        with torch.enable_grad():
            made[method.removeprefix("tgt-")] = explorer(x, student=student, sample_ids=rows).x
    return {name: _pictures(teacher, pixels) for name, pixels in made.items()}


def _pictures(teacher: Teacher, x: Tensor) -> tuple[Picture, ...]:
    confidence, opinion = teacher.label(x).softmax(1).max(1)
    tiles: Sequence[npt.NDArray[np.float32]] = list(x.view(-1, SIDE, SIDE).numpy())
    return tuple(
        Picture(tile, int(o), float(c)) for tile, o, c in zip(tiles, opinion.tolist(), confidence.tolist(), strict=True)
    )
