"""Perturb and ascend in Triton. Integers and numbers that live on the device are read there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tgt_fast.kernels.latent_calls import accumulate_dtype, on_device, samples, vector
from tgt_fast.kernels.options import OP_ASCEND
from tgt_fast.kernels.triton import kernels, launch, planning_device, running_on, two_floats
from tgt_fast.kernels.triton.tuning import LATENT_REGISTERS, Plan, latent_plan


def _signed(word: int) -> int:
    """A word of 32 bits as the signed number of the same bits: Triton takes every such number as an int32."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def noise_key(
    device: torch.device, seed: int | Tensor, sample_ids: Tensor, step: int | Tensor, replica: int, op: int
) -> tuple[Any, ...]:
    """The key as the kernels take it: ids, seed's place and halves, step's place, op and step, replica."""
    seed, step = on_device(device, seed), on_device(device, step)
    if isinstance(seed, Tensor):
        halves: tuple[Any, ...] = (seed, 0, 0)
    else:
        halves = (None, _signed(seed), _signed(seed >> 32))
    step_at, number = (step, 0) if isinstance(step, Tensor) else (None, step)
    return (sample_ids.contiguous(), *halves, step_at, _signed(op << 28 | number), _signed(int(replica) << 16))


def _factor(value: float | Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, float, float]:
    """One a sample, or the number for all."""
    if isinstance(value, Tensor):
        return vector(value, dtype), 0.0, 0.0
    return (None, *two_floats(0.0 if value is None else float(value)))


def _cut(z: Tensor, plan: Plan) -> tuple[int, int]:
    """(programs, tiles a sample)."""
    samples, size = z.shape
    tiles = -(-size // plan.block)
    return -(-samples // plan.rows) * tiles, tiles


def perturb(
    z: Tensor,  # [B, D]
    per_sample: float | Tensor,  # number or [B]
    per_coordinate: Tensor | None,  # [D]
    *,
    seed: int | Tensor,
    sample_ids: Tensor,  # [B] int64
    step: int | Tensor,
    replica: int,
    op: int,
    truncation: float | None,
    sphere_radius: float | str | None,
    plan: Plan | None = None,
) -> Tensor:
    """z + per_sample * per_coordinate * noise, optionally rescaled onto a sphere."""
    z = z.detach().contiguous()
    out = torch.empty_like(z)
    if z.numel() == 0:
        return out
    dtype = accumulate_dtype(z)
    sphere = "none" if sphere_radius is None else "keep" if sphere_radius == "keep" else "radius"
    radius = float(sphere_radius) if sphere == "radius" else 0.0  # type: ignore[arg-type]
    plan = plan or latent_plan(*z.shape, alone=sphere == "none", device=planning_device(z))
    programs, tiles = _cut(z, plan)
    phases = ("whole",) if tiles == 1 or sphere == "none" else ("measure", "write")
    before = after = None
    if len(phases) > 1:
        before, after = z.new_empty(2, tiles, z.shape[0], dtype=torch.float64)
    bound = truncation or 0.0
    scale = None if per_coordinate is None else vector(per_coordinate, dtype)
    sigma_at, *sigma = _factor(per_sample, dtype)
    arguments = (
        z, out, sigma_at, scale, before, after, *z.shape, tiles, *sigma, *two_floats(radius),
        *two_floats(bound), *two_floats(math.erf(bound / math.sqrt(2.0))),
        *noise_key(z.device, seed, sample_ids, step, replica, op),
    )  # fmt: skip
    with running_on(z):
        for phase in phases:
            launch(
                kernels().latent.latent_perturb_kernel, programs, *arguments, PHASE=phase, SPHERE=sphere,
                TRUNCATED=bound > 0, IS_FP64=dtype == torch.float64, ROWS=plan.rows, BLOCK=plan.block, warps=plan.warps,
                registers=LATENT_REGISTERS,
            )  # fmt: skip
    return out


def ascend(
    z: Tensor,  # [B, D]
    grad: Tensor,  # [B, D]
    *,
    step_size: float | Tensor,
    scale: Tensor | None,  # [D]
    anchor: Tensor | None,  # [B, D]
    radius: float | Tensor | None,
    norm: str,
    radius_norm: str,
    sigma: float | Tensor,
    seed: int | Tensor,
    sample_ids: Tensor,
    step: int | Tensor,
    replica: int,
    plan: Plan | None = None,
) -> Tensor:
    """One step up the gradient, its noise and its projection."""
    z, grad, anchor, unit, dtype = samples(z, grad, anchor, scale)
    out = torch.empty_like(z)
    if z.numel() == 0:
        return out
    plan = plan or latent_plan(*z.shape, alone=False, device=planning_device(z))
    programs, tiles = _cut(z, plan)
    phases: tuple[str, ...] = ("whole",)
    squares = distances = None
    if tiles > 1:
        phases = ("norm", "write") if anchor is None else ("norm", "distance", "write")
        squares, distances = z.new_empty(2, tiles, z.shape[0], dtype=torch.float64)
    noise = isinstance(sigma, Tensor) or sigma != 0
    arguments = (
        z, grad, anchor, unit, out, squares, distances, *z.shape, tiles, *_factor(step_size, dtype),
        *_factor(sigma, dtype), *_factor(radius, dtype),
        *noise_key(z.device, seed, sample_ids, step, replica, OP_ASCEND),
    )  # fmt: skip
    with running_on(z):
        for phase in phases:
            launch(
                kernels().latent.latent_ascend_kernel, programs, *arguments, PHASE=phase, NORM=norm,
                RADIUS_NORM=radius_norm, NOISE=noise, IS_FP64=dtype == torch.float64, ROWS=plan.rows, BLOCK=plan.block,
                warps=plan.warps,
                registers=LATENT_REGISTERS,
            )  # fmt: skip
    return out
