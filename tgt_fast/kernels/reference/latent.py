"""The meaning of the latent ops: counter-based noise, perturbation, and one ascent step, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tgt_fast.kernels.latent_calls import LatentCall, PerturbCall
from tgt_fast.kernels.options import OP_ASCEND, OP_PERTURB
from tgt_fast.kernels.philox import philox_words

__all__ = ["ascend", "forward", "perturb", "standard_normal", "value"]


def standard_normal(
    seed: int | Tensor,
    sample_ids: Tensor,
    count: int,
    *,
    step: int | Tensor = 0,
    replica: int | Tensor = 0,
    op: int = OP_PERTURB,
    truncation: float | None = None,
) -> Tensor:
    """``count`` standard normal numbers a sample, a function of (seed, id, step, replica, op) alone.

    Box-Muller on Philox words: with u = (x_even + 0.5) / 2^32 and angle = 2 pi x_odd / 2^32, a pair of
    numbers is sqrt(-2 ln u) * (cos angle, sin angle). Truncated to [-c, c] it is the exact truncated normal,
    by inversion, a word a number.

    Args:
        seed: 64 bits, an int or a 0-d int64 tensor.
        sample_ids: [B] int64, 0 <= id < 2^48; a replica of the sample's own may stand above it, in bits 48 to 63.
        count: numbers a sample.
        step: 0 <= step < 2^28, an int or a 0-d int64 tensor.
        replica: 0 <= replica < 2^16.
        op: one of the OP_ codes of ``tgt_fast.kernels.options``.
        truncation: c, above 0, or None.

    Returns:
        [B, count] float32.
    """
    words = philox_words(seed, sample_ids, (count + 3) // 4, step, replica, op).to(torch.float64)
    uniform = (words + 0.5) * 2.0**-32
    if truncation is None:
        # Rounded to float32, as every backend computes it: near 1 the logarithm would magnify the difference.
        rounded = uniform[..., 0::2].to(torch.float32).to(torch.float64)
        radius = torch.sqrt(-2.0 * torch.log(rounded))
        angle = words[..., 1::2] * (2.0 * math.pi * 2.0**-32)
        normal = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    else:
        mass = math.erf(truncation / math.sqrt(2.0))
        normal = math.sqrt(2.0) * torch.erfinv((2.0 * uniform - 1.0) * mass)
        normal = normal.clamp(-truncation, truncation)
    return normal.flatten(start_dim=1)[:, :count].to(torch.float32)


def perturb(
    z: Tensor,  # [B, D]
    sigma: Tensor | float,  # broadcastable to [B, D]
    scale: Tensor | None = None,  # [D]
    *,
    seed: int | Tensor,
    sample_ids: Tensor,  # [B] int64
    step: int | Tensor,
    replica: int | Tensor,
    truncation: float | None,
    sphere_radius: float | str | None,  # a radius, "keep" for ||z||, or None
    op: int = OP_PERTURB,
) -> Tensor:
    """z + sigma * scale * noise, then, if asked for, out * (R / ||out||) with R = ``sphere_radius`` or ||z||.

    Float64 inside, cast back to z's dtype; differentiable in z. A sample that lands on 0 has no direction and
    stays.
    """
    noise = standard_normal(seed, sample_ids, z.shape[1], step=step, replica=replica, op=op, truncation=truncation)
    origin = z.to(torch.float64)
    out = origin + sigma * (noise.to(torch.float64) if scale is None else scale * noise.to(torch.float64))
    if sphere_radius is not None:
        norm = torch.linalg.vector_norm(out, dim=-1, keepdim=True)
        if isinstance(sphere_radius, str):
            radius: float | Tensor = torch.linalg.vector_norm(origin, dim=-1, keepdim=True)
        else:
            radius = sphere_radius
        out = torch.where(norm > 0, out * (radius / torch.where(norm > 0, norm, 1.0)), out)
    return out.to(z.dtype)


def _norm(rows: Tensor) -> Tensor:
    """||rows||_2 along the last axis, [B, D] -> [B, 1], scaled so that no square under- or overflows."""
    peak = rows.abs().amax(dim=-1, keepdim=True)
    divisor = torch.where((peak > 0) & peak.isfinite(), peak, 1.0)
    scaled: Tensor = torch.linalg.vector_norm(rows / divisor, dim=-1, keepdim=True)
    return divisor * scaled


def _project(
    z: Tensor, anchor: Tensor, scale: Tensor, radius: float | Tensor, radius_norm: str
) -> Tensor:  # all [B, D]
    """The nearest point along the line to the anchor inside the ball, measured in units of ``scale``.

    What is inside already is returned as it is: a trip to the anchor and back would round it.
    """
    offset = torch.where(scale == 0, 0.0, (z - anchor) / torch.where(scale == 0, 1.0, scale))
    if radius_norm == "l2":
        norm = _norm(offset)
        outside = norm > radius
        inner = offset * (radius / torch.where(outside, norm, 1.0))
    else:
        outside = offset.abs() > radius
        inner = torch.sign(offset) * radius
    return torch.where(scale == 0, anchor, torch.where(outside, anchor + scale * inner, z))


def ascend(
    z: Tensor,  # [B, D]
    grad: Tensor,  # [B, D]
    *,
    step_size: float | Tensor,  # a number or [B, 1]
    scale: Tensor | None,  # broadcastable to [B, D]
    anchor: Tensor | None,  # [B, D]; None: z itself
    radius: float | Tensor | None,  # a number or [B, 1]
    norm: str,
    radius_norm: str,
    sigma: float | Tensor,
    seed: int | Tensor,
    sample_ids: Tensor,  # [B] int64
    step: int | Tensor,
    replica: int | Tensor,
) -> Tensor:
    """z + step_size * scale * direction(scale * grad) + sigma * scale * noise, then into the trust region.

    direction(u) = u / ||u||_2 ("l2"), sign(u) ("linf") or u ("raw"); 0 for a sample whose ||u||_2 is 0 or not
    finite. The region is ||(z' - anchor) / scale|| <= radius in ``radius_norm``; coordinates of scale 0 stay
    at the anchor.
    Float64 inside, cast back to z's dtype.
    """
    if z.numel() == 0:
        return z.clone()
    start = z.to(torch.float64)
    unit = torch.ones((), dtype=torch.float64, device=z.device) if scale is None else scale.to(torch.float64)
    u = unit * grad.to(torch.float64)
    length = _norm(u)
    moves = (length > 0) & length.isfinite()
    if norm == "l2":
        direction = u / torch.where(moves, length, 1.0)
    elif norm == "linf":
        direction = torch.sign(u)
    else:
        direction = u
    moved = start + step_size * unit * torch.where(moves, direction, 0.0)

    if isinstance(sigma, Tensor) or sigma != 0.0:
        noise = standard_normal(seed, sample_ids, z.shape[1], step=step, replica=replica, op=OP_ASCEND)
        moved = moved + sigma * unit * noise.to(torch.float64)

    if radius is not None:
        centre = start if anchor is None else anchor.to(torch.float64)
        moved = _project(moved, centre, unit, radius, radius_norm)
    return moved.to(z.dtype)


def value(call: LatentCall) -> Tensor:
    """The moved latents of a call; of a perturbation differentiable."""
    seed, sample_ids, step, replica, op, truncation = call.noise
    if isinstance(call, PerturbCall):
        return perturb(
            call.z, call.sigma, call.scale, seed=seed, sample_ids=sample_ids, step=step, replica=replica,
            truncation=truncation, sphere_radius=call.sphere_radius, op=op,
        )  # fmt: skip
    with torch.no_grad():
        return ascend(
            call.z, call.grad, step_size=call.step_size, scale=call.scale, anchor=call.anchor, radius=call.radius,
            norm=call.norm, radius_norm=call.radius_norm, sigma=call.sigma, seed=seed, sample_ids=sample_ids, step=step,
            replica=replica,
        )  # fmt: skip


def forward(call: LatentCall, out: Tensor) -> None:
    """The same without a graph."""
    with torch.no_grad():
        out.copy_(value(call))
