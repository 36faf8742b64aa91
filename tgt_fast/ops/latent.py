"""Moves in the latent space: seeded noise, and a step up a gradient inside a trust region."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.kernels import select
from tgt_fast.kernels.latent_calls import AscendCall, LatentCall, PerturbCall, outputs
from tgt_fast.kernels.options import OP_ASCEND, OP_PERTURB, OP_RESTART, RADIUS_NORMS, STEP_NORMS
from tgt_fast.ops import _checks, library
from tgt_fast.ops._noise import KEY, KEY_COUNT, check_key, for_kernel, noise_key, packed, unpacked

_STREAMS = {"perturb": OP_PERTURB, "restart": OP_RESTART}
_KEEP = -1.0  # the sphere through z itself

# Checks


def _rows(latents: Tensor) -> Tensor:
    """(B, ...) as (B, D), also where B is 0."""
    latents = latents.resolve_neg()
    return latents if latents.dim() == 2 else latents.reshape(latents.shape[0], math.prod(latents.shape[1:]))


def _shaped(rows: Tensor, z: Tensor) -> Tensor:
    return rows if z.dim() == 2 else rows.reshape(z.shape)


def _check_latents(name: str, z: Tensor) -> None:
    _checks.floating(name, "z", z)
    if z.dim() < 1:
        raise ShapeError(f"{name}: z must be (B, ...), got a 0-d tensor")


def _factors(name: str, what: str, value: float | Tensor, z: Tensor) -> tuple[float | Tensor, Tensor | None]:
    """A factor as (number or [B, 1], [D] or None): a sample's share and a coordinate's."""
    if not isinstance(value, Tensor):
        return _checks.number(name, what, value, 0, _checks.LARGE), None
    _checks.floating(name, what, value)
    _checks.same_device(name, what, value, "z", z)
    _checks.finite_from(name, what, _checks.real(name, what, value), 0)
    if value.dim() == 0:
        return value.reshape(1, 1).expand(z.shape[0], 1), None
    batch, latent = z.shape[:1], z.shape[1:]
    a_coordinate = _same(value.shape, latent) or _same(value.shape, (1, *latent))
    a_sample = len(latent) > 0 and _same(value.shape, (*batch, *(1 for _ in latent)))
    flat_sample = _same(value.shape, batch)
    if flat_sample and _same(value.shape, latent):
        raise ShapeError(
            f"{name}: {what} of shape {tuple(value.shape)} fits both the samples and the coordinates of z "
            f"{tuple(z.shape)}; pass ({batch[0]}, 1) for one a sample or (1, {batch[0]}) for one a coordinate"
        )
    if a_coordinate:
        return 1.0, value.reshape(-1)
    if a_sample or flat_sample:
        return value.reshape(-1, 1), None
    raise ShapeError(
        f"{name}: {what} {tuple(value.shape)} fits neither the samples nor the coordinates of z {tuple(z.shape)}"
    )


def _same(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Size by size: sizes that a compiler knows by name alone are not found equal as parts of a tuple."""
    return len(shape) == len(other) and all(a == b for a, b in zip(shape, other, strict=True))


def _per_coordinate(name: str, what: str, value: float | Tensor, z: Tensor) -> Tensor:
    """A [D] tensor from a number or a tensor shaped like one latent."""
    if not isinstance(value, Tensor):
        number = _checks.number(name, what, value, 0, _checks.LARGE)
        return z.new_full((math.prod(z.shape[1:]),), number, dtype=torch.float64)
    _checks.floating(name, what, value)
    _checks.same_device(name, what, value, "z", z)
    _checks.finite_from(name, what, value, 0)
    latent = z.shape[1:]
    if value.dim() == 0:
        return value.detach().expand(math.prod(latent))
    if not _same(value.shape, latent) and not _same(value.shape, (1, *latent)):
        raise ShapeError(
            f"{name}: {what} {tuple(value.shape)} must be a number or shaped like one latent of z {tuple(z.shape)}"
        )
    return value.detach().reshape(-1)


def _per_sample(name: str, what: str, value: float | Tensor, z: Tensor, low: float = -_checks.LARGE) -> float | Tensor:
    """A number, or a [B, 1] tensor."""
    if not isinstance(value, Tensor):
        return _checks.number(name, what, value, low, _checks.LARGE)
    _checks.floating(name, what, value)
    _checks.same_device(name, what, value, "z", z)
    count = value.numel()
    if (count != 1 and count != z.shape[0]) or value.dim() > z.dim() or any(n != 1 for n in value.shape[1:]):
        raise ShapeError(f"{name}: {what} {tuple(value.shape)} must be a number or one a sample, ({z.shape[0]},)")
    _checks.finite_from(name, what, value.detach(), low)
    return value.detach().reshape(-1, 1).expand(z.shape[0], 1)


# Autograd


class Perturb(torch.autograd.Function):
    """Noise is a constant, so the gradient passes through; a sphere adds the derivative of its rescaling."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, call: PerturbCall, run: Callable[[LatentCall], Tensor]) -> Tensor:
        ctx.call, ctx.run = call[1:], run  # z is saved where it is needed
        out = run(call)
        if call.sphere_radius is not None:
            ctx.save_for_backward(z)
        return out

    @staticmethod
    @one_thread_in_forks
    def backward(ctx: Any, d_out: Tensor) -> Any:  # type: ignore[override]
        *_, radius = ctx.call
        if radius is None:
            return d_out, None, None
        # out = R * v / |v| with v = z + sigma * noise, so that d_z = R/|v| * (d - u (u.d)) with u = v/|v|,
        # plus d_R z/|z| where R = |z| is kept.
        (rows,) = ctx.saved_tensors
        name, call = "perturb_latents", PerturbCall(rows, *ctx.call)
        _checks.all_readable(f"{name}, backward", z=rows, sigma=call.sigma, scale=call.scale, **call.noise._asdict())
        d_out = _checks.upstream(name, d_out)
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        z, d = rows.to(dtype), d_out.to(dtype)
        v = _perturbed(call._replace(z=z, sphere_radius=None), ctx.run)  # differentiable again
        length = v.norm(dim=1, keepdim=True)
        unit = v / length
        kept = z.norm(dim=1, keepdim=True)
        size = kept if radius == "keep" else torch.full_like(kept, radius)
        along = (unit * d).sum(dim=1, keepdim=True)
        grad = size / length * (d - unit * along)
        if radius == "keep":
            grad = grad + torch.where(kept > 0, along * z / kept, 0.0)
        return torch.where(length > 0, grad, d).to(rows.dtype), None, None


def _perturbed(call: PerturbCall, run: Callable[[LatentCall], Tensor]) -> Tensor:
    """The result of ``run``, differentiable in z."""
    if library.graph_wanted(call.z):
        moved: Tensor = library.apply(Perturb, call.z, call, run)
        return moved
    return run(call)


# Registration


def _tensors(call: LatentCall) -> list[Tensor]:
    """The tensors that a backend is asked about."""
    return [value for value in call if isinstance(value, Tensor)]


def _direct(call: LatentCall, backend: str) -> Tensor:
    """A call of a backend's kernel from Python."""
    out = outputs(call)
    select.kernel("latent", backend).forward(call, out)
    return out


def _in_op(name: str, call: LatentCall, backend: str) -> Tensor:
    """The call of a registered op."""
    call = call._replace(noise=check_key(name, call.noise))
    return _direct(call, select.choose("latent", backend, _tensors(call)))


def _traced(call: LatentCall, backend: str) -> Tensor:
    """The same as one call of the registered op, which a tracer can see."""
    sigma = library.split(call.sigma, 0.0)
    made: Tensor
    if isinstance(call, AscendCall):
        made = ascend_op(
            call.z, call.grad, *library.split(call.step_size, 0.0), call.scale, call.anchor,
            *library.split(call.radius, 0.0), call.norm, call.radius_norm, *sigma, *packed(call.noise), backend,
        )  # fmt: skip
    else:
        radius = _KEEP if call.sphere_radius == "keep" else call.sphere_radius
        made = perturb_op(
            call.z, *sigma, call.scale, *packed(call.noise), call.noise.op, call.noise.truncation, radius, backend
        )
    return made


def _perturb_call(arguments: tuple[Any, ...]) -> tuple[PerturbCall, str]:
    z, sigmas, sigma, scale, *rest = arguments
    op, truncation, radius, backend = rest[KEY_COUNT:]
    key = unpacked(tuple(rest[:KEY_COUNT]), op, truncation)
    sigma, radius = sigma if sigmas is None else sigmas, "keep" if radius == _KEEP else radius
    return PerturbCall(z, key, sigma, scale, radius), backend


def _perturb_kernel(*arguments: Any) -> Tensor:
    return _in_op("perturb_latents", *_perturb_call(arguments))


def _perturb_autograd(*arguments: Any) -> Tensor:
    call, backend = _perturb_call(arguments)
    return _perturbed(call, lambda call: library.dispatched(_traced, call, backend))


def _ascend_call(arguments: tuple[Any, ...]) -> tuple[AscendCall, str]:
    z, grad, steps, step_size, scale, anchor, radii, radius, norm, radius_norm, sigmas, sigma, *key, backend = arguments
    call = AscendCall(
        z, grad, unpacked(tuple(key), OP_ASCEND), step_size if steps is None else steps,
        sigma if sigmas is None else sigmas, radius if radii is None else radii, scale, anchor, norm, radius_norm,
    )  # fmt: skip
    return call, backend


def _ascend_kernel(*arguments: Any) -> Tensor:
    return _in_op("ascend_latents", *_ascend_call(arguments))


perturb_op = library.define(
    f"perturb_latents(Tensor z, Tensor? sigmas, float sigma, Tensor? per_coordinate, {KEY}, int op, "
    "float? truncation, float? sphere_radius, str backend) -> Tensor",
    _perturb_kernel,
    lambda *arguments: outputs(_perturb_call(arguments)[0]),
    _perturb_autograd,
    differentiable=1,
)
ascend_op = library.define(
    "ascend_latents(Tensor z, Tensor grad, Tensor? steps, float step_size, Tensor? scale, Tensor? anchor, "
    "Tensor? radii, float? radius, str norm, str radius_norm, Tensor? sigmas, float sigma, "
    f"{KEY}, str backend) -> Tensor",
    _ascend_kernel,
    lambda *arguments: outputs(_ascend_call(arguments)[0]),
)


# The public functions


@one_thread_in_forks
def perturb_latents(
    z: Tensor,  # [B, ...]
    sigma: float | Tensor,
    *,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,  # [B]
    step: int | Tensor = 0,
    replica: int | Tensor = 0,  # [B]
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
        replica: 0 <= replica < 2**16: which of a sample's several synthetic examples. An integer, or ``(B,)`` integers,
            one a sample.
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
    _checks.refuse_tracing(name)
    _check_latents(name, z)
    per_sample, per_coordinate = _factors(name, "sigma", sigma, z)
    stream = _STREAMS[_checks.choice(name, "op", op, tuple(_STREAMS))]
    key = noise_key(name, "z", z, z.shape[0], seed, sample_ids, step, replica, stream)
    if truncation is not None:
        truncation = _checks.number(name, "truncation", truncation, 0, _checks.LARGE, open_low=True)
        key = key._replace(truncation=truncation)
    if sphere_radius is not None and sphere_radius != "keep":
        sphere_radius = _checks.number(name, "sphere_radius", sphere_radius, 0, _checks.LARGE, open_low=True)
    call = PerturbCall(_rows(z), key, per_sample, per_coordinate, sphere_radius)
    return _shaped(_run(call, backend), z)


@one_thread_in_forks
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
    replica: int | Tensor = 0,  # [B]
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
    _checks.refuse_tracing(name)
    _check_latents(name, z)
    for other_name, other in (("grad", grad), *(() if anchor is None else (("anchor", anchor),))):
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
    key = noise_key(name, "z", z, z.shape[0], seed, sample_ids, step, replica, OP_ASCEND)
    centre = None if anchor is None else _rows(anchor)
    call = AscendCall(_rows(z), _rows(grad), key, steps, sigmas, radii, per_coordinate, centre, norm, radius_norm)
    return _shaped(_run(call, backend), z)


def _run(call: LatentCall, backend: str) -> Tensor:
    """The moved latents, by the path that serves the caller."""
    tensors = _tensors(call)
    if backend != "reference" and library.seen_by_dispatcher(*tensors, call.noise.sample_ids, call.noise.replica):
        return _traced(call, backend)
    chosen = select.choose("latent", backend, tensors)
    call = call._replace(noise=for_kernel(call.noise))
    if chosen == "reference":  # plain PyTorch, which anything can differentiate and transform
        made: Tensor = select.kernel("latent", chosen).value(call)
        return made
    if isinstance(call, AscendCall):
        return _direct(call, chosen)
    return _perturbed(call, lambda call: _direct(call, chosen))
