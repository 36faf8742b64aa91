"""Gradient exploration: it climbs the disagreement, exactly, and leaves the student without a trace."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import toys
from torch import Tensor, nn

from tgt_fast.errors import ArgumentError
from tgt_fast.explore import LatentSampler
from tgt_fast.kernels.options import DIVERGENCES
from tgt_fast.ops.distill import distillation_loss
from tgt_fast.teacher import Latents, Teacher
from tgt_fast.train.rng import get_rng_state

X = toys.normal(10, toys.FEATURES)
CALIBRATION = [toys.normal(64, toys.FEATURES, seed=9)]


def gradient_sampler(teacher: Teacher, **options: Any) -> LatentSampler:
    return LatentSampler(teacher, "gradient", **options).calibrate(CALIBRATION)


def disagreement(teacher: Teacher, student: nn.Module, z: Tensor, **options: Any) -> Tensor:
    x = teacher.decode(Latents(z))
    return distillation_loss(student(x), teacher.label(x), reduction="none", **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_disagreement_rises_over_the_steps(divergence: str) -> None:
    teacher, student = toys.vector_teacher(), toys.student().eval()
    options: dict[str, Any] = {"divergence": divergence, "temperature": 2.0}
    sampler = gradient_sampler(teacher, sigma=0.0, steps=5, step_size=0.05, record_disagreement=True, **options)
    made = sampler(X, student=student)
    history = sampler.last_disagreement
    assert len(history) == 6
    assert all(a < b for a, b in itertools.pairwise(history))
    start, end = (disagreement(teacher, student, z, **options) for z in (teacher.encode(X).z, made.latents.z))
    assert history[0] == pytest.approx(start.mean().item(), rel=1e-4)
    assert history[-1] == pytest.approx(end.mean().item(), rel=1e-4)
    assert (end > start).all()


def test_disagreement_passes_through_student_and_labeler() -> None:
    """With a constant student only the labeler's path is left, and the other way round: both must climb."""
    x = toys.normal(10, toys.FEATURES)
    constant = nn.Linear(toys.FEATURES, toys.CLASSES)
    nn.init.zeros_(constant.weight)
    cases = [(toys.vector_teacher(), constant)]
    frozen_judge = Teacher(nn.Identity(), nn.Identity(), nn.Sequential(nn.Linear(8, 3), nn.Hardtanh(0, 1e-9)))
    cases.append((frozen_judge, toys.student()))
    for teacher, student in cases:
        sampler = LatentSampler(teacher, "gradient", sigma=0.0, units="absolute", steps=3, record_disagreement=True)
        sampler(x, student=student)
        assert sampler.last_disagreement[-1] > sampler.last_disagreement[0] + 1e-4


@pytest.mark.parametrize("units", ["std", "absolute"])
@pytest.mark.parametrize("norm", ["l2", "linf", "raw"])
def test_one_step_is_the_documented_formula(norm: str, units: str) -> None:
    teacher, student = toys.vector_teacher(), toys.student().eval()
    sampler = gradient_sampler(teacher, sigma=0.0, step_size=0.3, norm=norm, units=units, temperature=2.0)
    z = teacher.encode(X).z.requires_grad_()
    (slope,) = torch.autograd.grad(disagreement(teacher, student, z, temperature=2.0).sum(), z)
    scale = torch.ones(toys.LATENT) if units == "absolute" else teacher.encode(CALIBRATION[0]).z.std(0)
    u = scale * slope
    direction = {"l2": u / u.norm(dim=1, keepdim=True), "linf": u.sign(), "raw": u}[norm]
    made = sampler(X, student=student)
    torch.testing.assert_close(made.latents.z, z.detach() + 0.3 * scale * direction, rtol=1e-4, atol=1e-5)


def test_the_trust_region_holds_and_binds() -> None:
    teacher = toys.vector_teacher()
    free = gradient_sampler(teacher, sigma=0.5, steps=4, step_size=2.0, step_noise=0.5)
    held = gradient_sampler(teacher, sigma=0.5, steps=4, step_size=2.0, step_noise=0.5, radius=1.5)
    anchors = teacher.encode(X).z
    distance = [((s(X, student=toys.student()).latents.z - anchors) / s.scale).norm(dim=1) for s in (free, held)]
    assert (distance[0] > 1.5).any()
    assert (distance[1] <= 1.5 + 1e-4).all()
    assert (distance[1] > 1.4).any()


def test_step_noise_differs_from_step_to_step() -> None:
    """A constant disagreement has no gradient, so that only the noise moves: its steps must not repeat."""
    teacher = Teacher(nn.Identity(), nn.Identity(), lambda x: 0 * x[:, :3])
    z = []
    call: dict[str, Any] = {"student": lambda x: 0 * x[:, :3], "sample_ids": torch.arange(2000)}
    for steps in (1, 2):
        sampler = LatentSampler(teacher, "gradient", sigma=0.0, steps=steps, step_noise=1.0, units="absolute")
        z.append(sampler(torch.zeros(2000, 4), step=0, **call).latents.z)
    assert z[0].std().item() == pytest.approx(1.0, abs=0.05)
    assert z[1].std().item() == pytest.approx(2**0.5, abs=0.05)
    later = sampler(torch.zeros(2000, 4), step=1, **call).latents.z  # nor those of another call
    assert torch.stack([z[1].flatten(), later.flatten()]).corrcoef()[0, 1].abs() < 0.06


@pytest.mark.parametrize("max_batch", [1, 4, None])
def test_exploring_in_pieces_changes_nothing(max_batch: int | None) -> None:
    reference = gradient_sampler(toys.vector_teacher(), steps=3)(X, student=toys.student())
    made = gradient_sampler(toys.vector_teacher(max_batch=max_batch), steps=3)(X, student=toys.student())
    torch.testing.assert_close(made.latents.z, reference.latents.z, rtol=1e-4, atol=1e-5)


def test_samples_without_a_usable_gradient_stay_and_spoil_no_other() -> None:
    teacher = Teacher(nn.Identity(), nn.Identity(), lambda x: x[:, :3])

    def student(x: Tensor) -> Tensor:
        logits = 2 * x[:, :3]
        return torch.cat([logits[:1] * torch.nan, x[1:2, :3], logits[2:]])  # NaN; equal to the teacher; usable

    x = toys.normal(4, 4)
    sampler = LatentSampler(teacher, "gradient", sigma=0.0, units="absolute", step_size=0.5)
    moved = (sampler(x, student=student).latents.z - x).norm(dim=1)
    torch.testing.assert_close(moved, torch.tensor([0.0, 0.0, 0.5, 0.5]))


class Restless(nn.Module):
    """Everything a forward pass can leave behind: buffers changed in place and anew, draws, statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = toys.student()
        self.calls: Tensor
        self.last: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.cache: Tensor | None
        self.register_buffer("last", torch.zeros(toys.CLASSES))
        self.register_buffer("cache", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache = x.detach().mean(0) * random.random() + float(np.random.normal())
        logits: Tensor = self.body(x + 0.1 * torch.randn(x.shape))
        self.last = logits.detach().mean(0)
        return logits


@pytest.mark.parametrize("build", [toys.student, Restless])
@pytest.mark.parametrize("fails", [False, True])
def test_the_student_is_left_as_it_was_found(build: Callable[[], nn.Module], fails: bool) -> None:
    student, five_classes = build(), toys.seeded(lambda: nn.Linear(toys.FEATURES, 5), 0)
    student.train()
    next(student.children()).requires_grad_(False)
    list(student.modules())[2].eval()  # a mix of flags, each to be restored
    trainable = next(student.parameters())
    trainable.grad = torch.full_like(trainable, 0.5)
    before, rng = toys.snapshot(student), get_rng_state()
    sampler = gradient_sampler(toys.vector_teacher(), steps=3, record_disagreement=True)
    if fails:
        sampler = LatentSampler(Teacher(nn.Identity(), nn.Identity(), five_classes), "gradient", units="absolute")
        with pytest.raises(ValueError, match="classes"):
            sampler(X, student=student)
    else:
        sampler(X, student=student)
    assert toys.same(before, toys.snapshot(student))
    assert toys.same(rng, get_rng_state())


def test_the_student_runs_in_eval_mode() -> None:
    """Dropout and batch statistics would make the climb depend on chance and on the batch's company."""
    student = toys.student().train()
    sampler = gradient_sampler(toys.vector_teacher(), sigma=0.0)
    together = sampler(X, student=student, step=0).latents.z
    alone = torch.cat([sampler(X[i : i + 1], student=student, step=0).latents.z for i in range(len(X))])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert student.training


def test_exploring_under_no_grad_works_and_under_inference_mode_is_refused() -> None:
    sampler, student = gradient_sampler(toys.vector_teacher()), toys.student()
    with torch.no_grad():
        assert not sampler(X, student=student).x.requires_grad
    with torch.inference_mode(), pytest.raises(ArgumentError, match="inference_mode"):
        sampler(X, student=student)


def test_a_decoder_that_cuts_the_graph_is_named() -> None:
    teacher = Teacher(nn.Identity(), lambda z: z.detach(), lambda x: x[:, :3])
    with pytest.raises(ArgumentError, match="no gradient reaches the latents"):
        LatentSampler(teacher, "gradient", units="absolute")(X, student=lambda x: 2 * x[:, :3])


def test_a_training_step_after_exploring_is_unchanged_by_it() -> None:
    def weights(explore: bool) -> Tensor:
        torch.manual_seed(0)
        student, sampler = toys.student().train(), gradient_sampler(toys.vector_teacher())
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for _ in range(3):
            if explore:
                sampler(X, student=student)
            student(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([t.flatten().float() for t in student.state_dict().values()])

    assert torch.equal(weights(True), weights(False))


@pytest.mark.parametrize("compiled", [True, False])
def test_a_student_whose_truth_is_undefined_or_false_serves(compiled: bool) -> None:
    """bool() of a module asks for its length, which a compiled Linear has no answer to, and may be 0."""

    class Empty(nn.Linear):
        def __len__(self) -> int:
            return 0

    plain = toys.seeded(lambda: (nn.Linear if compiled else Empty)(toys.FEATURES, toys.CLASSES), 0)
    student = torch.compile(plain, backend="eager") if compiled else plain
    made = gradient_sampler(toys.vector_teacher())(X, student=student)
    expected = gradient_sampler(toys.vector_teacher())(X, student=plain.forward)
    assert torch.equal(made.latents.z, expected.latents.z)


def compiled(part: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(part, backend="eager")


@pytest.mark.parametrize("wrap_student", [None, compiled, lambda part: part.forward])
@pytest.mark.parametrize("wrap_labeler", [None, compiled, lambda part: part.forward])
def test_the_labeler_as_the_student_is_refused_however_it_is_wrapped(wrap_student: Any, wrap_labeler: Any) -> None:
    judge = toys.labeler()
    labeler, student = (judge if wrap is None else wrap(judge) for wrap in (wrap_labeler, wrap_student))
    teacher = Teacher(nn.Identity(), nn.Identity(), labeler)
    with pytest.raises(ArgumentError, match="student is the teacher's labeler"):
        LatentSampler(teacher, "gradient", units="absolute")(X, student=student)


def test_a_compiled_function_as_labeler_and_student_is_refused() -> None:
    def judge(x: Tensor) -> Tensor:
        return x[:, :3]

    teacher = Teacher(nn.Identity(), nn.Identity(), judge)
    with pytest.raises(ArgumentError, match="student is the teacher's labeler"):
        LatentSampler(teacher, "gradient", units="absolute")(X, student=compiled(judge))
