"""Perturb and ascend in Triton. Integers and numbers that live on the device are read there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tgt_fast.kernels.latent_calls import (
    AscendCall,
    LatentCall,
    PerturbCall,
    accumulate_dtype,
    on_device,
    prepared,
    vector,
)
from tgt_fast.kernels.philox import NoiseKey
from tgt_fast.kernels.triton import kernels, launch, planning_device, running_on, two_floats
from tgt_fast.kernels.triton.tuning import LATENT_REGISTERS, Plan, latent_plan


def _signed(word: int) -> int:
    """A word of 32 bits as the signed number of the same bits: Triton takes every such number as an int32."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def noise_values(device: torch.device, key: NoiseKey) -> tuple[Any, ...]:
    """The key as the kernels take it: ids, seed's place and halves, step's place, op and step, replica."""
    seed, step = on_device(device, key.seed), on_device(device, key.step)
    if isinstance(seed, Tensor):
        halves: tuple[Any, ...] = (seed, 0, 0)
    else:
        halves = (None, _signed(seed), _signed(seed >> 32))
    step_at, number = (step, 0) if isinstance(step, Tensor) else (None, step)
    ids, replica = key.sample_ids.contiguous(), int(key.replica)
    return (ids, *halves, step_at, _signed(key.op << 28 | number), _signed(replica << 16))


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


def forward(call: LatentCall, out: Tensor, *, plan: Plan | None = None) -> None:
    """The moved latents."""
    if not out.numel():
        return
    if isinstance(call, PerturbCall):
        _perturb(call, out, plan)
    else:
        _ascend(call, out, plan)


def _perturb(call: PerturbCall, out: Tensor, plan: Plan | None) -> None:
    z = call.z.detach().contiguous()
    dtype = accumulate_dtype(z)
    given = call.sphere_radius
    sphere = "none" if given is None else "keep" if given == "keep" else "radius"
    radius = float(given) if sphere == "radius" else 0.0  # type: ignore[arg-type]
    plan = plan or latent_plan(*z.shape, alone=sphere == "none", device=planning_device(z))
    programs, tiles = _cut(z, plan)
    phases = ("whole",) if tiles == 1 or sphere == "none" else ("measure", "write")
    before = after = None
    if len(phases) > 1:
        before, after = z.new_empty(2, tiles, z.shape[0], dtype=torch.float64)
    bound = call.noise.truncation or 0.0
    scale = None if call.scale is None else vector(call.scale, dtype)
    sigma_at, *sigma = _factor(call.sigma, dtype)
    arguments = (
        z, out, sigma_at, scale, before, after, *z.shape, tiles, *sigma, *two_floats(radius),
        *two_floats(bound), *two_floats(math.erf(bound / math.sqrt(2.0))), *noise_values(z.device, call.noise),
    )  # fmt: skip
    with running_on(z):
        for phase in phases:
            launch(
                kernels().latent.latent_perturb_kernel, programs, *arguments, PHASE=phase, SPHERE=sphere,
                TRUNCATED=bound > 0, IS_FP64=dtype == torch.float64, ROWS=plan.rows, BLOCK=plan.block, warps=plan.warps,
                registers=LATENT_REGISTERS,
            )  # fmt: skip


def _ascend(call: AscendCall, out: Tensor, plan: Plan | None) -> None:
    call, dtype = prepared(call)
    z, sigma = call.z, call.sigma
    plan = plan or latent_plan(*z.shape, alone=False, device=planning_device(z))
    programs, tiles = _cut(z, plan)
    phases: tuple[str, ...] = ("whole",)
    squares = distances = None
    if tiles > 1:
        phases = ("norm", "write") if call.anchor is None else ("norm", "distance", "write")
        squares, distances = z.new_empty(2, tiles, z.shape[0], dtype=torch.float64)
    arguments = (
        z, call.grad, call.anchor, call.scale, out, squares, distances, *z.shape, tiles,
        *_factor(call.step_size, dtype), *_factor(sigma, dtype), *_factor(call.radius, dtype),
        *noise_values(z.device, call.noise),
    )  # fmt: skip
    with running_on(z):
        for phase in phases:
            launch(
                kernels().latent.latent_ascend_kernel, programs, *arguments, PHASE=phase, NORM=call.norm,
                RADIUS_NORM=call.radius_norm, NOISE=isinstance(sigma, Tensor) or sigma != 0,
                IS_FP64=dtype == torch.float64, ROWS=plan.rows, BLOCK=plan.block, warps=plan.warps,
                registers=LATENT_REGISTERS,
            )  # fmt: skip
