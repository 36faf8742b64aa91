"""What the theory says the student's risk depends on, measured for each source of examples."""

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
from tgt_fast.errors import ShapeError
from tgt_fast.losses.distill import DistillationLoss
from tgt_fast.teacher import Teacher
from tgt_fast.train import agreement, mean_kl

ASCENT_STEPS = 8
ASCENT_STEP_SIZE = 0.5
SAMPLES = 1024


@dataclass(frozen=True)
class SourceRow:
    """One source of examples, measured with the student of plain distillation."""

    source: str
    reconstruction_error: float  # root mean square over pixels of Dec(Enc(x)) - x
    wasserstein: float  # sliced, to the test images
    loss_mean: float  # of l_d
    loss_variance: float
    agreement: float  # of student and labeler, percent
    mean_kl: float
    labeler_error: float | None  # percent, where the true label is known


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


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 256, seed: int = 0) -> float:
    r"""``mean over unit vectors v of W_1(a @ v, b @ v)``, between two sets of points.

    Args:
        a, b: [N, D] and [M, D], N and M of any size >= 1.
        directions: how many random vectors.

    Returns:
        A float >= 0, in the units of the points; 0 for equal sets.

    Raises:
        ShapeError: points of different dimensions.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ShapeError(f"sliced_wasserstein: {tuple(a.shape)} and {tuple(b.shape)} are not points of one space")
    v = torch.randn(a.shape[1], directions, generator=models.seeded(seed), dtype=torch.float64)
    v = v / v.norm(dim=0)
    left, right = ((points.double() @ v).sort(0).values for points in (a, b))
    # W_1 on a line is the area between the two quantile functions, which are constant between these levels.
    n, m = len(left), len(right)
    levels = torch.cat([torch.arange(1, n + 1) / n, torch.arange(1, m + 1) / m]).double().sort().values
    widths = torch.diff(levels, prepend=torch.zeros(1, dtype=torch.float64))
    inner = levels - widths / 2
    gaps = left[(inner * n).long().clamp(max=n - 1)] - right[(inner * m).long().clamp(max=m - 1)]
    return float((gaps.abs() * widths[:, None]).sum(0).mean())


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
    rows = tuple(
        _measured(name, made, labels, teacher, watcher, test, settings) for name, (made, labels) in sources.items()
    )
    ascent = {method: _ascent(teacher, images, weights, settings, seed) for method, weights in students.items()}
    return Diagnostics(seed, rows, ascent, _grid(teacher, images, watcher, settings, seed))


@torch.no_grad()
def _measured(
    name: str,
    x: Tensor,
    y: Tensor | None,
    teacher: Teacher,
    student: torch.nn.Module,
    test: Images,
    settings: Settings,
) -> SourceRow:
    ours, theirs = student(x), teacher.label(x)
    loss = DistillationLoss(temperature=settings.temperature, reduction="none").soft(ours, theirs)
    values = loss if isinstance(loss, Tensor) else loss[0]
    again = teacher.decode(teacher.encode(x))
    return SourceRow(
        source=name,
        reconstruction_error=(again - x).square().mean().sqrt().item(),
        wasserstein=sliced_wasserstein(x, test.x),
        loss_mean=values.mean().item(),
        loss_variance=values.var().item(),
        agreement=100 * agreement(ours, theirs),
        mean_kl=mean_kl(ours, theirs),
        labeler_error=None if y is None else 100 * (theirs.argmax(1) != y).float().mean().item(),
    )


def _ascent(teacher: Teacher, images: Images, weights: Weights, settings: Settings, seed: int) -> tuple[float, ...]:
    """The disagreement of a trained student along a climb in small steps from the labelled images."""
    climber = sampler(
        "tgt-gradient", teacher, settings, seed, steps=ASCENT_STEPS, step_size=ASCENT_STEP_SIZE, anchors="batch",
        record_disagreement=True,
    ).calibrate([images.x])  # fmt: skip
    climber(images.x, student=networks.with_weights(models.student(), weights).eval())
    return tuple(climber.last_disagreement)


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
