"""LatentSampler: what each mode returns, in which units, and which mistakes it names."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import toys
from torch import Tensor, nn

from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.explore import LatentSampler
from tgt_fast.teacher import Teacher

MODES = ("prior", "random", "gradient", "persistent")
TEACHERS = {
    "vector": (toys.vector_teacher, lambda: toys.normal(6, toys.FEATURES), toys.student),
    "image": (
        toys.image_teacher,
        lambda: toys.normal(6, 1, 8, 8),
        lambda: toys.seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 5),
    ),
    "sequence": (
        toys.sequence_teacher,
        lambda: toys.sequences([5, 2, 3, 1, 5, 4]),
        lambda: toys.seeded(toys.SequenceClassifier, 5),
    ),
}


def calibrated(teacher: Teacher, mode: str, **options: Any) -> LatentSampler:
    return LatentSampler(teacher, mode, **options).calibrate([toys.normal(64, toys.FEATURES, seed=9)])


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", TEACHERS)
def test_every_mode_serves_every_kind_of_data(kind: str, mode: str, replicas: int) -> None:
    make, inputs, make_student = TEACHERS[kind]
    teacher, x, student = make(prior="normal"), inputs(), make_student()
    sampler = LatentSampler(teacher, mode, replicas=replicas, steps=2, radius=5.0, seed=1).calibrate([x])
    ids = torch.tensor([5, 0, 3, 9, 1, 7])
    made = sampler(x, student=student, sample_ids=ids)
    first = x["features"] if isinstance(x, dict) else x
    again = made.x["features"] if isinstance(x, dict) else made.x
    assert again.shape == (replicas * 6, *first.shape[1:])
    assert made.teacher_logits.shape == (replicas * 6, 3)
    assert torch.equal(made.ids, ids.repeat(replicas))
    assert made.source == mode
    assert made.latents.z.shape[0] == replicas * 6
    assert made.latents.z.isfinite().all()
    assert (made.latents.mask is not None) == (kind == "sequence")
    attached = mode == "persistent"
    assert again.requires_grad == made.teacher_logits.requires_grad == made.latents.z.requires_grad == attached
    torch.testing.assert_close(teacher.label(teacher.decode(made.latents)), made.teacher_logits)
    anchors = teacher.encode(x).z.repeat(replicas, *[1] * (made.latents.z.ndim - 1))
    assert (made.latents.z - anchors).flatten(1).norm(dim=1).min() > 0.01
    if replicas > 1:
        assert (made.latents.z[:6] - made.latents.z[6:12]).flatten(1).norm(dim=1).min() > 0.01


def test_sigma_is_measured_in_standard_deviations_of_the_latent() -> None:
    stretch = torch.tensor([0.01, 1.0, 100.0, 0.0])
    teacher = Teacher(lambda x: x * stretch, nn.Identity(), nn.Linear(4, 3))
    x = toys.normal(4000, 4)
    for units, expected in (("std", 0.5 * stretch), ("absolute", torch.full((4,), 0.5))):
        sampler = LatentSampler(teacher, "random", sigma=0.5, units=units)
        if units == "std":
            sampler.calibrate([x])
        moved = sampler(x).latents.z - x * stretch
        torch.testing.assert_close(moved.std(0), expected, rtol=0.05, atol=1e-5)
        assert moved.mean(0).abs().max() <= 0.05 * expected.max()


def test_prior_mode_draws_standard_normals_and_sigma_shrinks_them() -> None:
    teacher = Teacher(nn.Identity(), nn.Identity(), nn.Linear(4, 3), prior=(4,))
    full = LatentSampler(teacher, "prior")(torch.zeros(4000, 4)).latents.z
    half = LatentSampler(teacher, "prior", sigma=0.5)(torch.zeros(4000, 4)).latents.z
    assert abs(full.std().item() - 1) < 0.03
    assert abs(full.mean().item()) < 0.03
    torch.testing.assert_close(half, full / 2)


def test_a_prior_of_known_shape_needs_no_encoder_call() -> None:
    def encoder(x: Tensor) -> Tensor:
        raise AssertionError("the encoder was called")

    teacher = Teacher(encoder, nn.Identity(), nn.Linear(4, 3), prior=(4,))
    assert LatentSampler(teacher, "prior")(torch.zeros(5, 8)).x.shape == (5, 4)


def test_truncation_bounds_the_noise() -> None:
    teacher = Teacher(nn.Identity(), nn.Identity(), nn.Linear(4, 3))
    sampler = LatentSampler(teacher, "random", sigma=2.0, truncation=0.5, units="absolute")
    z = sampler(torch.zeros(500, 4)).latents.z
    assert 0.9 < z.abs().max().item() <= 1.0


def test_without_noise_random_mode_is_the_reconstruction() -> None:
    teacher, x = toys.vector_teacher(), toys.normal(6, toys.FEATURES)
    made = calibrated(teacher, "random", sigma=0.0)(x)
    assert torch.equal(made.x, teacher.decode(teacher.encode(x)))


def test_without_calibration_the_first_batch_gives_the_scale_with_a_warning_and_keeps_it() -> None:
    teacher, x = toys.vector_teacher(), toys.normal(20, toys.FEATURES)
    sampler = LatentSampler(teacher, "random")
    with pytest.warns(UserWarning, match=r"first batch \(20 examples\).*calibrate\(loader\)") as caught:
        sampler(x)
    assert caught[0].filename == __file__
    torch.testing.assert_close(sampler.scale, teacher.encode(x).z.std(0))
    kept = sampler.scale
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler(10 * x)
        calibrated(teacher, "random")(x)
        LatentSampler(teacher, "random", units="absolute")(x)
    assert sampler.scale is kept or torch.equal(sampler.scale, kept)
    with pytest.raises(ArgumentError, match="at least two examples"):
        LatentSampler(teacher, "random")(x[:1])


def test_student_sees_its_own_view() -> None:
    seen: list[Tensor] = []

    def student(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return x[:, :3]

    teacher = toys.vector_teacher(student_transform=lambda x: x + 100)
    calibrated(teacher, "gradient")(toys.normal(4, toys.FEATURES), student=student)
    assert seen
    assert all(x.min() > 50 for x in seen)


def test_empty_batches_are_legal() -> None:
    for mode in MODES:
        sampler = calibrated(toys.vector_teacher(prior=(4,)), mode, record_disagreement=False)
        ids = torch.zeros(0, dtype=torch.int64)
        made = sampler(torch.zeros(0, toys.FEATURES), student=toys.student(), sample_ids=ids)
        assert made.x.shape == (0, toys.FEATURES)
        assert made.teacher_logits.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_other_dtypes_keep_theirs(mode: str, dtype: torch.dtype) -> None:
    teacher, student = toys.vector_teacher(prior=(4,)).to(dtype), toys.student().to(dtype)
    x, ids = toys.normal(6, toys.FEATURES).to(dtype), torch.arange(6)
    sampler = LatentSampler(teacher, mode, radius=3.0, step_noise=0.1).calibrate([x])
    for _ in range(2):
        made = sampler(x, student=student, sample_ids=ids)
        if mode == "persistent":
            (student(made.x) - made.teacher_logits).float().square().mean().backward()
    assert made.latents.z.dtype == made.x.dtype == made.teacher_logits.dtype == dtype
    assert made.latents.z.isfinite().all()


def test_repr_shows_the_mode_and_what_is_not_default() -> None:
    shown = repr(LatentSampler(toys.vector_teacher(), "gradient", step_size=2.0, sigma=1.0))
    assert shown == "LatentSampler(mode='gradient', step_size=2.0)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "zeroth"}, r"mode must be one of .*'zeroth'"),
        ({"sigma": math.nan}, "sigma must be finite.*nan"),
        ({"beta": math.nan}, "beta must be finite.*nan"),
        ({"beta": 1.5}, "beta must be finite and in.*1.5"),
        ({"backend": "foo"}, "backend must be one of .*'native'.*'foo'"),
        ({"rank": 0.0, "world_size": 2}, r"rank must be an integer in \[0, 1\], got 0\.0"),
        ({"rank": 0, "world_size": 1.5}, r"world_size must be an integer.*1\.5"),
        ({"rank": 0, "world_size": True}, "world_size must be an integer.*True"),
        ({"replicas": np.float64(2)}, "replicas must be an integer"),
        ({"sigma": -1.0}, "sigma"),
        ({"sigma": "1"}, "sigma must be a number"),
        ({"step_size": math.inf}, "step_size"),
        ({"step_noise": math.nan}, "step_noise"),
        ({"radius": 0.0}, "radius"),
        ({"radius": math.nan}, "radius"),
        ({"truncation": -2.0}, "truncation"),
        ({"temperature": 0.0}, "temperature"),
        ({"restart_probability": 1.5}, "restart_probability"),
        ({"restart_probability": math.nan}, "restart_probability"),
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"replicas": 0}, "replicas"),
        ({"bank_size": 0}, "bank_size"),
        ({"norm": "l1"}, "norm"),
        ({"units": "pixels"}, "units"),
        ({"anchors": "rare"}, "anchors"),
        ({"divergence": "kl"}, "divergence"),
        ({"divergence": "jsd", "beta": 1.0}, "forward_kl and reverse_kl"),
        ({"seed": 1 << 64}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"rank": 1}, "rank and world_size"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"mode": "prior"}, "needs a teacher with a prior"),
        ({"mode": "persistent", "anchors": "balanced"}, "balanced"),
        ({"mode": "persistent", "norm": "raw"}, "loss scale"),
        ({"sigma": 0.0, "replicas": 2}, "copies of each other"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        LatentSampler(toys.vector_teacher(), **options)


def test_a_teacher_of_another_kind_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"must be a tgt_fast\.Teacher, got Linear"):
        LatentSampler(nn.Linear(2, 2), "random")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"sample_ids": torch.arange(5)}, ShapeError, r"\(5,\) must be \(4,\)"),
        ({"sample_ids": torch.arange(4.0)}, DTypeError, "integers, got torch.float32"),
        ({"sample_ids": [0, 1, 2, 3]}, DTypeError, "got list"),
        ({"sample_ids": torch.tensor([0, 1, 2, -1])}, ArgumentError, "2\\*\\*48"),
        ({"sample_ids": torch.tensor([0, 1, 2, 1 << 48])}, ArgumentError, "2\\*\\*48"),
        ({"step": -1}, ArgumentError, "step must be in"),
        ({"step": 1 << 28}, ArgumentError, "step must be in"),
        ({"step": 1.0}, ArgumentError, "step must be an integer"),
        ({"step": torch.tensor([1])}, ArgumentError, "step must be an integer"),
        ({"student": None}, ArgumentError, "pass student="),
        ({"student": "net"}, ArgumentError, "student must be callable"),
        ({"student": nn.Linear(8, 5)}, ShapeError, "student has 5 classes, the labeler 3"),
        ({"student": lambda x: x.detach()[:2, :3]}, ShapeError, "student changed the batch size"),
        ({"student": lambda x: None}, DTypeError, "student must return a tensor of logits.*got NoneType"),
    ],
)
def test_bad_calls_are_refused_and_count_for_nothing(
    call: dict[str, Any], error: type[Exception], message: str
) -> None:
    sampler = calibrated(toys.vector_teacher(), "gradient")
    before = sampler.state_dict()
    with pytest.raises(error, match=message):
        sampler(toys.normal(4, toys.FEATURES), **{"student": toys.student(), **call})
    assert toys.same(before, sampler.state_dict())


def test_a_student_that_is_the_labeler_is_refused() -> None:
    teacher = toys.vector_teacher()
    sampler, x = calibrated(teacher, "gradient"), toys.normal(4, toys.FEATURES)
    for student in (teacher.labeler, teacher, teacher.label):
        with pytest.raises(ArgumentError, match="identically 0"):
            sampler(x, student=student)


def test_a_decoder_that_changes_the_batch_size_is_named() -> None:
    teacher = Teacher(nn.Identity(), lambda z: z[:1], nn.Linear(4, 3))
    for mode in ("random", "gradient", "persistent"):
        sampler = LatentSampler(teacher, mode, units="absolute")
        with pytest.raises(ShapeError, match="decoder changed the batch size: it was given 6 examples"):
            sampler(toys.normal(6, 4), student=nn.Linear(4, 3), sample_ids=torch.arange(6))


def test_latents_of_another_shape_than_calibrated_are_named() -> None:
    teacher = Teacher(nn.Identity(), nn.Identity(), lambda x: x[:, :3])
    sampler = LatentSampler(teacher, "random").calibrate([toys.normal(9, 4)])
    with pytest.raises(ShapeError, match=r"\(4,\), the encoder now gives \(5,\)"):
        sampler(toys.normal(9, 5))


def test_numpys_integers_are_integers() -> None:
    teacher, x = toys.vector_teacher(), toys.normal(6, toys.FEATURES)
    options: dict[str, Any] = {"replicas": 2, "steps": 2, "bank_size": 20, "seed": -3, "rank": 1, "world_size": 2}
    plain = LatentSampler(teacher, "gradient", **options)
    numpy = LatentSampler(teacher, "gradient", **{name: np.int64(value) for name, value in options.items()})
    assert repr(numpy) == repr(plain)
    assert all(type(value) is not np.int64 for value in numpy.state_dict().values())
    made = []
    for sampler, integer in ((plain, int), (numpy, np.int32)):
        sampler.calibrate([x], per_class=integer(3))
        made.append(sampler(x, student=toys.student(), step=integer(5)))
    assert torch.equal(made[0].latents.z, made[1].latents.z)
    assert torch.equal(made[0].ids, made[1].ids)


@pytest.mark.parametrize(
    ("mode", "anchors"), [*((mode, "batch") for mode in MODES), ("random", "balanced"), ("gradient", "balanced")]
)
def test_a_sampler_built_under_inference_mode_serves_outside(mode: str, anchors: str) -> None:
    teacher, x, ids = toys.vector_teacher(prior="normal"), toys.normal(20, toys.FEATURES), torch.arange(20)

    def draws(sampler: LatentSampler) -> list[Tensor]:
        found = []
        for _ in range(3):
            made = sampler(x, student=toys.student(), sample_ids=ids if mode == "persistent" else None)
            if made.x.requires_grad:
                made.x.square().sum().backward()
            found.append(made.latents.z.detach().clone())
        return found

    def build() -> LatentSampler:
        return LatentSampler(teacher, mode, sigma=0.0, anchors=anchors).calibrate([x])

    with torch.inference_mode():
        inside = build()
        loaded = build()
        loaded.load_state_dict(inside.state_dict())
    expected = draws(build())
    for sampler in (inside, loaded):
        assert all(torch.equal(a, b) for a, b in zip(draws(sampler), expected, strict=True))
        assert int(sampler.state_dict()["step"]) == 3
