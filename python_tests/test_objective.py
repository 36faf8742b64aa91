"""The three-term objective: its value, its terms, its normalisation, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_kit import CLASSES, FEATURES, make_data, make_student, make_teacher

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.teacher.batches import Batch


def soft_by_hand(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p || q), a row."""
    log_q = F.log_softmax(student.double() / temperature, -1)
    log_p = F.log_softmax(teacher.double() / temperature, -1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def absolute_sampler(teacher: tgt.Teacher, mode: str = "random", **options: Any) -> tgt.LatentSampler:
    return tgt.LatentSampler(teacher, mode=mode, sigma=0.7, units="absolute", seed=3, **options)


def gradients(student: nn.Module) -> list[Tensor]:
    found = [parameter.grad for parameter in student.parameters()]
    assert all(grad is not None for grad in found)
    return [grad.clone() for grad in found if grad is not None]


def close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(ours, theirs, strict=True))


def test_the_formula() -> None:
    teacher, student = make_teacher(), make_student(batch_norm=False, dropout=0.0)
    sampler = absolute_sampler(teacher, replicas=2)
    loss = tgt.DistillationLoss(temperature=3.0, hard_weight=0.6, soft_weight=0.8)
    objective = tgt.TGTObjective(teacher, sampler, loss=loss, synthetic_weight=0.5)
    x, y = make_data(9)
    ids = torch.arange(9)
    made = sampler(x, sample_ids=ids, step=4)
    hard = 0.6 * F.cross_entropy(student(x).double(), y)
    soft = 0.8 * soft_by_hand(student(x), teacher.label(x), 3.0).mean()
    synthetic = 0.5 * 0.8 * soft_by_hand(student(made.x), teacher.label(made.x), 3.0).mean()

    out = objective(student, x, y, sample_ids=ids, step=4)

    expected = {"hard": hard, "soft": soft, "synthetic": synthetic}
    assert set(out) == {"loss", "parts"}
    assert set(out["parts"]) == set(expected)
    for name, value in expected.items():
        part = out["parts"][name]  # type: ignore[literal-required]
        torch.testing.assert_close(part.double(), value.detach(), rtol=1e-5, atol=1e-6)
        assert value > 0.01
        assert part.dim() == 0
        assert not part.requires_grad
    torch.testing.assert_close(out["loss"].double(), hard + soft + synthetic, rtol=1e-5, atol=1e-6)

    (hard + soft + synthetic).backward()
    by_hand = gradients(student)
    student.zero_grad()
    out["loss"].backward()
    assert close(gradients(student), by_hand)


def test_the_comparison_can_fail() -> None:
    student = make_student(batch_norm=False)
    x, y = make_data(9)
    F.cross_entropy(student(x), y).backward()
    good = gradients(student)
    assert not close([torch.zeros_like(g) for g in good], good)
    assert not close([1.05 * g for g in good], good)


@pytest.mark.parametrize("loss", [None, tgt.DistillationLoss(soft_weight=0.0, hard_weight=2.0)])
def test_parts_add_up_and_without_a_sampler_there_is_no_third_term(loss: tgt.DistillationLoss | None) -> None:
    objective = tgt.TGTObjective(make_teacher(), loss=loss)
    x, y = make_data(9)
    out = objective(make_student(), x, y)
    parts = out["parts"]
    assert parts["synthetic"] == 0
    assert parts["hard"] > 0
    torch.testing.assert_close(parts["hard"] + parts["soft"], out["loss"].detach())


def test_parts_do_not_depend_on_inplace() -> None:
    x, y = make_data(9)
    parts = []
    for inplace in (False, True):
        loss = tgt.DistillationLoss(hard_weight=1.0, inplace=inplace)
        student = make_student(batch_norm=False, dropout=0.0)
        parts.append(tgt.TGTObjective(make_teacher(), loss=loss)(student, x, y)["parts"])
    assert parts[0] == parts[1]


def test_weight_zero_does_not_call_the_sampler() -> None:
    teacher = make_teacher()
    sampler = absolute_sampler(teacher, mode="persistent")  # would ask for ids
    x, y = make_data(9)
    out = tgt.TGTObjective(teacher, sampler, synthetic_weight=0)(make_student(), x, y)
    assert out["parts"]["synthetic"] == 0


def test_labels_may_be_missing() -> None:
    teacher, student = make_teacher(), make_student(batch_norm=False, dropout=0.0)
    objective = tgt.TGTObjective(teacher, loss=tgt.DistillationLoss(temperature=2.0, hard_weight=1.0))
    x, y = make_data(8)
    none = objective(student, x)
    assert none["parts"]["hard"] == 0
    assert none["parts"]["soft"] > 0

    unlabeled = objective(student, x, torch.full_like(y, -1))
    torch.testing.assert_close(unlabeled["loss"], none["loss"])
    assert unlabeled["parts"]["hard"] == 0

    some = torch.where(torch.arange(8) < 3, y, -1)  # both sums are over all 8
    out = objective(student, x, some)
    by_hand = F.cross_entropy(student(x)[:3], y[:3], reduction="sum") / 8
    torch.testing.assert_close(out["parts"]["hard"], by_hand.detach())
    torch.testing.assert_close(out["parts"]["soft"], none["parts"]["soft"])


@pytest.mark.parametrize("hard_weight", [0.0, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_an_ignored_row_does_not_count(hard_weight: float, weighted: bool) -> None:
    teacher, student = make_teacher(), make_student(batch_norm=False, dropout=0.0)
    objective = tgt.TGTObjective(teacher, loss=tgt.DistillationLoss(hard_weight=hard_weight))
    x, y = make_data(8)
    weight = torch.linspace(0.5, 2.0, 8) if weighted else None
    kept = slice(0, 5)
    y[5:] = -100
    x[7] = torch.nan
    out = objective(student, x, y, sample_weight=weight)
    expected = objective(student, x[kept], y[kept], sample_weight=None if weight is None else weight[kept])
    torch.testing.assert_close(out["loss"], expected["loss"])


@pytest.mark.parametrize("hard_weight", [0.0, 1.0])
@pytest.mark.parametrize("replicas", [1, 2])
def test_one_batch_of_32_equals_four_of_8(hard_weight: float, replicas: int) -> None:
    """Also with unequal numbers of valid rows, and for the synthetic term."""
    teacher, student = make_teacher(), make_student(batch_norm=False, dropout=0.0)
    loss = tgt.DistillationLoss(temperature=2.0, hard_weight=hard_weight)
    objective = tgt.TGTObjective(teacher, absolute_sampler(teacher, replicas=replicas), loss=loss)
    x, y = make_data(32)
    y[:7] = -100  # one micro-batch has a single valid row
    y[20:23] = -1
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:32]

    whole = objective(student, x, y, sample_ids=ids, step=5)
    whole["loss"].backward()
    expected = gradients(student)

    batches = [Batch(*part) for part in zip(ids.split(8), x.split(8), y.split(8), strict=True)]
    real, synthetic = objective.normalizers(batches)
    assert (real, synthetic) == (25, 32 * replicas)

    def accumulated(**normalizers: Tensor) -> tuple[Tensor, list[Tensor]]:
        student.zero_grad()
        total = torch.zeros(())
        for part_ids, part_x, part_y in batches:
            out = objective(student, part_x, part_y, sample_ids=part_ids, step=5, **normalizers)
            out["loss"].backward()
            total += out["loss"].detach()
        return total, gradients(student)

    total, found = accumulated(normalizer=real, synthetic_normalizer=synthetic)
    torch.testing.assert_close(total, whole["loss"].detach())
    assert close(found, expected)
    _, naive = accumulated()
    assert not close([grad / 4 for grad in naive], expected)  # the mean of means is another objective


def test_normalizers_without_labels_count_examples() -> None:
    objective = tgt.TGTObjective(make_teacher())
    x, y = make_data(12)
    batches = [Batch(None, {"x": x[:5]}, None), Batch(None, {"x": x[5:]}, y[5:])]
    assert objective.normalizers(batches) == (12, 12)


def test_student_and_labeler_have_their_own_normalisation() -> None:
    """The same examples, two ways of normalising them: the labels are those of the data, not of the student's view."""
    seen: list[Tensor] = []

    def spy(inputs: Tensor) -> Tensor:
        seen.append(inputs.detach().clone())
        return torch.zeros(inputs.shape[0], CLASSES, requires_grad=True)

    plain = make_teacher()
    teacher = make_teacher(student_transform=lambda x: (x - 3.0) / 2.0)
    x, y = make_data(8)
    sampler = absolute_sampler(teacher)
    made = sampler(x, sample_ids=torch.arange(8), step=0)
    tgt.TGTObjective(teacher, sampler)(spy, x, y, sample_ids=torch.arange(8), step=0)
    torch.testing.assert_close(seen[0], (x - 3.0) / 2.0)
    torch.testing.assert_close(seen[1], (made.x - 3.0) / 2.0)
    torch.testing.assert_close(made.teacher_logits, plain.label(made.x))


@pytest.mark.parametrize("mode", ["prior", "random", "gradient", "persistent"])
def test_only_the_student_is_touched(mode: str) -> None:
    """The teacher gets no gradient and keeps its statistics; the student's BatchNorm sees exactly two batches."""
    teacher = make_teacher(batch_norm=True, prior="normal")
    student = make_student()
    parent = nn.ModuleDict({"student": student, "teacher": teacher})
    parent.train()
    before = [tensor.clone() for tensor in teacher.frozen_tensors()]
    x, y = make_data(8)
    sampler = absolute_sampler(teacher, mode=mode)
    ids = torch.arange(8)
    tgt.TGTObjective(teacher, sampler)(student, x, y, sample_ids=ids, step=0)["loss"].backward()
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.frozen_tensors(), strict=True))
    assert all(tensor.grad is None for tensor in teacher.frozen_tensors())
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert student[1].num_batches_tracked == 2
    assert all(module.training for module in student.modules())


def test_the_backward_pass_moves_the_persistent_chains() -> None:
    teacher, student = make_teacher(), make_student(batch_norm=False, dropout=0.0)
    sampler = absolute_sampler(teacher, mode="persistent", restart_probability=0.0)
    objective = tgt.TGTObjective(teacher, sampler)
    x, y = make_data(8)
    ids = torch.arange(8)
    first = objective(student, x, y, sample_ids=ids, step=0)
    first["loss"].backward()
    moved = objective(student, x, y, sample_ids=ids, step=1)
    assert moved["parts"]["synthetic"] > first["parts"]["synthetic"]


def test_inputs_may_be_dicts() -> None:
    inner = make_teacher()
    teacher = tgt.Teacher(
        lambda batch: inner.encode(batch["x"]).z,
        lambda z: {"x": inner.decode(z)},
        lambda batch: inner.label(batch["x"]),
        modules=[module for module in (inner.encoder, inner.decoder, inner.labeler) if isinstance(module, nn.Module)],
    )
    student = make_student(batch_norm=False, dropout=0.0)
    x, y = make_data(8)
    ids = torch.arange(8)
    out = tgt.TGTObjective(teacher, absolute_sampler(teacher))(
        lambda batch: student(batch["x"]), {"x": x}, y, sample_ids=ids, step=0
    )
    expected = tgt.TGTObjective(inner, absolute_sampler(inner))(student, x, y, sample_ids=ids, step=0)
    assert torch.equal(out["loss"], expected["loss"])


def test_bad_arguments() -> None:
    teacher = make_teacher()
    with pytest.raises(ArgumentError, match="reduction='mean'"):
        tgt.TGTObjective(teacher, loss=tgt.DistillationLoss(reduction="sum"))
    with pytest.raises(ArgumentError, match="return_stats"):
        tgt.TGTObjective(teacher, loss=tgt.DistillationLoss(return_stats=True))
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match="synthetic_weight"):
            tgt.TGTObjective(teacher, synthetic_weight=weight)
    hard_only = tgt.DistillationLoss(soft_weight=0.0, hard_weight=1.0)
    with pytest.raises(ArgumentError, match="soft_weight=0"):
        tgt.TGTObjective(teacher, absolute_sampler(teacher), loss=hard_only)
    x, y = make_data(8)
    with pytest.raises(ShapeError, match="7 classes"):
        tgt.TGTObjective(teacher)(nn.Linear(FEATURES, 7), x, y)
