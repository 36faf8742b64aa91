"""Perturb and ascend in the compiled core: csrc/cpu/latent.cpp, and csrc/cuda/latent.cu for CUDA tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from tgt_fast._forks import threads
from tgt_fast.kernels.latent_calls import accumulate_dtype, on_device, samples, vector
from tgt_fast.kernels.native import DTYPES, core, cuda
from tgt_fast.kernels.options import OP_ASCEND, RADIUS_NORMS, STEP_NORMS

_UINT64 = (1 << 64) - 1


class _Factor:
    """A number for all samples or one a sample, as the core takes it; keeps the tensor alive for the call."""

    def __init__(self, value: float | Tensor | None, dtype: torch.dtype) -> None:
        self.tensor = vector(value, dtype) if isinstance(value, Tensor) else None
        self.number = float(value) if isinstance(value, (int, float)) else 0.0

    def packed(self) -> tuple[float, int]:
        return self.number, _pointer(self.tensor)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def noise(
    seed: int | Tensor, sample_ids: Tensor, step: int | Tensor, replica: int, op: int
) -> tuple[int, int, int, int, int]:
    return int(seed) & _UINT64, sample_ids.data_ptr(), int(step), int(replica), op


def device_noise(
    seed: int | Tensor, sample_ids: Tensor, step: int | Tensor, replica: int, op: int
) -> tuple[tuple[int, int, int, int, int], tuple[int, int]]:
    """The key with its integers that live on the device left there: numbers, and addresses that replace them."""
    (seed_number, seed_at), (step_number, step_at) = (
        (0, value.data_ptr()) if isinstance(value, Tensor) else (value, 0) for value in (seed, step)
    )
    return noise(seed_number, sample_ids, step_number, replica, op), (seed_at, step_at)


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
) -> Tensor:
    """z + per_sample * per_coordinate * noise, optionally rescaled onto a sphere."""
    z = z.detach().contiguous()
    sample_ids = sample_ids.contiguous()
    dtype = accumulate_dtype(z)
    sigma = _Factor(per_sample, dtype)
    scale = None if per_coordinate is None else vector(per_coordinate, dtype)
    out = torch.empty_like(z)
    radius = -1.0 if sphere_radius == "keep" else 0.0 if sphere_radius is None else float(sphere_radius)
    engine = cuda.engine(z)
    if engine is not None:
        seed, step = on_device(z.device, seed), on_device(z.device, step)
        key = device_noise(seed, sample_ids, step, int(replica), op)
        with engine.current(z) as stream:
            engine.core.cuda_latent_perturb(
                *z.shape, DTYPES[z.dtype], z.data_ptr(), out.data_ptr(), sigma.packed(), _pointer(scale), *key,
                truncation or 0.0, radius, stream,
            )  # fmt: skip
        return out
    core().latent_perturb(
        *z.shape, DTYPES[z.dtype], z.data_ptr(), out.data_ptr(), sigma.packed(), _pointer(scale),
        noise(seed, sample_ids, step, replica, op), truncation or 0.0, radius, threads(),
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
) -> Tensor:
    """One step up the gradient, its noise and its projection, in one pass over a sample."""
    z, grad, anchor, unit, dtype = samples(z, grad, anchor, scale)
    sample_ids = sample_ids.contiguous()
    steps, sigmas, radii = _Factor(step_size, dtype), _Factor(sigma, dtype), _Factor(radius, dtype)
    out = torch.empty_like(z)
    types = tuple(DTYPES[tensor.dtype] for tensor in (z, grad, z if anchor is None else anchor))
    engine = cuda.engine(z)
    if engine is not None:
        seed, step = on_device(z.device, seed), on_device(z.device, step)
        key = device_noise(seed, sample_ids, step, int(replica), OP_ASCEND)
        with engine.current(z) as stream:
            engine.core.cuda_latent_ascend(
                *z.shape, types, z.data_ptr(), grad.data_ptr(), _pointer(anchor), out.data_ptr(), steps.packed(),
                sigmas.packed(), radii.packed(), _pointer(unit), STEP_NORMS.index(norm),
                RADIUS_NORMS.index(radius_norm), *key, stream,
            )  # fmt: skip
        return out
    core().latent_ascend(
        *z.shape, types, z.data_ptr(), grad.data_ptr(), _pointer(anchor), out.data_ptr(), steps.packed(),
        sigmas.packed(), radii.packed(), _pointer(unit), STEP_NORMS.index(norm), RADIUS_NORMS.index(radius_norm),
        noise(seed, sample_ids, step, replica, OP_ASCEND), threads(),
    )  # fmt: skip
    return out
