"""perturb_latents: value, factors, sphere, gradient, errors. The noise itself is tested in test_philox.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from numerics import arithmetic_bar, assert_close, threads
from strategies import DTYPES, lay_out, random_values
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, BackendError, DeviceError, DTypeError, ShapeError
from tgt_fast.kernels.reference import perturb, standard_normal

# What each size of a latent is there for.
SIZES = (
    1,  # less than a block of four numbers
    7,
    16,  # the digits' latents; one vector of AVX-512
    257,  # whole vectors and a tail
    4099,  # two blocks of 2048 and a last one of 3
)


def latents(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_values(shape, seed, 1.0, dtype)


def expected(z: Tensor, sigma: Tensor | float, **options: Any) -> Tensor:
    """The float64 truth on the same, already rounded latents."""
    options = {"seed": 0, "step": 0, "replica": 0, "truncation": None, "sphere_radius": None, **options}
    options.setdefault("sample_ids", torch.arange(z.shape[0]))
    flat = z.double().reshape(z.shape[0], -1)
    factor = sigma.double() if isinstance(sigma, Tensor) else sigma
    return perturb(flat, factor, **options).reshape(z.shape)


def assert_like_truth(out: Tensor, truth: Tensor) -> None:
    """fp64 1e-9; fp32 1e-5; bf16 and fp16 as good as rounding the truth. An element: 10 times that of its sample."""
    samples = max(1, out.shape[0])
    floor = 1e-2 * math.sqrt(max(1, out.numel()))
    bar = 1e-6 if out.dtype == torch.float64 else arithmetic_bar(torch.float32, 1.0)  # the noise is float32's
    if out.dtype in (torch.bfloat16, torch.float16):
        rounded = (truth.to(out.dtype).double() - truth).norm() / max(float(truth.norm()), floor)
        bar = max(bar, 1.5 * float(rounded))
    assert_close("latents", out.reshape(samples, -1), truth.reshape(samples, -1), bar=bar, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_and_dtype(backend: str, size: int, dtype: torch.dtype) -> None:
    z = latents((5, size), dtype=dtype)
    out = tgt.perturb_latents(z, 0.7, seed=3, step=2, replica=1, backend=backend)
    assert out.dtype == dtype
    assert out.shape == z.shape
    assert_like_truth(out, expected(z, 0.7, seed=3, step=2, replica=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_is_the_same_for_every_dtype(backend: str, dtype: torch.dtype) -> None:
    noise = tgt.perturb_latents(torch.zeros(5, 33, dtype=dtype), 1.0, seed=3, backend=backend)
    truth = standard_normal(3, torch.arange(5), 33)
    torch.testing.assert_close(
        noise.float(), truth.to(dtype).float(), rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-6
    )


@pytest.mark.parametrize("layout", ["dense", "row-strided", "column-strided", "transposed"])
@pytest.mark.parametrize("shape", [(4,), (4, 9), (4, 3, 5, 2), (1, 1), (0, 5), (3, 0), (0,)], ids=str)
def test_any_shape_and_strides(backend: str, shape: tuple[int, ...], layout: str) -> None:
    z = latents(shape)
    out = tgt.perturb_latents(lay_out(z, layout), 0.5, backend=backend)
    assert out.shape == shape
    assert torch.equal(
        out, tgt.perturb_latents(z.reshape(shape[0], math.prod(shape[1:])), 0.5, backend=backend).view(shape)
    )


def sigma_forms(shape: tuple[int, ...]) -> dict[str, Tensor | float]:
    rest = (1,) * (len(shape) - 1)
    generator = torch.Generator().manual_seed(1)
    return {
        "number": 0.5,
        "zero": 0.0,
        "0-d": torch.tensor(0.5),
        "a sample": torch.rand(shape[0], generator=generator).view(-1, *rest),
        "a sample, flat": torch.rand(shape[0], generator=generator),
        "a coordinate": torch.rand(shape[1:], generator=generator),
        "a coordinate, 1 + shape": torch.rand((1, *shape[1:]), generator=generator, dtype=torch.float64),
        "some zero": torch.rand(shape[1:], generator=generator).round(),
    }


@pytest.mark.parametrize("form", sigma_forms((2, 2)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_form_of_sigma(backend: str, dtype: torch.dtype, form: str) -> None:
    z = latents((6, 3, 5), dtype=dtype)
    sigma = sigma_forms((6, 3, 5))[form]
    flat = sigma
    if isinstance(sigma, Tensor):
        per_sample = form.startswith(("a sample", "0-d"))
        flat = sigma.reshape(-1, 1) if per_sample else sigma.reshape(1, -1)
    out = tgt.perturb_latents(z, sigma, seed=1, backend=backend)
    assert_like_truth(out, expected(z, flat, seed=1))
    if form == "zero":
        assert torch.equal(out, z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("truncation", [0.5, 2.0])
def test_truncation_bounds_the_noise(backend: str, truncation: float, dtype: torch.dtype) -> None:
    z = latents((6, 257), dtype=dtype)
    out = tgt.perturb_latents(z, 0.5, truncation=truncation, backend=backend)
    assert_like_truth(out, expected(z, 0.5, truncation=truncation))
    assert (out.double() - z.double()).abs().max() <= 0.5 * truncation * (1 + 2e-2)


# The sphere


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("radius", [3.0, "keep"])
def test_sphere_projection(backend: str, radius: float | str, size: int, dtype: torch.dtype) -> None:
    z = latents((5, size), dtype=dtype)
    out = tgt.perturb_latents(z, 0.5, seed=1, sphere_radius=radius, backend=backend)
    assert_like_truth(out, expected(z, 0.5, seed=1, sphere_radius=radius))
    wanted = torch.full((5,), 3.0) if radius == 3.0 else z.double().norm(dim=1).float()
    torch.testing.assert_close(
        out.double().norm(dim=1).float(), wanted, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-6
    )


def test_a_sample_that_lands_on_zero_has_no_direction_and_stays(backend: str) -> None:
    z = torch.cat([torch.zeros(1, 5), torch.ones(1, 5)])
    out = tgt.perturb_latents(z, 0.0, sphere_radius=2.0, backend=backend)
    assert out[0].eq(0).all()
    torch.testing.assert_close(out[1].norm(), torch.tensor(2.0))


@pytest.mark.parametrize("size", [5, 3000])
@pytest.mark.parametrize("length", [1e-43, 1e-39, 1e-20, 1e20, 1e36])
def test_short_and_long_samples_have_a_direction_too(backend: str, size: int, length: float) -> None:
    """Their squares leave the range of float32, and so may the quotient of radius and norm."""
    z = latents((3, size)) * length
    for radius in (2.0, 1e-15, 1e15):
        out = tgt.perturb_latents(z, 0.0, sphere_radius=radius, backend=backend)
        torch.testing.assert_close(out.double(), expected(z, 0.0, sphere_radius=radius), rtol=1e-5, atol=1e-6 * radius)
    kept = tgt.perturb_latents(z, 0.0, sphere_radius="keep", backend=backend)
    torch.testing.assert_close(kept, z, rtol=1e-5, atol=3e-45)


# Gradient


@pytest.mark.parametrize("radius", [None, 2.0, "keep"])
def test_gradcheck_in_float64(backend: str, radius: float | str | None) -> None:
    z = latents((3, 2, 4), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: tgt.perturb_latents(x, 0.3, seed=1, sphere_radius=radius, backend=backend), (z,)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("radius", [None, 2.0, "keep"])
def test_gradient_of_every_dtype(backend: str, radius: float | str | None, dtype: torch.dtype) -> None:
    z, upstream = latents((4, 33), dtype=dtype).requires_grad_(), latents((4, 33), 1, dtype)
    out = tgt.perturb_latents(z, 0.3, seed=1, sphere_radius=radius, backend=backend)
    (grad,) = torch.autograd.grad(out, z, upstream)
    leaf = z.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(expected(leaf, 0.3, seed=1, sphere_radius=radius), leaf, upstream.double())
    assert grad.dtype == dtype
    assert_like_truth(grad, want)


def test_gradient_reaches_what_made_the_latents(backend: str) -> None:
    encoder = torch.nn.Linear(5, 8)
    out = tgt.perturb_latents(encoder(torch.ones(3, 5)), 0.5, backend=backend)
    out.square().sum().backward()
    assert encoder.weight.grad is not None
    assert encoder.weight.grad.ne(0).all()


def test_no_graph_where_none_is_wanted_and_the_input_is_untouched(backend: str) -> None:
    z = latents((4, 9)).requires_grad_()
    before, version = z.detach().clone(), z._version
    with torch.no_grad():
        assert not tgt.perturb_latents(z, 0.5, backend=backend).requires_grad
    assert tgt.perturb_latents(z, 0.5, backend=backend).requires_grad
    assert not tgt.perturb_latents(z.detach(), 0.5, backend=backend).requires_grad
    assert torch.equal(z.detach(), before)
    assert z._version == version


# Determinism


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(backend: str, dtype: torch.dtype) -> None:
    z = latents((97, 1031), dtype=dtype)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(tgt.perturb_latents(z, 0.5, seed=1, sphere_radius="keep", backend=backend))
    assert all(torch.equal(out, results[0]) for out in results)


@pytest.mark.parametrize("sphere_radius", [None, "keep"])
def test_a_sample_does_not_depend_on_the_rest_of_the_batch(backend: str, sphere_radius: str | None) -> None:
    z, ids = latents((9, 33)), torch.arange(100, 109)
    options: dict[str, Any] = {"seed": 4, "sphere_radius": sphere_radius, "backend": backend}
    whole = tgt.perturb_latents(z, 0.5, sample_ids=ids, **options)
    for part in torch.arange(9).split([2, 1, 6]):
        assert torch.equal(tgt.perturb_latents(z[part], 0.5, sample_ids=ids[part], **options), whole[part])


# Errors

Z = latents((4, 3))
ERRORS: list[tuple[type[Exception], dict[str, Any], str]] = [
    (DTypeError, {"z": Z.long()}, "int64"),
    (DTypeError, {"z": [1.0]}, "list"),
    (ShapeError, {"z": torch.tensor(1.0)}, "0-d"),
    (ArgumentError, {"sigma": -0.5}, "-0.5"),
    (ArgumentError, {"sigma": math.nan}, "nan"),
    (ArgumentError, {"sigma": math.inf}, "inf"),
    (ArgumentError, {"sigma": "1"}, "'1'"),
    (ShapeError, {"sigma": torch.ones(5)}, r"\(5,\).*\(4, 3\)"),
    (ShapeError, {"sigma": torch.ones(4, 3)}, r"\(4, 3\)"),
    (DTypeError, {"sigma": torch.ones(3, dtype=torch.int64)}, "int64"),
    (ArgumentError, {"sigma": torch.ones(3, requires_grad=True)}, "grad"),
    (DeviceError, {"sigma": torch.ones(3, device="meta")}, "meta.*cpu"),
    (ShapeError, {"sample_ids": torch.arange(3)}, r"\(3,\).*\(4, 3\)"),
    (DTypeError, {"sample_ids": torch.zeros(4)}, "float32"),
    (DTypeError, {"sample_ids": [0, 1, 2, 3]}, "list"),
    (DeviceError, {"sample_ids": torch.arange(4, device="meta")}, "meta.*cpu"),
    (ArgumentError, {"seed": 0.5}, "0.5"),
    (ArgumentError, {"seed": True}, "True"),
    (ArgumentError, {"step": torch.tensor([1])}, r"\(1,\)"),
    (ArgumentError, {"step": torch.tensor(2**28)}, str(2**28)),
    (ArgumentError, {"truncation": 0.0}, "0.0"),
    (ArgumentError, {"truncation": math.nan}, "nan"),
    (ArgumentError, {"sphere_radius": -1.0}, "-1.0"),
    (ArgumentError, {"sphere_radius": "same"}, "'same'"),
    (ArgumentError, {"op": "ascend"}, "'ascend'"),
    (ArgumentError, {"backend": "gpu"}, "'gpu'"),
]


@pytest.mark.parametrize(
    ("error", "changes", "message"), ERRORS, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_bad_input_is_named(none_chosen: str, error: type[Exception], changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"z": Z, "sigma": 0.5, "backend": none_chosen, **changes}
    with pytest.raises(error, match=message):
        tgt.perturb_latents(**arguments)


def test_a_factor_that_fits_samples_and_coordinates_must_say_which(backend: str) -> None:
    z, sigma = latents((3, 3)), torch.rand(3)
    with pytest.raises(ShapeError, match=r"\(3, 1\).*\(1, 3\)"):
        tgt.perturb_latents(z, sigma, backend=backend)
    assert_like_truth(tgt.perturb_latents(z, sigma[:, None], backend=backend), expected(z, sigma[:, None]))
    assert_like_truth(tgt.perturb_latents(z, sigma[None], backend=backend), expected(z, sigma[None]))


def test_a_backend_asked_for_by_name_that_cannot_run_says_why(native: str) -> None:
    with pytest.raises(BackendError, match=r"native.*meta"):
        tgt.perturb_latents(Z.to("meta"), 0.5, backend=native)


def test_the_assertion_of_this_file_can_fail() -> None:
    truth = expected(Z, 0.5)
    assert_like_truth(truth.float(), truth)
    for wrong in (torch.zeros_like(truth), truth * 1.05, truth[[1, 0, 2, 3]], truth + 1e-3):
        with pytest.raises(AssertionError):
            assert_like_truth(wrong.float(), truth)


@pytest.mark.parametrize("radius", ["keep", 2.0])
def test_the_sphere_can_be_differentiated_twice(backend: str, radius: float | str) -> None:
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def project(z: Tensor) -> Tensor:
        return tgt.perturb_latents(z, 0.5, seed=3, sphere_radius=radius, backend=backend)

    assert torch.autograd.gradgradcheck(project, (z,))


def test_the_seed_may_be_a_tensor_of_any_integer_type(backend: str) -> None:
    z = torch.zeros(2, 5)
    expected = tgt.perturb_latents(z, 1.0, seed=5, step=7, backend=backend)
    seed, step = torch.tensor(5, dtype=torch.int32), torch.tensor(7, dtype=torch.uint8)
    assert torch.equal(tgt.perturb_latents(z, 1.0, seed=seed, step=step, backend=backend), expected)


@pytest.mark.parametrize(
    "sigma", [torch.tensor([[-1.0], [1.0]]), torch.tensor([math.nan, 1.0, 1.0]), torch.full((1, 3), math.inf)]
)
def test_sigma_tensors_are_finite_and_not_negative(none_chosen: str, sigma: Tensor) -> None:
    with pytest.raises(ArgumentError, match="sigma must be finite and >= 0"):
        tgt.perturb_latents(torch.zeros(2, 3), sigma, backend=none_chosen)
