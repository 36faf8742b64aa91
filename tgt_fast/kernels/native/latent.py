"""Perturb and ascend in the compiled core: csrc/cpu/latent.cpp, and csrc/cuda/latent.cu for CUDA tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast._forks import threads
from tgt_fast.kernels.latent_calls import accumulate_dtype, on_device, samples, vector
from tgt_fast.kernels.native import DTYPES, core, cuda
from tgt_fast.kernels.native.abi import packer, pointer
from tgt_fast.kernels.options import OP_ASCEND, RADIUS_NORMS, STEP_NORMS

_UINT64 = (1 << 64) - 1


class _Factor:
    """A number for all samples or one a sample, as the core takes it; keeps the tensor alive for the call."""

    def __init__(self, value: float | Tensor | None, dtype: torch.dtype) -> None:
        self.tensor = vector(value, dtype) if isinstance(value, Tensor) else None
        self.number = float(value) if isinstance(value, (int, float)) else 0.0

    def packed(self) -> tuple[float, int]:
        return self.number, pointer(self.tensor)


def noise(
    seed: int | Tensor, sample_ids: Tensor, step: int | Tensor, replica: int, op: int, truncation: float = 0.0
) -> tuple[Any, ...]:
    """The fields of NoiseKey."""
    return int(seed) & _UINT64, sample_ids.data_ptr(), int(step), int(replica), op, truncation


def run(
    kernel: str, name: str, at: Tensor, before: tuple[Any, ...], after: tuple[Any, ...], *, seed: int | Tensor,
    sample_ids: Tensor, step: int | Tensor, replica: int, op: int, truncation: float = 0.0,
) -> None:  # fmt: skip
    """Runs a kernel on the device of a tensor; ``before`` and ``after`` are the fields of its struct round the noise.

    Integers of the key that live on the device are left there: their addresses replace them.
    """
    engine = cuda.engine(at)
    if engine is None:
        compiled = core()
        key = noise(seed, sample_ids, step, replica, op, truncation)
        getattr(compiled, kernel)(packer(compiled, name)(*before, *key, *after), threads())
        return
    (seed, seed_at), (step, step_at) = (
        (0, value.data_ptr()) if isinstance(value, Tensor) else (value, 0)
        for value in (on_device(at.device, seed), on_device(at.device, step))
    )
    key = noise(seed, sample_ids, step, replica, op, truncation)
    with engine.current(at) as stream:
        packed = packer(engine.core, name)(*before, *key, *after)
        getattr(engine.core, f"cuda_{kernel}")(packed, (seed_at, step_at), stream)


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
    before = (
        *z.shape, DTYPES[z.dtype], z.data_ptr(), out.data_ptr(), *sigma.packed(), pointer(scale),
    )  # fmt: skip
    run(
        "latent_perturb", "PerturbCall", z, before, (radius,), seed=seed, sample_ids=sample_ids, step=step,
        replica=replica, op=op, truncation=truncation or 0.0,
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
    types = (DTYPES[tensor.dtype] for tensor in (z, grad, z if anchor is None else anchor))
    before = (
        *z.shape, *types, z.data_ptr(), grad.data_ptr(), pointer(anchor), out.data_ptr(), *steps.packed(),
        *sigmas.packed(), *radii.packed(), pointer(unit), STEP_NORMS.index(norm), RADIUS_NORMS.index(radius_norm),
    )  # fmt: skip
    run(
        "latent_ascend", "AscendCall", z, before, (), seed=seed, sample_ids=sample_ids, step=step, replica=replica,
        op=OP_ASCEND,
    )  # fmt: skip
    return out
