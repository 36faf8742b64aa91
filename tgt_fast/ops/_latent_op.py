"""Perturb and ascend in PyTorch's dispatcher, and the derivative of perturb."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.kernels import select
from tgt_fast.ops import library
from tgt_fast.ops._checks import all_readable, upstream
from tgt_fast.ops._noise import KEY, KEY_COUNT, check_key, for_kernel, packed, unpacked

_KEEP = -1.0  # the sphere through z itself


def _kernel(backend: str, *tensors: Tensor | None) -> Any:
    return select.kernel("latent", select.choose("latent", backend, [t for t in tensors if t is not None]))


# Perturb


def perturb(
    kernel: Any,
    rows: Tensor,  # [B, D]
    per_sample: float | Tensor,  # number or [B, 1]
    per_coordinate: Tensor | None,  # [D]
    key: dict[str, Any],
    truncation: float | None,
    sphere_radius: float | str | None,
) -> Tensor:
    """z + per_sample * per_coordinate * noise; differentiable in z."""
    call = (kernel, per_sample, per_coordinate, key, truncation, sphere_radius)
    if torch.is_grad_enabled() and rows.requires_grad:
        moved: Tensor = library.apply(Perturb, rows, call)
        return moved
    return _run(rows, call)


def _run(rows: Tensor, call: tuple[Any, ...]) -> Tensor:
    kernel, per_sample, per_coordinate, key, truncation, sphere_radius = call
    result: Tensor = kernel.perturb(
        rows, per_sample, per_coordinate, **key, truncation=truncation, sphere_radius=sphere_radius
    )
    return result


class Perturb(torch.autograd.Function):
    """Noise is a constant, so the gradient passes through; a sphere adds the derivative of its rescaling."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, call: tuple[Any, ...]) -> Tensor:
        ctx.call = call
        out = _run(rows, call)
        if call[-1] is not None:
            ctx.save_for_backward(rows)
        return out

    @staticmethod
    @one_thread_in_forks
    def backward(ctx: Any, d_out: Tensor) -> Any:  # type: ignore[override]
        kernel, per_sample, per_coordinate, key, truncation, radius = ctx.call
        if radius is None:
            return d_out, None
        # out = R * v / |v| with v = z + sigma * noise, so that d_z = R/|v| * (d - u (u.d)) with u = v/|v|,
        # plus d_R z/|z| where R = |z| is kept.
        (rows,) = ctx.saved_tensors
        all_readable("perturb_latents, backward", z=rows, sigma=per_sample, scale=per_coordinate, **key)
        d_out = upstream("perturb_latents", d_out)
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        z, d = rows.to(dtype), d_out.to(dtype)
        v = perturb(kernel, z, per_sample, per_coordinate, key, truncation, None)  # differentiable again
        length = v.norm(dim=1, keepdim=True)
        unit = v / length
        kept = z.norm(dim=1, keepdim=True)
        size = kept if radius == "keep" else torch.full_like(kept, radius)
        along = (unit * d).sum(dim=1, keepdim=True)
        grad = size / length * (d - unit * along)
        if radius == "keep":
            grad = grad + torch.where(kept > 0, along * z / kept, 0.0)
        return torch.where(length > 0, grad, d).to(rows.dtype), None


def perturb_as_op(
    rows: Tensor, per_sample: float | Tensor, per_coordinate: Tensor | None, key: dict[str, Any],
    truncation: float | None, sphere_radius: float | str | None, backend: str,
) -> Tensor:  # fmt: skip
    """The same as one call of the registered op."""
    sigmas, sigma = library.split(per_sample, 0.0)
    op, rest = key["op"], {name: value for name, value in key.items() if name != "op"}
    out: Tensor = perturb_latents(
        rows, sigmas, sigma, per_coordinate, *packed(**rest), op, truncation,
        _KEEP if sphere_radius == "keep" else sphere_radius, backend,
    )  # fmt: skip
    return out


class _Dispatched:
    """The kernel as autograd wants it, each call an op that a tracer can see."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def perturb(
        self, rows: Tensor, per_sample: float | Tensor, per_coordinate: Tensor | None, *, truncation: float | None,
        sphere_radius: float | str | None, **key: Any,
    ) -> Tensor:  # fmt: skip
        with torch._C._AutoDispatchBelowAutograd():
            return perturb_as_op(rows, per_sample, per_coordinate, key, truncation, sphere_radius, self.backend)


def _perturb_call(arguments: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...], str]:
    z, sigmas, sigma, per_coordinate, *rest = arguments
    key, (op, truncation, radius, backend) = unpacked(*rest[:KEY_COUNT]), rest[KEY_COUNT:]
    per_sample = sigma if sigmas is None else sigmas
    return (
        z,
        (per_sample, per_coordinate, {**key, "op": op}, truncation, "keep" if radius == _KEEP else radius),
        backend,
    )


def _perturb_kernel(*arguments: Any) -> Tensor:
    z, call, backend = _perturb_call(arguments)
    per_sample, per_coordinate, key, *rest = call
    check_key("perturb_latents", key)
    kernel = _kernel(backend, z, arguments[1], arguments[3])
    out = _run(z, (kernel, per_sample, per_coordinate, for_kernel(key), *rest))
    return out if out.is_contiguous() else out.contiguous()


def _perturb_fake(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[0], memory_format=torch.contiguous_format)


def _perturb_autograd(*arguments: Any) -> Tensor:
    z, call, backend = _perturb_call(arguments)
    return perturb(_Dispatched(backend), z, *call)


perturb_latents = library.define(
    f"perturb_latents(Tensor z, Tensor? sigmas, float sigma, Tensor? per_coordinate, {KEY}, int op, "
    "float? truncation, float? sphere_radius, str backend) -> Tensor",
    _perturb_kernel,
    _perturb_fake,
    _perturb_autograd,
    differentiable=1,
)


# Ascend


def ascend_as_op(
    z: Tensor, grad: Tensor, *, step_size: float | Tensor, scale: Tensor | None, anchor: Tensor | None,
    radius: float | Tensor | None, norm: str, radius_norm: str, sigma: float | Tensor, seed: int | Tensor,
    sample_ids: Tensor, step: int | Tensor, replica: int | Tensor, backend: str,
) -> Tensor:  # fmt: skip
    """The step as one call of the registered op."""
    out: Tensor = ascend_latents(
        z, grad, *library.split(step_size, 0.0), scale, anchor, *library.split(radius, 0.0), norm, radius_norm,
        *library.split(sigma, 0.0), *packed(seed, sample_ids, step, replica), backend,
    )  # fmt: skip
    return out


def _ascend_kernel(
    z: Tensor, grad: Tensor, steps: Tensor | None, step_size: float, scale: Tensor | None, anchor: Tensor | None,
    radii: Tensor | None, radius: float | None, norm: str, radius_norm: str, sigmas: Tensor | None, sigma: float,
    *rest: Any,
) -> Tensor:  # fmt: skip
    key, backend = unpacked(*rest[:KEY_COUNT]), rest[KEY_COUNT]
    check_key("ascend_latents", key)
    kernel = _kernel(backend, z, grad, anchor, steps, sigmas, radii, scale)
    out: Tensor = kernel.ascend(
        z, grad, step_size=step_size if steps is None else steps, scale=scale, anchor=anchor,
        radius=radius if radii is None else radii, norm=norm, radius_norm=radius_norm,
        sigma=sigma if sigmas is None else sigmas, **for_kernel(key),
    )  # fmt: skip
    return out if out.is_contiguous() else out.contiguous()


def _ascend_fake(z: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


ascend_latents = library.define(
    "ascend_latents(Tensor z, Tensor grad, Tensor? steps, float step_size, Tensor? scale, Tensor? anchor, "
    "Tensor? radii, float? radius, str norm, str radius_norm, Tensor? sigmas, float sigma, "
    f"{KEY}, str backend) -> Tensor",
    _ascend_kernel,
    _ascend_fake,
)
