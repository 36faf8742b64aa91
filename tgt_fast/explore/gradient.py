"""Gradient exploration: climb the disagreement of student and labeler, through both, from each anchor.

Both are in eval mode, in which cuDNN has no backward pass for recurrent networks: see :class:`LatentSampler`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tgt_fast._ranges import named_range
from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.explore.channels import channel_noise, channel_slope, channel_step, moved
from tgt_fast.explore.draws import over_coordinates
from tgt_fast.explore.guard import preserve_student, unwrapped
from tgt_fast.explore.options import SamplerOptions
from tgt_fast.explore.scores import scored
from tgt_fast.explore.student import refuse_labeler, student_logits
from tgt_fast.ops.distill import distillation_loss
from tgt_fast.ops.latent import ascend_latents
from tgt_fast.teacher import Latents, Teacher, tree
from tgt_fast.teacher.key import Key
from tgt_fast.teacher.teacher import checked_logits

Student = Callable[..., Any]


def checked_student(teacher: Teacher, student: Student | None) -> Student:
    """The student, if there is one and it is not the teacher's own labeler.

    Raises:
        ArgumentError: no student; the student is the labeler; inference mode, under which nothing is
            differentiable.
    """
    if student is None:
        raise ArgumentError("LatentSampler: gradient mode climbs the student's disagreement: pass student=")
    if not callable(student):
        raise ArgumentError(f"LatentSampler: student must be callable, got {type(student).__name__}")
    student = unwrapped(student)
    refuse_labeler("LatentSampler", teacher, student)
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        raise ArgumentError("LatentSampler: gradient mode needs gradients, which torch.inference_mode() forbids")
    return student


def ascend(
    teacher: Teacher,
    student: Student,
    start: Latents,
    anchors: Latents,
    scale: Tensor | None,
    key: Key,
    options: SamplerOptions,
) -> tuple[Latents, list[float]]:
    """``options.steps`` steps up the disagreement of student and labeler, kept near the anchors.

    Returns the latents reached and, where ``record_disagreement`` asks for it, the mean disagreement before
    each step and at the end (steps + 1 numbers; one more pass of decoder, labeler and student).
    """
    values: list[Tensor] = []
    with preserve_student(student):
        latents = ascent_steps(teacher, student, start, anchors, scale, key, options, values)
        if not options.record_disagreement:
            return latents, []
        with torch.no_grad():
            pieces = tree.chunks((latents, key), teacher.max_batch)
            last = [_disagreement(teacher, student, *piece, options) for piece in pieces]
    return latents, [value.mean().item() for value in (*values, torch.cat(last))]


def ascent_steps(
    teacher: Teacher,
    student: Student,
    start: Latents,
    anchors: Latents,
    scale: Tensor | None,
    key: Key,
    options: SamplerOptions,
    values: list[Tensor] | None = None,
) -> Latents:
    """The steps of :func:`ascend`, for a student in eval mode; appends the disagreement before each to ``values``."""
    latents, key = start, key.on(start.z.device)
    move = channel_noise(anchors, key, options) if options.affine else None  # that of ``start``
    for number in range(options.steps):
        parts = [
            disagreement_grad(teacher, student, *piece, options)
            for piece in tree.chunks((latents, key), teacher.max_batch)
        ]
        value, slope = (torch.cat(column) for column in zip(*parts, strict=True))
        if values is not None:
            values.append(value)
        with named_range("ascend"):
            if move is None:
                latents = ascent_step(latents, slope, anchors, scale, key, options, number=number)
            else:
                move = channel_step(move, channel_slope(slope, anchors, scale), key, options, number)
                latents = moved(anchors, move, scale)
    return latents


def disagreement_grad(
    teacher: Teacher, student: Student, latents: Latents, key: Key, options: SamplerOptions
) -> tuple[Tensor, Tensor]:
    """The disagreement of each sample, [B], and its gradient in z."""
    if torch.compiler.is_compiling():
        return _slope_traced(teacher, student, latents, key, options)
    with named_range("slope"), torch.enable_grad():
        z = latents.z.detach().requires_grad_()
        value = _disagreement(teacher, student, latents.at_real(z), key, options)
        slope: Tensor | None = None
        if value.requires_grad:
            # With respect to z alone: no parameter gradient is computed, none accumulated.
            (slope,) = torch.autograd.grad(value.sum(), z, allow_unused=True)
    if slope is None:
        raise ArgumentError(
            "LatentSampler: no gradient reaches the latents: the decoder, or both student and labeler, cut the graph"
        )
    return value.detach(), slope


def _slope_traced(
    teacher: Teacher, student: Student, latents: Latents, key: Key, options: SamplerOptions
) -> tuple[Tensor, Tensor]:
    """The same for a compiler, which does not look into ``torch.autograd.grad``."""

    def total(z: Tensor) -> tuple[Tensor, Tensor]:
        value = _disagreement(teacher, student, latents.at_real(z), key, options)
        return value.sum(), value

    with torch.no_grad():  # outside of the gradient in z: the parameters are constants
        slope, (_, value) = torch.func.grad_and_value(total, has_aux=True)(latents.z.detach())
    return value, slope


def _disagreement(teacher: Teacher, student: Student, latents: Latents, key: Key, options: SamplerOptions) -> Tensor:
    x = teacher.decode(latents, relaxed=True, key=key)
    opinions = teacher.opinions(x)
    with named_range("student"):
        view = teacher.student_view(x)
        ours = student_logits("LatentSampler", student, view, options.logits_of, teacher.class_dim)
    ours = checked_logits(ours, latents.z.shape[0], "student")
    parts = [divergence_of_each(ours, *opinion, options) for opinion in opinions]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def divergence_of_each(
    ours: Tensor, theirs: Tensor, weight: float | Tensor | None, known: Tensor | None, options: SamplerOptions
) -> Tensor:
    """The disagreement with one opinion, or what ``options.score`` says of it, [B]."""
    if ours.shape[-1] != theirs.shape[-1]:
        raise ShapeError(f"LatentSampler: the student has {ours.shape[-1]} classes, the labeler {theirs.shape[-1]}")
    ours = ours if known is None else ours.masked_fill(~known, -math.inf)
    if options.score is not None:
        return _weighted(scored("LatentSampler", options.score, ours, theirs), weight)
    loss = distillation_loss(
        ours,
        theirs,
        divergence=options.divergence,
        beta=options.beta,
        temperature=options.temperature,
        reduction="none",
        backend=options.backend,
    )
    return _weighted(loss.flatten(1).sum(1) if loss.ndim > 1 else loss, weight)


def _weighted(loss: Tensor, weight: float | Tensor | None) -> Tensor:
    if weight is None:
        return loss
    # A teacher may have nothing to say of a sample that another one labels.
    return weight * (loss if not isinstance(weight, Tensor) else torch.where(weight > 0, loss, 0.0))


def ascent_step(
    latents: Latents,
    slope: Tensor,
    anchors: Latents | None,
    scale: Tensor | None,
    key: Key,
    options: SamplerOptions,
    *,
    number: int = 0,
) -> Latents:
    """One ascent step with optional noise and trust region, at the real positions only.

    ``number`` tells the steps of one call apart in the noise: its step is ``step * steps + number``.
    """
    key = key.on(latents.z.device)
    real = latents.real
    slope = slope if real is None else torch.where(real, slope, 0.0)
    anchor = None if anchors is None else anchors.z
    radius = options.radius
    common: dict[str, Any] = {
        "radius_norm": options.ball,
        "scale": None if scale is None else over_coordinates(scale, latents.z),
        "sample_ids": key.ids,
        "seed": key.seed,
        "step": key.step * options.steps + number if options.step_noise > 0 else key.step,
        "replica": key.replica,
        "backend": options.backend,
    }
    # Masked positions get noise too and would count in the distance to the anchor: project in a second call.
    apart = latents.mask is not None and options.step_noise > 0 and radius is not None
    moved = latents.at_real(
        ascend_latents(
            latents.z,
            slope,
            step_size=options.step_size,
            norm=options.norm,
            sigma=options.step_noise,
            anchor=None if apart or radius is None else anchor,
            radius=None if apart else radius,
            **common,
        )
    )
    if apart:
        still = torch.zeros_like(moved.z)
        moved = moved.at_real(ascend_latents(moved.z, still, step_size=0.0, anchor=anchor, radius=radius, **common))
    return moved
