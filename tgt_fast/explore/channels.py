"""Moves of whole channels of a latent, ``z (1 + e) + b``, in the place of moves of its coordinates.

Source: Zhang et al., "Expanding small-scale datasets with guided imagination" (NeurIPS 2023), who draw e and b a
channel and optimise them within an l-infinity ball; ours: keyed noise, units of the latents' deviation, and the ball
round e = b = 0 in the place of one round the latent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast.explore.options import SamplerOptions
from tgt_fast.ops.latent import ascend_latents, perturb_latents
from tgt_fast.teacher import Latents
from tgt_fast.teacher.key import Key


def channel_noise(latents: Latents, key: Key, options: SamplerOptions) -> Tensor:
    """Where a move begins: sigma * noise, [B, 2 C]: e and, in units of the scale, b."""
    key = key.on(latents.z.device)
    start = latents.z.new_zeros(latents.z.shape[0], 2 * latents.z.shape[_channel_dim(latents)])
    if options.sigma == 0 and key.sigma is None:
        return start
    sigma: Any = options.sigma if key.sigma is None else key.sigma.to(start.dtype)[:, None]
    return perturb_latents(
        start, sigma, seed=key.seed, sample_ids=key.ids, step=key.step, replica=key.replica,
        truncation=options.truncation, backend=options.backend,
    )  # fmt: skip


def moved(latents: Latents, move: Tensor, scale: Tensor | None) -> Latents:
    """``z (1 + e) + scale b`` at the real positions."""
    e, b = (_spread(part, latents) for part in move.to(latents.z.dtype).chunk(2, 1))
    return latents.at_real(latents.z * (1 + e) + _of_channels(latents, scale) * b)


def channel_slope(slope: Tensor, latents: Latents, scale: Tensor | None) -> Tensor:
    """The gradient in a move, [B, 2 C], from that in the latents it leads to."""
    slope = slope if latents.real is None else torch.where(latents.real, slope, 0.0)
    dims = [dim for dim in range(1, slope.ndim) if dim != _channel_dim(latents)]

    def summed(part: Tensor) -> Tensor:
        return part.sum(dims) if dims else part

    return torch.cat([summed(slope * latents.z), summed(slope * _of_channels(latents, scale))], 1)


def channel_step(move: Tensor, slope: Tensor, key: Key, options: SamplerOptions, number: int) -> Tensor:
    """One step of a move up its slope, kept in the ball round no move at all."""
    key = key.on(move.device)
    ball: dict[str, Any] = {}
    if options.radius is not None:
        ball = {"anchor": torch.zeros_like(move), "radius": options.radius, "radius_norm": options.ball}
    return ascend_latents(
        move, slope, step_size=options.step_size, norm=options.norm, sigma=options.step_noise, seed=key.seed,
        sample_ids=key.ids, step=key.step * options.steps + number if options.step_noise > 0 else key.step,
        replica=key.replica, backend=options.backend, **ball,
    )  # fmt: skip


def _channel_dim(latents: Latents) -> int:
    """PyTorch's, 1; of latents with a mask, [B, L, ..., d], the last, as the mask covers positions."""
    return 1 if latents.mask is None else latents.z.ndim - 1


def _spread(part: Tensor, latents: Latents) -> Tensor:
    """[B, C], ready to broadcast over z."""
    shape = [1] * latents.z.ndim
    shape[0], shape[_channel_dim(latents)] = part.shape
    return part.reshape(shape)


def _of_channels(latents: Latents, scale: Tensor | None) -> Tensor | float:
    """The root mean square of a channel's scale, ready to broadcast over z; 1 without one."""
    if scale is None:
        return 1.0
    channel = _channel_dim(latents)
    scale = scale.to(latents.z.device, latents.z.dtype).unsqueeze(0)
    dims = [dim for dim in range(1, scale.ndim) if dim != channel]
    return scale.square().mean(dims, keepdim=True).sqrt() if dims else scale
