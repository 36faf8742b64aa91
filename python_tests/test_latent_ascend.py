"""ascend_latents: directions, scale, trust region, samples without a usable gradient, errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from numerics import threads
from strategies import DTYPES, AscendCase, ascend_cases, lay_out, random_values
from test_latent import SIZES, assert_like_truth
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, DeviceError, DTypeError, ShapeError
from tgt_fast.kernels.options import OP_ASCEND, RADIUS_NORMS, STEP_NORMS
from tgt_fast.kernels.reference import ascend, standard_normal


def values(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_values(shape, seed, 1.0, dtype)


def expected(z: Tensor, grad: Tensor, **options: Any) -> Tensor:
    """The float64 truth on the same, already rounded inputs."""
    options = {
        "scale": None, "anchor": None, "radius": None, "norm": "l2", "radius_norm": "l2", "sigma": 0.0, "seed": 0,
        "step": 0, "replica": 0, "sample_ids": torch.arange(z.shape[0]), **options,
    }  # fmt: skip
    rows = {"anchor", "step_size", "radius", "sigma"}
    for name, value in options.items():
        if isinstance(value, Tensor) and name != "sample_ids":
            options[name] = value.double().reshape(z.shape[0] if name in rows else 1, -1)
    count = z.shape[0]
    return ascend(z.double().reshape(count, -1), grad.double().reshape(count, -1), **options).reshape(z.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("norm", STEP_NORMS)
def test_every_direction_size_and_dtype(backend: str, norm: str, size: int, dtype: torch.dtype) -> None:
    z, grad = values((5, size), 0, dtype), values((5, size), 1, dtype)
    options: dict[str, Any] = {"step_size": 0.7, "norm": norm}
    out = tgt.ascend_latents(z, grad, backend=backend, **options)
    assert out.dtype == dtype
    assert out.shape == z.shape
    assert_like_truth(out, expected(z, grad, **options))


@pytest.mark.meet(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("radius_norm", "radius"), [(None, None), *itertools.product(RADIUS_NORMS, (0.2, 50.0))])
@pytest.mark.parametrize("norm", STEP_NORMS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_step_noise_and_projection_together(
    backend: str, sigma: float, scaled: bool, norm: str, radius_norm: str, radius: float | None, dtype: torch.dtype
) -> None:
    shape = (5, 3, 11)
    z, grad = values(shape, 0, dtype), values(shape, 1, dtype)
    options: dict[str, Any] = {"step_size": 0.7, "norm": norm, "sigma": sigma, "seed": 5, "step": 9}
    if scaled:
        options["scale"] = values(shape[1:], 3).abs() + 0.1
    if radius is not None:
        options |= {"anchor": values(shape, 2, dtype), "radius": radius, "radius_norm": radius_norm}
    assert_like_truth(tgt.ascend_latents(z, grad, backend=backend, **options), expected(z, grad, **options))


def test_a_step_has_the_length_asked_for_in_whitened_units(backend: str) -> None:
    z, grad, scale = values((6, 33), 0), values((6, 33), 1), values((33,), 2).abs() + 0.1
    moved = tgt.ascend_latents(z, grad, step_size=2.0, scale=scale, backend=backend)
    whitened = (moved - z) / scale
    torch.testing.assert_close(whitened.norm(dim=1), torch.full((6,), 2.0), rtol=1e-4, atol=0)
    direction = scale * grad
    cosine = torch.nn.functional.cosine_similarity(whitened, direction)
    torch.testing.assert_close(cosine, torch.ones(6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["number", "0-d", "(B,)", "(B, 1)"])
def test_step_radius_and_noise_a_sample(backend: str, form: str) -> None:
    z, grad, anchor = values((4, 9), 0), values((4, 9), 1), values((4, 9), 2)
    each = torch.tensor([0.1, 0.5, 1.0, 2.0])
    shaped: Any = {"number": 0.5, "0-d": torch.tensor(0.5), "(B,)": each, "(B, 1)": each[:, None]}[form]
    options: dict[str, Any] = {"step_size": shaped, "radius": shaped, "sigma": shaped, "anchor": anchor}
    out = tgt.ascend_latents(z, grad, backend=backend, **options)
    column = each[:, None] if "B" in form else torch.full((4, 1), 0.5)
    want = expected(z, grad, step_size=column, radius=column, sigma=column, anchor=anchor)
    assert_like_truth(out, want)


def test_a_negative_step_descends(backend: str) -> None:
    z, grad = values((4, 9), 0), values((4, 9), 1)
    up, down = (tgt.ascend_latents(z, grad, step_size=size, backend=backend) for size in (0.5, -0.5))
    torch.testing.assert_close(up - z, z - down, rtol=1e-5, atol=1e-6)


def test_a_scale_that_is_a_number_scales_every_coordinate(backend: str) -> None:
    z, grad = values((4, 9), 0), values((4, 9), 1)
    options: dict[str, Any] = {"step_size": 0.5, "sigma": 0.1, "anchor": z, "radius": 0.3, "backend": backend}
    one = tgt.ascend_latents(z, grad, scale=2.0, **options)
    torch.testing.assert_close(one, tgt.ascend_latents(z, grad, scale=torch.full((9,), 2.0), **options))


def test_a_scale_is_of_the_coordinates_also_where_there_are_as_many_samples(backend: str) -> None:
    z, grad, scale = values((5, 5), 0), values((5, 5), 1), values((5,), 2).abs() + 0.1
    whole = tgt.ascend_latents(z, grad, step_size=0.5, scale=scale, backend=backend)
    part = tgt.ascend_latents(z[:3], grad[:3], step_size=0.5, scale=scale[None], backend=backend)
    assert torch.equal(whole[:3], part)


@pytest.mark.parametrize("norm", STEP_NORMS)
def test_coordinates_of_scale_zero_do_not_move_and_return_to_the_anchor(backend: str, norm: str) -> None:
    z, grad, anchor = values((4, 9), 0), values((4, 9), 1), values((4, 9), 2)
    scale = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    options: dict[str, Any] = {"step_size": 0.5, "sigma": 0.1, "scale": scale, "norm": norm, "backend": backend}
    free = tgt.ascend_latents(z, grad, **options)
    assert torch.equal(free[:, scale == 0], z[:, scale == 0])
    for radius, radius_norm in itertools.product((0.1, 100.0), RADIUS_NORMS):
        held = tgt.ascend_latents(z, grad, anchor=anchor, radius=radius, radius_norm=radius_norm, **options)
        assert torch.equal(held[:, scale == 0], anchor[:, scale == 0])
        # they count in no distance either: of what is left, all lies outside the small ball and inside the large one
        inside, moved = held[:, scale > 0], free[:, scale > 0]
        if radius == 100:
            assert torch.equal(inside, moved)
        else:
            size = (inside - anchor[:, scale > 0]).norm(dim=1, p=2 if radius_norm == "l2" else math.inf)
            torch.testing.assert_close(size, torch.full((4,), radius))


# Gradients that give no step, or barely


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", STEP_NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_that_is_zero_or_not_finite_gives_no_step(
    backend: str, dtype: torch.dtype, norm: str, bad: float
) -> None:
    z, grad = values((4, 33), 0, dtype), values((4, 33), 1, dtype)
    clean = tgt.ascend_latents(z, grad, step_size=0.5, norm=norm, backend=backend)
    if bad == 0.0:
        grad[2] = 0.0
    else:
        grad[2, 7] = bad
    out = tgt.ascend_latents(z, grad, step_size=0.5, norm=norm, backend=backend)
    assert torch.equal(out[2], z[2])
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])
    noisy = tgt.ascend_latents(z, grad, step_size=0.5, norm=norm, sigma=0.5, seed=3, backend=backend)
    noise = standard_normal(3, torch.arange(4), 33, op=OP_ASCEND)[2].double()
    assert_like_truth(noisy[2:3], (z[2].double() + 0.5 * noise)[None])


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e-12),  # squares are subnormal in float32
        (torch.float32, 1e-30),  # squares vanish
        (torch.float32, 1e-40),  # subnormal itself: its reciprocal overflows
        (torch.float32, 1e25),  # squares overflow
        (torch.float32, 1e38),
        (torch.bfloat16, 1e-30),
        (torch.bfloat16, 1e38),
        (torch.float16, 1e-7),
        (torch.float64, 1e-100),
        (torch.float64, 1e100),
    ],
    ids=str,
)
def test_gradients_of_any_size_give_a_step_of_the_same_length(backend: str, dtype: torch.dtype, size: float) -> None:
    """AMP, deep decoders and long chains make gradients whose squares leave the range of their dtype."""
    pattern = torch.tensor([[1.0, -1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    grad = (pattern * size).to(dtype)
    out = tgt.ascend_latents(torch.zeros(2, 5, dtype=dtype), grad, step_size=1.0, backend=backend)
    assert_like_truth(out, pattern / pattern.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(("size", "unit"), [(1e30, 1e10), (1e-30, 1e-10)])
def test_so_do_those_that_leave_the_range_where_a_scale_multiplies_them(backend: str, size: float, unit: float) -> None:
    pattern = torch.tensor([[1.0, -1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    options: dict[str, Any] = {"step_size": 1.0, "scale": torch.full((5,), unit), "backend": backend}
    out = tgt.ascend_latents(torch.zeros(2, 5), (pattern * size).float(), **options)
    assert_like_truth(out / unit, pattern / pattern.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("norm", STEP_NORMS)
def test_a_coordinate_without_a_slope_stays(backend: str, norm: str) -> None:
    z, grad = values((4, 33), 0), values((4, 33), 1)
    grad[:, ::3] = 0.0
    out = tgt.ascend_latents(z, grad, step_size=0.5, norm=norm, backend=backend)
    assert torch.equal(out[:, ::3], z[:, ::3])
    assert_like_truth(out, expected(z, grad, step_size=0.5, norm=norm))


# Trust region


@settings(max_examples=150)
@given(case=ascend_cases())
def test_the_result_lies_in_the_trust_region_and_agrees_with_the_truth(backend: str, case: AscendCase) -> None:
    out = tgt.ascend_latents(case.z, case.grad, backend=backend, **case.options)
    assert out.shape == case.z.shape
    assert out.dtype == case.z.dtype
    assert not out.requires_grad
    assert out.isfinite().all()
    if out.shape[0] == 0:
        return
    scale = case.options.get("scale", torch.ones(()))
    offset = ((out.double() - case.options["anchor"].double()) / scale).flatten(start_dim=1)
    reach = torch.linalg.vector_norm(offset, ord=2.0 if case.radius_norm == "l2" else math.inf, dim=1)
    # The result is rounded at its own size, and the rounding is measured in units of the scale.
    rounding = torch.finfo(case.z.dtype).eps * (out.double() / scale).flatten(start_dim=1).norm(dim=1)
    assert (reach <= case.radius * (1 + 1e-5) + rounding + 1e-6).all()
    assert_like_truth(out, expected(case.z, case.grad, **case.options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("radius_norm", RADIUS_NORMS)
def test_inside_the_ball_nothing_is_rounded(backend: str, radius_norm: str, dtype: torch.dtype) -> None:
    """A far anchor and a huge radius: the trip to the anchor and back would cost bits."""
    z, grad = values((5, 33), 0, dtype), values((5, 33), 1, dtype)
    options: dict[str, Any] = {
        "step_size": 0.5,
        "sigma": 0.2,
        "scale": values((33,), 2).abs() + 0.1,
        "backend": backend,
    }
    free = tgt.ascend_latents(z, grad, **options)
    far = torch.full_like(z, 1000.0)
    held = tgt.ascend_latents(z, grad, anchor=far, radius=1e6, radius_norm=radius_norm, **options)
    assert torch.equal(held, free)


@pytest.mark.parametrize("size", [5, 3000])
@pytest.mark.parametrize("radius_norm", RADIUS_NORMS)
def test_an_anchor_that_is_not_a_number_somewhere(backend: str, radius_norm: str, size: int) -> None:
    """The cube is a matter of each coordinate, the ball of all: its distance is NaN, and NaN is not outside."""
    z, grad, anchor = values((3, size), 0), values((3, size), 1), values((3, size), 2) * 3
    anchor[0, 3] = anchor[1] = math.nan
    options: dict[str, Any] = {"step_size": 0.5, "anchor": anchor, "radius": 0.1, "radius_norm": radius_norm}
    out = tgt.ascend_latents(z, grad, backend=backend, **options)
    torch.testing.assert_close(out.double(), expected(z, grad, **options), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("radius_norm", RADIUS_NORMS)
def test_a_radius_of_zero_returns_the_anchor(backend: str, radius_norm: str) -> None:
    z, grad, anchor = (values((4, 9), seed) for seed in range(3))
    options: dict[str, Any] = {"step_size": 0.5, "radius": 0.0, "radius_norm": radius_norm, "backend": backend}
    assert torch.equal(tgt.ascend_latents(z, grad, anchor=anchor, **options), anchor)


def test_projection_alone_moves_along_the_line_to_the_anchor(backend: str) -> None:
    z, anchor = torch.tensor([[6.0, 8.0]]), torch.zeros(1, 2)
    out = tgt.ascend_latents(z, torch.zeros(1, 2), step_size=1.0, anchor=anchor, radius=5.0, backend=backend)
    torch.testing.assert_close(out, torch.tensor([[3.0, 4.0]]))
    box = tgt.ascend_latents(
        z, torch.zeros(1, 2), step_size=1.0, anchor=anchor, radius=7.0, radius_norm="linf", backend=backend
    )
    torch.testing.assert_close(box, torch.tensor([[6.0, 7.0]]))


# Whatever the op


def test_noise_of_a_step_is_not_that_of_a_perturbation(backend: str) -> None:
    zero = torch.zeros(4, 33)
    stepped = tgt.ascend_latents(zero, zero, step_size=0.0, sigma=1.0, seed=1, backend=backend)
    torch.testing.assert_close(stepped, standard_normal(1, torch.arange(4), 33, op=OP_ASCEND), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(stepped, tgt.perturb_latents(zero, 1.0, seed=1, backend=backend), atol=1e-2)


@pytest.mark.parametrize("layout", ["row-strided", "column-strided", "transposed"])
def test_strides_do_not_change_the_result(backend: str, layout: str) -> None:
    z, grad, anchor = (values((4, 3, 5), seed) for seed in range(3))
    options: dict[str, Any] = {"step_size": 2.0, "radius": 0.5, "sigma": 0.1, "backend": backend}
    plain = tgt.ascend_latents(z, grad, anchor=anchor, **options)
    placed = tgt.ascend_latents(lay_out(z, layout), lay_out(grad, layout), anchor=lay_out(anchor, layout), **options)
    assert torch.equal(placed, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_and_anchor_may_be_of_other_dtypes(backend: str, dtype: torch.dtype) -> None:
    z, grad, anchor = values((4, 33), 0), values((4, 33), 1, dtype), values((4, 33), 2, dtype)
    options: dict[str, Any] = {"step_size": 2.0, "radius": 0.5, "anchor": anchor}
    out = tgt.ascend_latents(z, grad, backend=backend, **options)
    assert out.dtype == z.dtype
    assert_like_truth(out, expected(z, grad, **options))


def test_the_result_is_detached_and_the_inputs_are_untouched(backend: str) -> None:
    z, grad, anchor = (values((4, 9), seed).requires_grad_() for seed in range(3))
    before = [x.detach().clone() for x in (z, grad, anchor)]
    out = tgt.ascend_latents(z, grad, step_size=1.0, anchor=anchor, radius=0.5, sigma=0.1, backend=backend)
    assert not out.requires_grad
    assert all(torch.equal(x.detach(), y) and x._version == 0 for x, y in zip((z, grad, anchor), before, strict=True))


def test_same_bits_for_any_number_of_threads_and_any_batch(backend: str) -> None:
    z, grad, anchor = (values((97, 1031), seed) for seed in range(3))
    options: dict[str, Any] = {"step_size": 2.0, "radius": 0.5, "sigma": 0.1, "backend": backend}
    ids = torch.arange(97)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(tgt.ascend_latents(z, grad, anchor=anchor, sample_ids=ids, **options))
    assert all(torch.equal(out, results[0]) for out in results)
    order = torch.randperm(97, generator=torch.Generator().manual_seed(0))
    mixed = tgt.ascend_latents(z[order], grad[order], anchor=anchor[order], sample_ids=ids[order], **options)
    assert torch.equal(mixed, results[0][order])


Z = values((4, 3), 0)
ERRORS: list[tuple[type[Exception], dict[str, Any], str]] = [
    (DTypeError, {"z": Z.long()}, "z.*int64"),
    (DTypeError, {"grad": Z.long()}, "grad.*int64"),
    (ShapeError, {"grad": Z[:3]}, r"\(3, 3\).*\(4, 3\)"),
    (DeviceError, {"grad": Z.to("meta")}, "meta.*cpu"),
    (ShapeError, {"anchor": Z[:, :2], "radius": 1.0}, r"\(4, 2\).*\(4, 3\)"),
    (ArgumentError, {"anchor": Z}, "radius"),
    (ArgumentError, {"radius": 1.0}, "anchor"),
    (ArgumentError, {"anchor": Z, "radius": -1.0}, "-1"),
    (ArgumentError, {"step_size": math.nan}, "nan"),
    (ArgumentError, {"sigma": -1.0}, "-1"),
    (ShapeError, {"step_size": torch.ones(3)}, r"\(3,\).*\(4,\)"),
    (ShapeError, {"scale": torch.ones(2)}, r"\(2,\).*\(4, 3\)"),
    (ArgumentError, {"scale": -1.0}, "-1"),
    (ArgumentError, {"norm": "l1"}, "'l1'"),
    (ArgumentError, {"radius_norm": "raw", "anchor": Z, "radius": 1.0}, "'raw'"),
    (ShapeError, {"sample_ids": torch.arange(5)}, r"\(5,\).*\(4, 3\)"),
    (ArgumentError, {"sample_ids": torch.tensor([0, 1, 2, -3])}, "-3"),
    (ArgumentError, {"replica": 2**16}, str(2**16)),
]


@pytest.mark.parametrize(
    ("error", "changes", "message"), ERRORS, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_bad_input_is_named(none_chosen: str, error: type[Exception], changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"z": Z, "grad": Z, "step_size": 0.5, "backend": none_chosen, **changes}
    with pytest.raises(error, match=f"ascend_latents.*{message}"):
        tgt.ascend_latents(**arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", torch.tensor([1.0, -1.0, 1.0])),
        ("scale", torch.tensor([1.0, math.nan, 1.0])),
        ("radius", torch.tensor([1.0, math.nan])),
        ("radius", torch.tensor([1.0, -1.0])),
        ("step_size", torch.tensor([1.0, math.inf])),
        ("sigma", torch.tensor([-0.1, 1.0])),
    ],
)
def test_tensor_options_out_of_range_are_errors(none_chosen: str, name: str, value: Tensor) -> None:
    z = torch.zeros(2, 3)
    options = {"step_size": 1.0, "anchor": z, "radius": 1.0, name: value}
    with pytest.raises(ArgumentError, match=f"{name} must be finite"):
        tgt.ascend_latents(z, z, **options, backend=none_chosen)
