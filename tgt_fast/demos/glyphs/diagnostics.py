"""Quantities that the student's risk depends on in theory, measured for each source of examples, and pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgt_fast.demos import networks
from tgt_fast.demos.digits.data import Images
from tgt_fast.demos.digits.models import seeded
from tgt_fast.demos.glyphs import models
from tgt_fast.demos.glyphs.methods import sampler
from tgt_fast.demos.glyphs.settings import Settings
from tgt_fast.demos.networks import Weights
from tgt_fast.losses.distill import DistillationLoss
from tgt_fast.teacher import Teacher
from tgt_fast.train.diagnostics import SourceRow, measured

SAMPLES = 512
SHOWN = 12  # classes in the grid, evenly spread from the frequent to the rare
MODES = ("tgt-prior", "tgt-random", "tgt-gradient")


@dataclass(frozen=True)
class Picture:
    """One image and what the labeler makes of it."""

    pixels: npt.NDArray[np.float32]  # [28, 28]
    opinion: int
    confidence: float


@dataclass(frozen=True)
class Diagnostics:
    """Of one seed."""

    seed: int
    sources: tuple[SourceRow, ...]
    shown: tuple[int, ...]  # the classes of the grid
    grid: dict[str, tuple[Picture, ...]]  # source -> one picture a class shown


def diagnose(
    teacher: Teacher, images: Images, test: Images, student: Weights, settings: Settings, seed: int
) -> Diagnostics:
    """Measure the sources of one seed with a student of plain distillation, given by its weights."""
    watcher = networks.with_weights(models.student(), student).eval()
    picked = torch.randperm(len(test), generator=seeded(seed))[:SAMPLES]
    held = test.take(picked)
    x = images.x.repeat(-(-SAMPLES // len(images)), 1, 1, 1)[:SAMPLES]
    sources: dict[str, tuple[Tensor, Tensor | None]] = {
        "real, test": (held.x, held.y),
        "real, labelled": (images.x, images.y),
    }
    with torch.no_grad():
        sources["reconstruction"] = (teacher.decode(teacher.encode(images.x)), None)
    sources["augmented"] = (settings.augmentation(x, seeded(seed)), None)
    for method in MODES:
        explorer = sampler(method, teacher, settings, seed).calibrate([(images.x, images.y)], progress=False)
        sources[method.removeprefix("tgt-")] = (explorer(x, student=watcher).x, None)
    loss = DistillationLoss(temperature=settings.temperature, reduction="none")
    rows = tuple(
        measured(name, made, labels, teacher, watcher, held.x, loss) for name, (made, labels) in sources.items()
    )
    return Diagnostics(seed, rows, *_grid(teacher, images, watcher, settings, seed))


@torch.no_grad()
def _grid(
    teacher: Teacher, images: Images, student: torch.nn.Module, settings: Settings, seed: int
) -> tuple[tuple[int, ...], dict[str, tuple[Picture, ...]]]:
    """One labelled image of some classes, and what becomes of it. Noise depends on the id: both modes start alike."""
    there = sorted(set(images.y.tolist()))
    shown = tuple(there[round(step * (len(there) - 1) / (SHOWN - 1))] for step in range(SHOWN))
    rows = torch.stack([(images.y == c).nonzero()[0, 0] for c in shown])
    x = images.x[rows]
    made = {"real": x, "reconstruction": teacher.decode(teacher.encode(x))}
    for method in ("tgt-random", "tgt-gradient"):
        explorer = sampler(method, teacher, settings, seed, anchors="batch").calibrate([images.x], progress=False)
        with torch.enable_grad():
            made[method.removeprefix("tgt-")] = explorer(x, student=student, sample_ids=rows).x
    return shown, {name: _pictures(teacher, pixels) for name, pixels in made.items()}


def _pictures(teacher: Teacher, x: Tensor) -> tuple[Picture, ...]:
    confidence, opinion = teacher.label(x).softmax(1).max(1)
    tiles = list(x[:, 0].detach().numpy())
    return tuple(
        Picture(tile, int(o), float(c)) for tile, o, c in zip(tiles, opinion.tolist(), confidence.tolist(), strict=True)
    )
