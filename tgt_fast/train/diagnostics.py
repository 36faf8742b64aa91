"""Quantities that the student's risk depends on in theory, measured for each source of examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tgt_fast.errors import ShapeError
from tgt_fast.explore import LatentSampler, SyntheticReplay
from tgt_fast.explore.by_class import label_argument
from tgt_fast.explore.student import student_logits
from tgt_fast.explore.twin import twin
from tgt_fast.losses.distill import DistillationLoss
from tgt_fast.teacher import Teacher, tree
from tgt_fast.teacher.returned import LogitsOf
from tgt_fast.train.metrics import agreement, mean_kl

MEANING = (
    "The theory's bound on the student's excess risk grows with the reconstruction error, with the Wasserstein "
    "distance between real and synthetic examples, with the variance of the loss on synthetic examples, and with the "
    "labeler's own error. All of it can be measured."
)


@dataclass(frozen=True)
class SourceRow:
    """One source of examples, measured with a student. None: not defined for such examples."""

    source: str
    reconstruction_error: float | None  # of Dec(Enc(x)) and x: root mean square, or the share of tokens that differ
    wasserstein: float | None  # sliced, to the examples of reference
    loss_mean: float  # of l_d
    loss_variance: float
    agreement: float  # of student and labeler, percent
    mean_kl: float
    labeler_error: float | None  # percent, where the true label is known


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
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(a.shape[1], directions, generator=generator, dtype=torch.float64, device="cpu")
    v = v / v.norm(dim=0)
    left, right = ((points.double().cpu() @ v).sort(0).values for points in (a, b))
    # W_1 on a line is the area between the two quantile functions, which are constant between these levels.
    n, m = len(left), len(right)
    levels = torch.cat([torch.arange(1, n + 1) / n, torch.arange(1, m + 1) / m]).double().sort().values
    widths = torch.diff(levels, prepend=torch.zeros(1, dtype=torch.float64))
    inner = levels - widths / 2
    gaps = left[(inner * n).long().clamp(max=n - 1)] - right[(inner * m).long().clamp(max=m - 1)]
    return float((gaps.abs() * widths[:, None]).sum(0).mean())


@torch.no_grad()
def measured(
    source: str,
    x: Any,
    y: Tensor | None,
    teacher: Teacher,
    student: nn.Module,
    reference: Any,
    loss: DistillationLoss,
    logits_of: LogitsOf = None,
) -> SourceRow:
    """One source's examples ``x``, with labels where they are known, beside real ones to compare with.

    Args:
        student: in eval mode.
        loss: its soft term is l_d; with reduction "none".
        logits_of: where they are in what the student returns.
    """
    ours = student_logits("report", student, teacher.student_view(x), logits_of)
    theirs = teacher.label(x)
    found = loss.soft(ours, theirs)
    values = (found if isinstance(found, Tensor) else found[0]).double()
    points, others = _points(x), _points(reference)
    comparable = points is not None and others is not None and points.shape[1] == others.shape[1]
    known = None if y is None or y.shape != theirs.shape[:-1] else y >= 0
    return SourceRow(
        source=source,
        reconstruction_error=_reconstruction_error(teacher, x),
        wasserstein=sliced_wasserstein(cast(Tensor, points), cast(Tensor, others)) if comparable else None,
        loss_mean=values.mean().item(),
        loss_variance=values.var().item() if values.numel() > 1 else 0.0,
        agreement=100 * agreement(ours, theirs),
        mean_kl=mean_kl(ours, theirs),
        labeler_error=None
        if known is None or y is None or not bool(known.any())
        else 100 * (theirs.argmax(-1) != y)[known].float().mean().item(),
    )


def _points(x: Any) -> Tensor | None:
    """[B, D] of examples that are vectors of numbers."""
    if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1:
        return x.flatten(1)
    return None


def _reconstruction_error(teacher: Teacher, x: Any) -> float | None:
    again = teacher.decode(teacher.encode(x))
    changes: Any = getattr(teacher, "changes", None)  # of texts
    if changes is not None:
        return float(changes(x, again)["tokens"])
    pairs = [(a, b) for a, b in zip(tree.batched_leaves(x), tree.batched_leaves(again), strict=False)]
    if len(pairs) != 1 or pairs[0][0].shape != pairs[0][1].shape:
        return None
    before, after = pairs[0]
    if before.is_floating_point() and after.is_floating_point():
        return (after - before).square().mean().sqrt().item()
    return (after != before).double().mean().item()


def ascent(
    sampler: LatentSampler | SyntheticReplay,
    student: nn.Module,
    x: Any,
    y: Tensor | None = None,
    *,
    steps: int,
    step_size: float,
) -> tuple[float, ...]:
    """The mean disagreement of student and labeler before each of so many steps up it, and after the last.

    From the examples x, of classes y, plus the sampler's noise, whatever its mode; the sampler itself is left as it is.
    """
    climber = twin(
        sampler, mode="gradient", steps=steps, step_size=step_size, radius=None, anchors="batch", replicas=1,
        norm="l2", record_disagreement=True,
    )  # fmt: skip
    if climber.options.needs_scale and climber.scale is None:
        climber.calibrate([x], progress=False)
    climber(x, student=student, **label_argument(climber, y, tree.batch_size(x), tree.first_device(x)))
    return tuple(value if math.isfinite(value) else math.nan for value in climber.last_disagreement)
