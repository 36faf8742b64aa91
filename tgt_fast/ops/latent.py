"""Moves in the latent space: seeded noise, and a step up a gradient inside a trust region."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.kernels import select
from tgt_fast.kernels.native import latent as native_latent
from tgt_fast.kernels.options import (
    MAX_REPLICA,
    MAX_SAMPLE_ID,
    MAX_STEP,
    OP_PERTURB,
    OP_RESTART,
    RADIUS_NORMS,
    STEP_NORMS,
)
from tgt_fast.kernels.reference import latent as reference_latent
from tgt_fast.kernels.triton import latent as triton_latent
from tgt_fast.ops import _checks

_COMPILED: dict[str, Any] = {"native": native_latent, "triton": triton_latent}
_STREAMS = {"perturb": OP_PERTURB, "restart": OP_RESTART}
_LARGE = 1e30


def perturb_latents(
    z: Tensor,  # [B, ...]
    sigma: float | Tensor,
    *,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,  # [B]
    step: int | Tensor = 0,
    replica: int = 0,
    truncation: float | None = None,
    sphere_radius: float | str | None = None,
    op: str = "perturb",
    backend: str = "auto",
) -> Tensor:
    r"""``z + sigma * noise``, where a sample's standard normal noise depends on (seed, id, replica, step) alone.

    The noise is Philox4x32-10 through Box-Muller, in float32 for every dtype: the same on every backend, in any batch
    order, split or number of processes. No global random state is read or written.

    Args:
        z: ``(B, ...)`` latents, float64, float32, bfloat16 or float16. Differentiable.
        sigma: standard deviation, >= 0, in the units of ``z``: a number; a tensor a coordinate, shaped like one latent
            (with or without a leading 1); or a tensor a sample, ``(B,)`` or ``(B, 1, ..., 1)``. Not differentiable.
        seed: 64-bit integer, or a 0-d int64 tensor.
        sample_ids: ``(B,)`` integers, 0 <= id < 2**48; ``0..B-1`` by default.
        step: 0 <= step < 2**28, an integer or a 0-d int64 tensor.
        replica: 0 <= replica < 2**16: which of a sample's several synthetic examples.
        truncation: draw from the normal truncated to ``[-truncation, truncation]`` instead (exactly, by its quantile
            function; one random word a number, so other numbers than without), in standard deviations, > 0.
        sphere_radius: rescale each result to this l2 norm; ``"keep"`` keeps the norm of its ``z``.
        op: the random stream, ``"perturb"`` or ``"restart"``.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.

    Returns:
        A tensor like ``z``.

    Raises:
        ShapeError, DTypeError, DeviceError, ArgumentError: before anything runs, with the offending values.

    Source: exploration at random of Zaheer et al., "Teacher Guided Training", ICLR 2023; keyed noise, truncation and
    sphere are ours.

    >>> import torch, tgt_fast as tgt
    >>> z = torch.zeros(4, 3)
    >>> whole = tgt.perturb_latents(z, 1.0, seed=7)
    >>> part = tgt.perturb_latents(z[2:], 1.0, seed=7, sample_ids=torch.tensor([2, 3]))
    >>> bool((whole[2:] == part).all())
    True
    """
    name = "perturb_latents"
    _check_latents(name, z)
    per_sample, per_coordinate = _factors(name, "sigma", sigma, z)
    stream = _STREAMS[_checks.choice(name, "op", op, tuple(_STREAMS))]
    key = _noise_key(name, z, seed, sample_ids, step, replica, stream)
    if truncation is not None:
        truncation = _checks.number(name, "truncation", truncation, 0, _LARGE, open_low=True)
    if sphere_radius is not None and sphere_radius != "keep":
        sphere_radius = _checks.number(name, "sphere_radius", sphere_radius, 0, _LARGE, open_low=True)

    rows = _rows(z)
    tensors = [rows, *(f for f in (per_sample, per_coordinate) if isinstance(f, Tensor))]
    chosen = select.choose("latent", backend, tensors)
    if chosen == "reference":
        factor = _product(per_sample, per_coordinate)
        out = reference_latent.perturb(
            rows, factor, **key, truncation=truncation, sphere_radius=sphere_radius
        )  # fmt: skip
    else:
        call = (_COMPILED[chosen], per_sample, per_coordinate, key, truncation, sphere_radius)
        needs_graph = torch.is_grad_enabled() and z.requires_grad
        out = _Perturb.apply(rows, call) if needs_graph else _run_perturb(rows, call)
    return out.reshape(z.shape)


def _run_perturb(rows: Tensor, call: tuple[Any, ...]) -> Tensor:
    kernel, per_sample, per_coordinate, key, truncation, sphere_radius = call
    result: Tensor = kernel.perturb(
        rows, per_sample, per_coordinate, **key, truncation=truncation, sphere_radius=sphere_radius
    )
    return result


class _Perturb(torch.autograd.Function):
    """Noise is a constant, so the gradient passes through; a sphere adds the derivative of its rescaling."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, call: tuple[Any, ...]) -> Tensor:
        ctx.call = call
        out = _run_perturb(rows, call)
        if call[-1] is not None:
            ctx.save_for_backward(rows)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:  # type: ignore[override]
        kernel, per_sample, per_coordinate, key, truncation, radius = ctx.call
        if radius is None:
            return d_out, None
        # out = R * v / |v| with v = z + sigma * noise, so that d_z = R/|v| * (d - u (u.d)) with u = v/|v|,
        # plus d_R z/|z| where R = |z| is kept.
        (rows,) = ctx.saved_tensors
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        z, d = rows.to(wide), d_out.to(wide)
        v = _Perturb.apply(z, (kernel, per_sample, per_coordinate, key, truncation, None))  # differentiable again
        length = v.norm(dim=1, keepdim=True)
        unit = v / length
        kept = z.norm(dim=1, keepdim=True)
        size = kept if radius == "keep" else torch.full_like(kept, radius)
        along = (unit * d).sum(dim=1, keepdim=True)
        grad = size / length * (d - unit * along)
        if radius == "keep":
            grad = grad + torch.where(kept > 0, along * z / kept, 0.0)
        return torch.where(length > 0, grad, d).to(rows.dtype), None


@torch.no_grad()
def ascend_latents(
    z: Tensor,  # [B, ...]
    grad: Tensor,  # [B, ...]
    *,
    step_size: float | Tensor,
    scale: float | Tensor | None = None,
    anchor: Tensor | None = None,  # [B, ...]
    radius: float | Tensor | None = None,
    norm: str = "l2",
    radius_norm: str = "l2",
    sigma: float | Tensor = 0.0,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,  # [B]
    step: int | Tensor = 0,
    replica: int = 0,
    backend: str = "auto",
) -> Tensor:
    r"""One step up the gradient a sample, in coordinates whitened by ``scale``, kept in a ball round ``anchor``.

    ::

        u  = scale * grad
        z' = z + scale * (step_size * direction(u) + sigma * noise)      direction: u / |u|_2, sign(u) or u
        v  = (z' - anchor) / scale
        v' = v * min(1, radius / |v|_2)   or   clamp(v, -radius, radius)
        result = anchor + scale * v'

    Args:
        z: ``(B, ...)`` latents, float64, float32, bfloat16 or float16.
        grad: ``(B, ...)`` the gradient of what should rise, a dtype of these.
        step_size: in units of ``scale``: a number, or a tensor a sample, ``(B,)``.
        scale: the unit of each coordinate, >= 0: a number, or a tensor shaped like one latent. 1 by default.
        anchor: ``(B, ...)`` centre of the trust region; needed exactly with ``radius``.
        radius: >= 0, in units of ``scale``: a number, or a tensor a sample, ``(B,)``.
        norm: ``"l2"`` (a step of length ``step_size``), ``"linf"`` (its sign) or ``"raw"``.
        radius_norm: ``"l2"`` or ``"linf"``.
        sigma: noise of the step, >= 0, in units of ``scale``, keyed as in :func:`perturb_latents` but of a stream of
            its own: a number, or a tensor a sample, ``(B,)``.
        seed, sample_ids, step, replica: the key of the noise, see :func:`perturb_latents`.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.

    Returns:
        A tensor like ``z``, detached. A sample whose gradient is 0 or not finite takes no step (its noise and
        projection remain); one that is inside the ball is left as it is, bit for bit.

    Raises:
        ShapeError, DTypeError, DeviceError, ArgumentError: before anything runs, with the offending values.

    Source: gradient exploration of Zaheer et al., "Teacher Guided Training", ICLR 2023; the normalisation, the noise
    and the trust region are ours.

    >>> import torch, tgt_fast as tgt
    >>> z = torch.zeros(1, 2)
    >>> tgt.ascend_latents(z, torch.tensor([[3.0, 4.0]]), step_size=10.0, anchor=z, radius=5.0)
    tensor([[3., 4.]])
    """
    name = "ascend_latents"
    _check_latents(name, z)
    for other_name, other in (("grad", grad), ("anchor", anchor)):
        if other is None:
            continue
        _checks.floating(name, other_name, other)
        if other.shape != z.shape:
            raise ShapeError(f"{name}: {other_name} {tuple(other.shape)} and z {tuple(z.shape)} differ")
        _checks.same_device(name, other_name, other, "z", z)
    _checks.choice(name, "norm", norm, STEP_NORMS)
    _checks.choice(name, "radius_norm", radius_norm, RADIUS_NORMS)
    if (anchor is None) != (radius is None):
        given, missing = ("radius", "anchor") if anchor is None else ("anchor", "radius")
        raise ArgumentError(f"{name}: {given} is given but {missing} is missing; a trust region needs both")
    steps = _per_sample(name, "step_size", step_size, z)
    sigmas = _per_sample(name, "sigma", sigma, z, low=0)
    radii = None if radius is None else _per_sample(name, "radius", radius, z, low=0)
    per_coordinate = None if scale is None else _per_coordinate(name, "scale", scale, z)
    key = _noise_key(name, z, seed, sample_ids, step, replica, None)

    rows, slope = _rows(z), _rows(grad)
    centre = None if anchor is None else _rows(anchor)
    tensors = [t for t in (rows, slope, centre, steps, sigmas, radii, per_coordinate) if isinstance(t, Tensor)]
    chosen = select.choose("latent", backend, tensors)
    kernel: Any = reference_latent if chosen == "reference" else _COMPILED[chosen]
    out: Tensor = kernel.ascend(
        rows, slope, step_size=_column(steps), scale=per_coordinate, anchor=centre, radius=_column(radii), norm=norm,
        radius_norm=radius_norm, sigma=_column(sigmas), **key,
    )  # fmt: skip
    return out.reshape(z.shape)


def _rows(latents: Tensor) -> Tensor:
    """(B, ...) as (B, D), also where B is 0."""
    return latents.resolve_neg().reshape(latents.shape[0], math.prod(latents.shape[1:]))


def _check_latents(name: str, z: Tensor) -> None:
    _checks.floating(name, "z", z)
    if z.dim() < 1:
        raise ShapeError(f"{name}: z must be (B, ...), got a 0-d tensor")


def _factors(name: str, what: str, value: float | Tensor, z: Tensor) -> tuple[float | Tensor, Tensor | None]:
    """A factor as (number or [B], [D] or None): a sample's share and a coordinate's."""
    if not isinstance(value, Tensor):
        return _checks.number(name, what, value, 0, _LARGE), None
    _checks.floating(name, what, value)
    _checks.same_device(name, what, value, "z", z)
    _checks.finite_from(name, what, _checks.real(name, what, value), 0)
    shape, latent = tuple(value.shape), tuple(z.shape[1:])
    if value.dim() == 0:
        return value.reshape(1).expand(z.shape[0]), None
    a_sample = shape == (z.shape[0],) + (1,) * len(latent) and latent != ()
    a_coordinate = shape in (latent, (1, *latent))
    flat_sample = shape == (z.shape[0],) and not a_coordinate
    if shape == (z.shape[0],) == latent:
        count = z.shape[0]
        raise ShapeError(
            f"{name}: {what} of shape {shape} fits both the samples and the coordinates of z {tuple(z.shape)}; "
            f"pass ({count}, 1) for one a sample or (1, {count}) for one a coordinate"
        )
    if a_coordinate:
        return 1.0, value.reshape(-1)
    if a_sample or flat_sample:
        return value.reshape(-1), None
    raise ShapeError(f"{name}: {what} {shape} fits neither the samples nor the coordinates of z {tuple(z.shape)}")


def _per_coordinate(name: str, what: str, value: float | Tensor, z: Tensor) -> Tensor:
    """A [D] tensor from a number or a tensor shaped like one latent."""
    if not isinstance(value, Tensor):
        number = _checks.number(name, what, value, 0, _LARGE)
        return z.new_full((math.prod(z.shape[1:]),), number, dtype=torch.float64)
    _checks.floating(name, what, value)
    _checks.same_device(name, what, value, "z", z)
    _checks.finite_from(name, what, value, 0)
    latent = tuple(z.shape[1:])
    if value.dim() == 0:
        return value.detach().expand(math.prod(latent))
    if tuple(value.shape) not in (latent, (1, *latent)):
        raise ShapeError(
            f"{name}: {what} {tuple(value.shape)} must be a number or shaped like one latent of z {tuple(z.shape)}"
        )
    return value.detach().reshape(-1)


def _per_sample(name: str, what: str, value: float | Tensor, z: Tensor, low: float = -_LARGE) -> float | Tensor:
    """A number, or a [B] tensor."""
    if not isinstance(value, Tensor):
        return _checks.number(name, what, value, low, _LARGE)
    _checks.floating(name, what, value)
    _checks.same_device(name, what, value, "z", z)
    if value.numel() not in (1, z.shape[0]) or value.dim() > z.dim() or any(n != 1 for n in value.shape[1:]):
        raise ShapeError(f"{name}: {what} {tuple(value.shape)} must be a number or one a sample, ({z.shape[0]},)")
    _checks.finite_from(name, what, value.detach(), low)
    return value.detach().reshape(-1).expand(z.shape[0])


def _column(value: float | Tensor | None) -> float | Tensor | None:
    return value.reshape(-1, 1) if isinstance(value, Tensor) else value


def _product(per_sample: float | Tensor, per_coordinate: Tensor | None) -> float | Tensor:
    """[B, 1] * [D], or a number."""
    column = _column(per_sample)
    if per_coordinate is None or column is None:
        return 0.0 if column is None else column
    return column * per_coordinate


def _noise_key(
    name: str,
    z: Tensor,
    seed: int | Tensor,
    sample_ids: Tensor | None,
    step: int | Tensor,
    replica: int,
    op: int | None,
) -> dict[str, Any]:
    """The checked key of the noise. Integers that live in a tensor stay there."""
    if sample_ids is None:
        sample_ids = torch.arange(z.shape[0], device=z.device)
    elif not isinstance(sample_ids, Tensor):
        raise DTypeError(f"{name}: sample_ids must be an integer tensor, got {type(sample_ids).__name__}")
    if sample_ids.is_floating_point() or sample_ids.dtype == torch.bool or sample_ids.is_complex():
        raise DTypeError(f"{name}: sample_ids must hold integers, got {sample_ids.dtype}")
    if sample_ids.shape != (z.shape[0],):
        raise ShapeError(f"{name}: sample_ids {tuple(sample_ids.shape)} must be one a sample of z {tuple(z.shape)}")
    _checks.same_device(name, "sample_ids", sample_ids, "z", z)
    sample_ids = sample_ids.to(torch.int64)
    if _checks.on_plain_cpu(sample_ids) and sample_ids.numel():
        low, high = (int(bound) for bound in sample_ids.aminmax())
        if low < 0 or high >= MAX_SAMPLE_ID:
            raise ArgumentError(f"{name}: sample_ids must be in [0, 2**48), got {low if low < 0 else high}")
    seed = _whole(name, "seed", seed, -(2**63), 2**64)
    step = _whole(name, "step", step, 0, MAX_STEP)
    replica = _checks.integer(name, "replica", replica, 0, MAX_REPLICA)
    key: dict[str, Any] = {"seed": seed, "sample_ids": sample_ids, "step": step, "replica": replica}
    if op is not None:
        key["op"] = op
    return key


def _whole(name: str, what: str, value: int | Tensor, low: int, high: int) -> int | Tensor:
    """An int, or a 0-d int64 tensor; what lies on another device is not looked at."""
    if not isinstance(value, Tensor):
        return _checks.integer(name, what, value, low, high)
    if value.dim() != 0 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        found = f"{value.dtype} {tuple(value.shape)}"
        raise ArgumentError(f"{name}: {what} must be an integer or a 0-d int64 tensor, got {found}")
    value = value.to(torch.int64)
    if _checks.on_plain_cpu(value):
        _checks.integer(name, what, int(value), low, high)
    return value
