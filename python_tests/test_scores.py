"""Scores, balls and moves of channels, each against a computation of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

import tgt_fast as tgt
from tgt_fast import scores
from tgt_fast.errors import ArgumentError, DTypeError, ShapeError

INF = float("inf")


def by_hand(name: str, s: Tensor, t: Tensor) -> Tensor:
    """Row by row, from PyTorch's distributions."""
    student, labeler = (torch.distributions.Categorical(logits=x) for x in (s, t))
    if name == "disagreement":
        return torch.distributions.kl_divergence(labeler, student)
    if name == "entropy":
        return student.entropy()
    if name == "hardness":
        return torch.nn.functional.cross_entropy(s, t.argmax(1), reduction="none")
    if name == "agreeing":
        rows = zip(by_hand("disagreement", s, t), s, t, strict=True)
        return torch.stack([row if a.argmax() == b.argmax() else 0 * row for row, a, b in rows])
    mean = torch.distributions.Categorical(probs=torch.stack([row.softmax(0) for row in t]).mean(0))
    return torch.distributions.kl_divergence(labeler, mean.expand((len(t),)))


@pytest.mark.parametrize("name", scores.__all__)
def test_a_score_and_its_gradient_are_those_of_its_formula(name: str) -> None:
    score = getattr(scores, name)
    s, t = (toys.normal(7, 4, seed=seed).double().mul(3).requires_grad_() for seed in (0, 1))
    found, expected = score(s, t), by_hand(name, s, t)
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0.1
    for mine, theirs in zip(
        torch.autograd.grad(found.sum(), (s, t), allow_unused=True),
        torch.autograd.grad(expected.sum(), (s, t), allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(*(torch.zeros_like(s) if one is None else one for one in (mine, theirs)))
    parts = s.detach().reshape(7, 2, 2), t.detach().reshape(7, 2, 2)  # an example of two positions
    if name != "agreeing":
        both = sum(score(parts[0][:, place], parts[1][:, place]) for place in range(2))
        torch.testing.assert_close(score(*parts), both)
    half = score(s.detach().bfloat16(), t.detach().bfloat16())
    assert half.dtype == torch.float32


def test_classes_that_are_masked_count_for_nothing() -> None:
    s, t = toys.normal(5, 4, seed=0), toys.normal(5, 4, seed=1)
    hidden = torch.tensor([False, False, False, True])
    a, b = s.masked_fill(hidden, -INF).requires_grad_(), t.masked_fill(hidden, -INF).requires_grad_()
    for name in scores.__all__:
        found = getattr(scores, name)(a, b)
        torch.testing.assert_close(found, getattr(scores, name)(s[:, :3], t[:, :3]))
        for slope in torch.autograd.grad(found.sum(), (a, b), allow_unused=True):
            assert slope is None or slope.isfinite().all()


def sampler_of(**options: Any) -> tgt.LatentSampler:
    chosen = {"mode": "gradient", "sigma": 0.3, "units": "absolute", "step_size": 0.5, "seed": 2} | options
    return tgt.LatentSampler(toys.vector_teacher(), **chosen)


def test_gradient_exploration_climbs_the_score_that_it_is_given() -> None:
    x, student = toys.normal(6, toys.FEATURES), toys.student()
    plain = sampler_of(steps=2)(x, student=student)
    same = sampler_of(steps=2, score=scores.disagreement)(x, student=student)
    torch.testing.assert_close(plain.x, same.x)
    for score in (scores.entropy, scores.hardness, partial(scores.diversity, temperature=2.0)):
        made = sampler_of(steps=8, step_size=0.2, score=score, record_disagreement=True)
        ends = made(x, student=student).x
        values = made.last_disagreement
        assert values[-1] > values[0]
        frozen, labeler = student.eval(), made.teacher
        torch.testing.assert_close(score(frozen(ends), labeler.label(ends)).mean().item(), values[-1])
        student.train()


def test_an_example_is_pushed_only_where_the_two_agree() -> None:
    x, student = toys.normal(24, toys.FEATURES), toys.student(seed=8).eval()
    masked, free = (sampler_of(sigma=0.0, score=score)(x, student=student) for score in (scores.agreeing, None))
    teacher = toys.vector_teacher()
    start = teacher.encode(x).z
    first = teacher.decode(start)
    same = student(first).argmax(1) == teacher.label(first).argmax(1)
    assert 0 < same.sum() < 24
    assert torch.equal(masked.latents.z[~same], start[~same])
    torch.testing.assert_close(masked.latents.z[same], free.latents.z[same])
    assert not torch.equal(free.latents.z[~same], start[~same])


def test_what_is_no_score_is_refused() -> None:
    x, student = toys.normal(6, toys.FEATURES), toys.student()
    with pytest.raises(ArgumentError, match="score must be callable"):
        sampler_of(score="entropy")
    with pytest.raises(ShapeError, match=r"\(6,\), got \(6, 3\)"):
        sampler_of(score=lambda s, t: s - t)(x, student=student)
    with pytest.raises(DTypeError, match="score must return"):
        sampler_of(score=lambda s, t: s.argmax(1))(x, student=student)
    with pytest.raises(ArgumentError, match="temperature"):
        scores.entropy(torch.zeros(1, 2), torch.zeros(1, 2), temperature=0.0)
    with pytest.raises(ArgumentError, match="ball"):
        sampler_of(ball="l1")
    with pytest.raises(ArgumentError, match="affine=True serves"):
        tgt.LatentSampler(toys.vector_teacher(), "persistent", affine=True)


def test_a_replay_chooses_by_a_score() -> None:
    student = toys.student().eval()
    for select, option in ((scores.hardness, None), ("disagreement", scores.hardness)):
        sampler = sampler_of(mode="random", score=option)
        replay = tgt.SyntheticReplay(sampler, reuse=4, select=select, candidates=100)
        for step in range(6):
            made = replay(toys.normal(8, toys.FEATURES, seed=step), step=step, student=student)
        taken = scores.hardness(student(made.x), made.teacher_logits)[2:]
        held = replay._pool.fields
        old = scores.hardness(student(held["x"][0][:10]), held["teacher_logits"][0][:10])
        torch.testing.assert_close(taken, old.sort(descending=True).values[:6])


@pytest.mark.parametrize("affine", [False, True])
def test_the_ball_of_the_largest_coordinate(affine: bool) -> None:
    x, student = toys.normal(6, toys.FEATURES), toys.student()
    made = sampler_of(steps=6, sigma=0.0, radius=0.4, ball="linf", affine=affine)
    anchors, ends = made.teacher.encode(x).z, made(x, student=student).latents.z
    if affine:  # |e| and |b| within the radius
        assert ((ends - anchors).abs() <= 0.4 * (anchors.abs() + 1) + 1e-5).all()
    else:
        moved = (ends - anchors).abs()
        assert (moved <= 0.4 + 1e-6).all()
        assert (moved.norm(dim=1) > 0.4).any()  # outside of the ball of l2
    round_one = sampler_of(steps=6, sigma=0.0, radius=0.4, affine=affine)(x, student=student).latents.z
    assert not torch.equal(round_one, ends)


@pytest.mark.parametrize("kind", ["image", "sequence"])
def test_affine_moves_are_a_factor_and_a_shift_of_each_channel(kind: str) -> None:
    teacher = toys.image_teacher() if kind == "image" else toys.sequence_teacher()
    x: Any = toys.normal(6, 1, 8, 8) if kind == "image" else toys.sequences([5, 2, 3, 1, 5, 4])
    channels = 1 if kind == "image" else 2
    student = toys.seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 5)
    student = student if kind == "image" else toys.seeded(toys.SequenceClassifier, 5)
    for mode in ("random", "gradient"):
        sampler = tgt.LatentSampler(teacher, mode, sigma=0.3, affine=True, steps=2, step_size=0.2).calibrate([x])
        start, ends = teacher.encode(x), sampler(x, student=student, step=0).latents
        order = start.z.movedim(channels, 1), ends.z.movedim(channels, 1)
        for row in range(6):
            for before, after in zip(order[0][row], order[1][row], strict=True):
                real = slice(None) if start.mask is None else start.mask[row]
                line = torch.stack([before[real].flatten(), torch.ones_like(before[real]).flatten()], 1).double()
                if len(line) > 2:  # a line goes through all points, not just through two
                    fit = torch.linalg.lstsq(line, after[real].flatten().double()).solution
                    torch.testing.assert_close(line @ fit, after[real].flatten().double(), rtol=1e-4, atol=1e-4)
        assert (ends.z - start.z).flatten(1).norm(dim=1).min() > 0.01
        if start.mask is not None:
            assert torch.equal(ends.z[~start.mask], start.z[~start.mask])
    if kind == "image":  # its noise is the example's own
        alone = sampler(x[2:4], student=student, sample_ids=torch.tensor([2, 3]), step=0)
        torch.testing.assert_close(alone.latents.z, ends.z[2:4])


def test_an_affine_step_goes_up_the_slope_of_factor_and_shift() -> None:
    """Against autograd through z (1 + e) + b itself."""
    teacher, student = toys.image_teacher(), toys.seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 5)
    x = toys.normal(4, 1, 8, 8)
    options: dict[str, Any] = {"units": "absolute", "sigma": 0.0, "step_size": 0.3, "affine": True}
    ends = tgt.LatentSampler(teacher, "gradient", **options)(x, student=student).latents.z
    z = teacher.encode(x).z
    e, b = (torch.zeros(4, 2, 1, 1, requires_grad=True) for _ in range(2))
    made = teacher.decode(z * (1 + e) + b)
    value = by_hand("disagreement", student(made), teacher.label(made))
    slopes = torch.cat([part.flatten(1) for part in torch.autograd.grad(value.sum(), (e, b))], 1)
    step = 0.3 * slopes / slopes.norm(dim=1, keepdim=True)
    expected = z * (1 + step[:, :2, None, None]) + step[:, 2:, None, None]
    torch.testing.assert_close(ends, expected)
