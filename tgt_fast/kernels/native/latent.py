"""Perturb and ascend in the compiled core (csrc/cpu/latent.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from tgt_fast.kernels.native import DTYPES, core
from tgt_fast.kernels.options import OP_ASCEND, RADIUS_NORMS, STEP_NORMS

_UINT64 = (1 << 64) - 1


def _spread(value: float | Tensor | None, wide: torch.dtype) -> tuple[float, Tensor | None]:
    """(number, tensor): a factor that is one number for all, or one a row in the accumulation dtype."""
    if isinstance(value, Tensor):
        return 1.0, value.detach().reshape(-1).to(wide).contiguous()
    return (0.0 if value is None else float(value)), None


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


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
    wide = _wide(z)
    sigma, sigmas = _spread(per_sample, wide)
    _, coordinate = _spread(per_coordinate, wide)
    out = torch.empty_like(z)
    radius = -1.0 if sphere_radius == "keep" else 0.0 if sphere_radius is None else float(sphere_radius)
    core().latent_perturb(
        *z.shape, DTYPES[z.dtype], z.data_ptr(), out.data_ptr(), sigma, _pointer(sigmas), _pointer(coordinate),
        int(seed) & _UINT64, sample_ids.data_ptr(), int(step), replica, op, truncation or 0.0, radius,
        torch.get_num_threads(),
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
    z, grad = z.detach().contiguous(), grad.detach().contiguous()
    anchor = None if anchor is None else anchor.detach().contiguous()
    sample_ids = sample_ids.contiguous()
    wide = _wide(z, grad) if anchor is None else _wide(z, grad, anchor)
    steps, step_each = _spread(step_size, wide)
    sigmas, sigma_each = _spread(sigma, wide)
    radii, radius_each = _spread(radius, wide)
    _, coordinate = _spread(scale, wide)
    out = torch.empty_like(z)
    core().latent_ascend(
        *z.shape, DTYPES[z.dtype], DTYPES[grad.dtype], DTYPES[z.dtype if anchor is None else anchor.dtype],
        z.data_ptr(), grad.data_ptr(), _pointer(anchor), out.data_ptr(), steps, _pointer(step_each), sigmas, _pointer(sigma_each),
        radii, _pointer(radius_each), _pointer(coordinate), STEP_NORMS.index(norm), RADIUS_NORMS.index(radius_norm),
        int(seed) & _UINT64, sample_ids.data_ptr(), int(step), replica, OP_ASCEND, torch.get_num_threads(),
    )  # fmt: skip
    return out
