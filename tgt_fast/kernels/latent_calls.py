"""Calls of the latent ops: what goes in, and room for what comes out, whoever computes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tgt_fast.kernels.philox import NoiseKey


class PerturbCall(NamedTuple):
    """Inputs of ``z + sigma * scale * noise``, which a sphere may rescale."""

    z: Tensor  # [B, D]
    noise: NoiseKey
    sigma: float | Tensor  # a number or [B, 1]
    scale: Tensor | None  # [D] sigma a coordinate
    sphere_radius: float | str | None  # "keep": the norm of z


class AscendCall(NamedTuple):
    """Inputs of one step up a gradient, its noise and its projection."""

    z: Tensor  # [B, D]
    grad: Tensor  # [B, D]
    noise: NoiseKey
    step_size: float | Tensor  # a number or [B, 1], like the other two
    sigma: float | Tensor
    radius: float | Tensor | None
    scale: Tensor | None  # [D] the unit of each coordinate
    anchor: Tensor | None  # [B, D]
    norm: str
    radius_norm: str


LatentCall = PerturbCall | AscendCall


def outputs(call: LatentCall) -> Tensor:
    """Room for the latents that come out."""
    return call.z.new_empty(call.z.shape)


# What kernels do before they run, whichever backend they belong to


def prepared(call: AscendCall) -> tuple[AscendCall, torch.dtype]:
    """A step whose tensors are dense and without a graph, and the dtype of its arithmetic."""
    z, grad = call.z.detach().contiguous(), call.grad.detach().contiguous()
    anchor = None if call.anchor is None else call.anchor.detach().contiguous()
    dtype = accumulate_dtype(z, grad) if anchor is None else accumulate_dtype(z, grad, anchor)
    scale = None if call.scale is None else vector(call.scale, dtype)
    return call._replace(z=z, grad=grad, anchor=anchor, scale=scale), dtype


def vector(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Factors as a dense vector in the type of the arithmetic."""
    return value.detach().reshape(-1).to(dtype).contiguous()


def on_device(device: torch.device, value: int | Tensor) -> int | Tensor:
    """A 0-d integer tensor as int64 on the device; a tensor of the host's as the number that it is."""
    if not isinstance(value, Tensor):
        return value
    return int(value) if value.device.type == "cpu" != device.type else value.detach().to(device, torch.int64)


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """The type of the arithmetic: float64 as soon as a tensor is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
